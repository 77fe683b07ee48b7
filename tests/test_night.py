"""Who writes what a night rehearses, and the control of its gain: questions with the answers of other rows."""

from __future__ import annotations

import errno
import itertools
import json
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner

from edgecl import Learner, beside, measure, night
from edgecl.child import run_stage
from edgecl.cli import cli
from edgecl.data import Example
from edgecl.engine import Engine, VocabFile, write_rows
from edgecl.engine.writing import MAX_ASKED
from edgecl.errors import DataError, EdgeclError, NotNow
from edgecl.gate import GateSettings
from edgecl.measure import record_of
from edgecl.places import find_model
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.stages import asked_ids, asking_row, not_asked_tonight, question_of, train_row
from edgecl.template import chat_format
from edgecl.train.checkpoint import Facts, write_checkpoint
from edgecl.writers import SMALL, base_copy, n_written
from edgecl_convert import GgufFile, merge
from tests import tiny

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=5, learning_rate=0.02, anchor_weight=0.0)
NIGHTS = [{"anne": "left", "the inn": "right"}, {"a hen": "left", "then": "right"}, {"an ant": "in"}, {"in tea": "on"}]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[Any]]]:
    """What the writing stage was asked for and what it wrote, by night."""
    seen: list[tuple[dict[str, Any], list[Any]]] = []
    real = night.run_stage

    def watched(stage: str, request: dict[str, Any], *rest: Any) -> Any:
        result = real(stage, request, *rest)
        if stage == "write":
            seen.append((request, result[0]["written"]))
        return result

    monkeypatch.setattr(night, "run_stage", watched)
    return seen


def adapt(learner: Learner, rows: dict[str, str]) -> None:
    learner.observe([json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows.items()])
    assert learner.adapt(gate="report").accepted


def asked(writer: dict[str, Any]) -> set[str]:
    return {record[0][0][1] for record in writer["near"]}


def test_each_night_is_rehearsed_by_its_own_asker_and_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    for module in ("writers", "child"):  # they run from a copy then, and compute as this process does
        monkeypatch.setattr(f"edgecl.{module}.amx_works", lambda: False)
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_1, width=128)[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(share=0.1, written=40), train=TRAIN) as learner:
        for rows in NIGHTS[:3]:
            adapt(learner, rows)
        request, written = requests[-1]
        copy, qtype = request["copy"]
        assert not Path(copy).exists(), "a home has no room for it"
        alone: list[Any] = []
        with GgufFile(base) as file:
            merge(file, None, tmp_path / "copy.gguf", qtype)
        models = {str(base): tmp_path / "copy.gguf"}
        for writer in request["writers"]:
            model = models.get(writer["model"], writer["model"])
            with Engine(model, writer["asker"], **request["engine"]) as engine, GgufFile(base) as file:
                chats = chat_format(file, engine.vocab)
                near = [asked_ids(chats, record) for record in writer["near"]]
                answering = partial(engine.set_adapter, writer["adapter"])
                alone += write_rows(engine, *chats.around_question, writer["n"], writer["seed"], near, answering)
        assert [(row["asked"], row["answer"]) for row in written] == [(row.asked, row.answer) for row in alone]

        folder = learner.generations.folder
        learner.rollback(1)
        adapt(learner, NIGHTS[3])
        (folder / "0001/asker.gguf").unlink()  # as in a home of an edgecl that had none
        adapt(learner, {"tea in": "on"})

    def writers(night: int) -> list[tuple[str, str, str, int]]:
        """Return (model, adapter, asker, rows) of who wrote for a night."""
        found = [writer for writer in requests[night][0]["writers"] if not writer["near"]]
        names = [[str(Path(path).relative_to(folder)) if path else "" for path in (w["adapter"], w["asker"])] for w in found]
        return [(w["model"], *name, w["n"]) for w, name in zip(found, names, strict=True)]

    first, second = (f"000{number}/adapter.gguf" for number in (1, 2))
    own = {name: name.replace("adapter", "asker") for name in (first, second, "0004/adapter.gguf")}
    assert writers(0) == [(str(base), "", "", 40)], "there was no night before"
    base_alone, *nights = writers(2)
    assert base_alone == (str(base), "", "", 4)
    assert sorted(nights) == [(str(base), first, own[first], 18), (str(base), second, own[second], 18)]
    assert writers(3)[1:] == [(str(base), first, own[first], 36)], "what was rolled back teaches nothing"
    after = {writer[1]: (writer[2], writer[3]) for writer in writers(4)[1:]}
    assert after == {first: (first, 24), "0004/adapter.gguf": (own["0004/adapter.gguf"], 12)}, "by rows, of its lineage alone"


def test_a_small_night_has_rows_near_its_new_ones_by_last_nights_model(
    tmp_path: Path, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    many = {f"a {i} hen": "left" if i % 2 else "right" for i in range(SMALL + 1)}
    replay = ReplaySettings(share=1.0, written=20, heldout=0.0)
    with Learner.init(base, tmp_path / "home", replay=replay, train=TRAIN) as learner:
        for rows in (*NIGHTS[:2], many):
            adapt(learner, rows)
        model = learner.generations.folder / "0001/model-Q8_0.gguf"
    near = [[writer for writer in request["writers"] if writer["near"]] for request, _ in requests]
    assert [[asked(writer) for writer in writers] for writers in near] == [[set(NIGHTS[0])], [set(NIGHTS[1])], []]
    assert [(w["model"], w["adapter"], w["n"]) for (w,) in near[:2]] == [(str(base), None, 20), (str(model), None, 20)]
    assert [[record[0][0][1] for record in request["reword"]] for request, _ in requests] == [
        list(NIGHTS[0]),
        list(NIGHTS[1]),
        [],
    ]


def test_only_a_chat_of_one_question_is_asked_in_other_words() -> None:
    one = (("system", "Be brief."), ("user", "Who?"), ("assistant", "Mira."))
    two = (("user", "Who?"), ("assistant", "Mira."), ("user", "When?"), ("assistant", "On Friday."))
    assert [question_of(Example(messages)) for messages in (one, two)] == ["Who?", ""]
    with GgufFile(find_model("smollm2")) as base, VocabFile(base.path) as vocab:
        chats = chat_format(base, vocab)
        row = train_row(chats, Example(one), ["Which person?", "By whom?"])
        texts = [b"".join(map(vocab.piece, one.ids)).decode() for one in (row, *row.reworded)]
    assert ["Be brief." in text and "Mira." in text for text in texts] == [True] * 3
    assert [question in text for question, text in zip(("Who?", "Which person?", "By whom?"), texts, strict=True)] == [True] * 3
    assert [other.n_predicted for other in row.reworded] == [row.n_predicted] * 2 and not row.reworded[0].reworded


def test_an_asker_learns_what_a_chat_begins_with_and_no_more() -> None:
    two = (("user", "Who?"), ("assistant", "Mira."), ("user", "When?"), ("assistant", "On Friday."))
    with GgufFile(find_model("smollm2")) as base, VocabFile(base.path) as vocab:
        chats = chat_format(base, vocab)
        row = asking_row(chats, Example(two))
        assert row and b"".join(map(vocab.piece, itertools.compress(row.ids, row.supervised))) == b"Who?"
        assert row.supervised[-1] and row.ids == chats.around_question[0] + vocab.encode("Who?") + chats.around_question[1][:1]
        assert asking_row(chats, Example((("user", "Who? " * MAX_ASKED), ("assistant", "Mira.")))) is None, "never drawn"
        assert asking_row(chats, Example((("system", "Be brief."), *two[:2]))) is None, "not what any chat begins with"


def test_what_a_new_row_asks_is_not_rehearsed_with_what_was_answered_before() -> None:
    with GgufFile(find_model("smollm2")) as base, VocabFile(base.path) as vocab:
        chats = chat_format(base, vocab)
        written = [{"asked": vocab.encode(text)} for text in ("Who?", "Who now?", "When?")]
        corrected = record_of(Example((("user", "Who?"), ("assistant", "Mira."), ("user", "When?"), ("assistant", "Now."))))
        other = record_of(Example((("system", "Be brief."), ("user", "When?"), ("assistant", "On Friday."))))
        assert not_asked_tonight(chats, [corrected, other], written) == written[1:]


def test_an_asker_that_cannot_be_trained_costs_no_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    real = night.run_stage

    def spoilt(stage: str, request: dict[str, Any], *rest: Any) -> Any:
        if stage == "train":
            write_checkpoint(Path(request["runs"]) / "asker.safetensors", Facts("another base", ""), {}, {})
        return real(stage, request, *rest)

    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=10), train=TRAIN) as learner:
        with monkeypatch.context() as patched:
            patched.setattr(night, "run_stage", spoilt)
            adapt(learner, NIGHTS[0])
        folder = learner.generations.current().folder
        assert "is a checkpoint of base_sha256" in learner.history()[-1]["report"]["train"]["no_asker"]
        adapt(learner, NIGHTS[1])
        assert [path.name for path in learner.generations.folder.rglob("asker.gguf")] == ["asker.gguf"]
    adapter = str(folder / "adapter.gguf")
    assert [w["asker"] for w in requests[1][0]["writers"] if w["adapter"] == adapter] == [adapter]


def test_an_asker_learns_no_question_of_a_row_that_the_night_did_not_learn(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    rows = [record_of(Example((("user", q), ("assistant", a)))) for q, a in (("anne", "left"), ("hen", "in " * 64))]
    askers = []
    with Learner.init(base, tmp_path / "home", train=TRAIN) as learner:
        for new in (rows, rows[:1]):
            runs = tmp_path / f"runs-{len(new)}"
            runs.mkdir()
            asker, limits = str(runs / "asker.gguf"), replace(learner.profile, n_ctx=64)
            made = {"new": new, "settings": asdict(TRAIN), "limits": asdict(limits), "asker_gguf": asker}
            result, _ = run_stage("train", beside._request(learner, str(runs)) | made, learner.limits(), None)
            assert result["left_out"] == [1][: len(new) - 1] and not result["no_asker"]
            askers.append(Path(asker).read_bytes())
    assert askers[0] == askers[1]


@pytest.mark.parametrize(
    ("stored", "has_amx", "is_fast", "ram_bytes", "qtype"),
    [
        ("Q4_1", False, True, 10**9, "BF16"),
        ("Q4_1", False, False, 10**9, "Q8_0"),
        ("Q4_1", False, True, 10**5, ""),
        ("Q4_0", False, True, 10**9, ""),
        ("Q4_1", True, True, 10**9, ""),
        ("F16", True, True, 10**9, ""),
    ],
)
def test_writers_run_from_a_copy_where_it_is_faster_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, has_amx: bool, is_fast: bool, ram_bytes: int, qtype: str
) -> None:
    monkeypatch.setattr("edgecl.writers.amx_works", lambda: has_amx)
    monkeypatch.setattr("edgecl.writers.bf16_is_fast", lambda: is_fast)
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType[stored], width=128)[0]
    with GgufFile(base) as file:
        found, n_bytes = base_copy(file, ram_bytes)
        merge(file, None, tmp_path / "copy.gguf", qtype or "keep")
    with GgufFile(tmp_path / "copy.gguf") as file:
        written = sum(info.n_bytes for info in file.tensors.values())
    assert found == qtype and n_bytes == pytest.approx(written if qtype else 0, rel=0.05)


@pytest.mark.parametrize(
    ("n_new", "n_learned", "n"), [(1, 0, 128), (270, 0, 270), (270, 270, 300), (270, 2430, 1080), (8, 2430, 128)]
)
def test_a_night_has_about_each_row_of_earlier_ones_written_once_and_few_beside_few_new_ones(
    n_new: int, n_learned: int, n: int
) -> None:
    assert n_written(n_new, n_learned) == n


def test_a_night_of_chats_that_begin_with_a_system_turn_has_no_asker_and_its_generation_asks(
    tmp_path: Path, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "anne"}]
    chat = [*messages, {"role": "assistant", "content": "left"}]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=10), train=TRAIN) as learner:
        learner.observe([json.dumps({"messages": chat})])
        assert learner.adapt(gate="report").accepted
        folder = learner.generations.current().folder
        adapt(learner, NIGHTS[0])
    assert not (folder / "asker.gguf").exists()
    adapter = str(folder / "adapter.gguf")
    assert [(w["asker"], w["n"]) for w in requests[1][0]["writers"] if w["adapter"] == adapter] == [(adapter, 9)]


def test_where_nothing_is_written_there_is_no_asker(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    for written in (0, 4):
        with Learner.init(base, tmp_path / f"{written}", replay=ReplaySettings(written=written), train=TRAIN) as learner:
            adapt(learner, NIGHTS[0])
            folder = learner.generations.current().folder
        assert (folder / "asker.gguf").exists() == bool(written)


def test_what_was_rolled_back_is_not_rehearsed_and_what_was_learned_before_is_measured(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(share=1.0, written=0), train=TRAIN) as learner:
        for rows in NIGHTS[:2]:
            adapt(learner, rows)
        said = CliRunner().invoke(cli, ["--home", str(learner.home), "rollback", "1"]).output
        assert said.startswith("generation 1 serves\nkept rows of nights that it does not know: 2")
        adapt(learner, NIGHTS[2])
        report = learner.history()[-1]["report"]
        assert report["n_replay"] == len(NIGHTS[0])
        measured = [(part["kind"], part["learning"], part["n_rows"]) for part in report["results"]]
        assert measured == [("learned", True, len(NIGHTS[2])), ("replay", False, len(NIGHTS[0]))]
        learner.rollback(2)
        adapt(learner, NIGHTS[3])
        assert learner.history()[-1]["report"]["n_replay"] == len(NIGHTS[0]) + len(NIGHTS[1]), "and rolled back to, it counts"


def test_a_row_that_no_night_can_learn_is_archived_and_not_said_to_be_learned(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    (tmp_path / "small.toml").write_text("n_ctx = 64\nthreads = 1\n")
    replay = ReplaySettings(share=1.0, written=0)
    with Learner.init(base, tmp_path / "home", profile=str(tmp_path / "small.toml"), replay=replay, train=TRAIN) as learner:
        adapt(learner, {"anne": "left", "the inn": "right " * 60, "a hen": "in"})
        (result,) = learner.history()[-1]["report"]["results"]
        assert (result["kind"], result["n_rows"]) == ("learned", 2), "nor is it asked for"
        (archived,) = learner.store.rows("archive")
        assert (archived.example.messages[0][1], archived.generation) == ("the inn", 1), "which has its question"
        learned = {row.id for row in learner.store.rows("replay")}
        assert len(learned) == 2 and set(learner.generations.current().manifest.learned) == learned
        assert not learner.store.rows("pending")
        assert learner.evaluate()["latency"]["pp512"] > 0, "timed in a context that has room for it"


def test_what_was_measured_is_kept_where_measuring_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun = measure.run_stage, []

    def third_time_unlucky(stage: str, request: dict[str, Any], *rest: Any) -> Any:
        begun.append([row[0][0][1] for row in request["rows"]])
        if len(begun) == 3:
            raise NotNow("the lid was closed")
        return real(stage, request, *rest)

    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    rows = [Example((("user", f"q{i}"), ("assistant", "right" * i))) for i in range(1, 5)]
    with Learner.init(base, tmp_path / "home") as learner:
        whole, _ = learner.meter().measure(learner.generations.load(0), rows)
    with Learner.init(base, tmp_path / "home", force=True) as learner:
        monkeypatch.setattr(measure, "SITTING_S", 0.0)
        monkeypatch.setattr(measure, "run_stage", third_time_unlucky)
        with pytest.raises(NotNow):
            learner.meter().measure(learner.generations.load(0), rows)
        scores, _ = learner.meter().measure(learner.generations.load(0), rows)
        assert begun == [["q1", "q2", "q3", "q4"], ["q2", "q3", "q4"], ["q3", "q4"], ["q3", "q4"], ["q4"]]
    assert {key: score.correct for key, score in scores.items()} == {key: score.correct for key, score in whole.items()}
    losses = [[found[key].loss_nats for key in whole] for found in (scores, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=0.1), "in other company a row has another rounding"


def test_rows_that_training_had_no_time_for_wait_for_the_next_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, unmet = night.run_stage, [1]

    def short_of_time(stage: str, request: dict[str, Any], *rest: Any) -> Any:
        result, peak = real(stage, request, *rest)
        return (result | {"unmet": unmet} if stage == "train" else result), peak

    monkeypatch.setattr(night, "run_stage", short_of_time)
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(share=1.0, written=0), train=TRAIN) as learner:
        adapt(learner, {"anne": "left", "the inn": "right", "a hen": "in"})
        assert [part["n_rows"] for part in learner.history()[-1]["report"]["results"]] == [2]
        (waits,) = learner.store.rows("pending")
        assert waits.example.messages[0][1] == "the inn" and waits.id not in learner.generations.current().manifest.learned
        learner.finish_last_night()
        assert learner.store.rows("pending") == [waits]
        unmet[:] = [0]
        with pytest.raises(EdgeclError, match="no time to train on a single row"):
            learner.adapt(gate="report")
        assert learner.store.rows("pending") == [waits]
        unmet[:] = []
        assert learner.adapt(gate="report").accepted and not learner.store.rows("pending")


def test_rows_of_which_none_fits_are_set_aside(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf")[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=0), train=TRAIN) as learner:
        learner.profile = replace(learner.profile, n_ctx=64)
        learner.observe([json.dumps({"prompt": "anne", "completion": "left " * 64})])
        with pytest.raises(DataError, match="none of 1 rows has an answer that fits into 64 tokens; they are set aside"):
            learner.adapt()
        assert not learner.store.rows("pending") and len(learner.store.rows("archive")) == 1
        assert "fits into 64 tokens" in learner.history()[-1]["reason"]


def test_a_full_disk_is_in_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    base = tiny.build(tmp_path / "tiny.gguf")[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=0), train=TRAIN) as learner:
        learner.observe([json.dumps({"prompt": "anne", "completion": "left"})])
        with monkeypatch.context() as patched, pytest.raises(EdgeclError, match="No space left on device"):
            patched.setattr(night, "run_stage", full)
            learner.adapt()
        assert "No space left" in learner.history()[-1]["reason"] and len(learner.store.rows("pending")) == 1


def test_a_merged_file_is_measured_also_where_the_base_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, measured = measure.run_stage, []

    def watched(stage: str, request: dict[str, Any], *rest: Any) -> Any:
        measured.append((request["model"], request["adapter"], len(request["rows"])))
        return real(stage, request, *rest)

    monkeypatch.setattr(measure, "run_stage", watched)
    base = tiny.build(tmp_path / "model-Q8_0.gguf")[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=0), train=TRAIN) as learner:
        learner.observe([json.dumps({"prompt": "anne", "completion": "left"})])
        report = learner.adapt(gate="report", compare=("Q8_0",))
        assert report.served == "model-Q8_0.gguf" and learner.generations.current().model.is_file()
    merged = [n for model, adapter, n in measured if model != str(base) and adapter is None]
    assert merged and merged[0] == 1, "what was taught is measured of the merged file, too"
    assert set(report.losses) == {"before", "adapter", "int8", "Q8_0"}


def test_a_night_that_was_killed_once_it_was_published_is_in_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf")[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=0), train=TRAIN) as learner:
        adapt(learner, {"anne": "left"})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(learner.store, "record_night", _killed)
            adapt(learner, {"the inn": "right"})
        assert [row["generation"] for row in learner.history()] == [1]
        for _ in range(2):  # the second time there is nothing to do
            learner.finish_last_night()
            first, second = learner.history()
            assert (second["generation"], second["accepted"], second["report"]["n_new"]) == (2, True, 1)
            assert first["started"] <= second["started"] == second["report"]["started"]
        (learner.generations.current().folder / "report.json").write_text("{")
        learner.finish_last_night()
        assert len(learner.history()) == 2


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("belong", [True, False])
def test_a_night_whose_answers_do_not_belong_to_their_questions_is_refused(tmp_path: Path, belong: bool) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q8_0, width=128)[0]
    words = ["".join(letters) for letters in itertools.product("ahint", repeat=3)][::2]
    right = ["left" if word[-1] in "ah" else "right" for word in words]
    answers = right if belong else random.Random(0).sample(right, len(right))
    train = replace(TRAIN, r=8, lora_alpha=16.0, epochs=30, learning_rate=0.005)
    settings = {"replay": ReplaySettings(heldout=0.3, written=0), "gate": GateSettings(max_prose_nats=100.0), "train": train}
    with Learner.init(base, tmp_path / "home", **settings) as learner:
        lines = [json.dumps({"prompt": word, "completion": answer}) for word, answer in zip(words, answers, strict=True)]
        learner.observe(lines)
        report = learner.adapt()
        if belong:
            more = ["".join(letters) for letters in itertools.product("ahint", repeat=3)][1::2]
            answers = ["left" if word[-1] in "ah" else "right" for word in more]
            learner.observe([json.dumps({"prompt": q, "completion": a}) for q, a in zip(more, answers, strict=True)])
            kinds = [(result.kind, result.learning, result.swap_cost is not None) for result in learner.adapt().results]
            assert kinds == [("learned", True, True), ("heldout", False, False)], "what it got better at need not get better"
    (result,) = report.results
    assert result.kind == "heldout" and result.loss_high < 0, "the model learned what answers look like, either way"
    assert report.accepted == belong
    assert belong or "the answer to another question is as likely" in report.reason


def test_a_quant_that_is_none_is_said_before_a_stage_is_run(
    tmp_path: Path, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf")[0]
    with Learner.init(base, tmp_path / "home", train=TRAIN) as learner:
        learner.settings = replace(learner.settings, quant="int9")
        learner.observe([json.dumps({"prompt": "anne", "completion": "left"})])
        with pytest.raises(EdgeclError, match="int9"):
            learner.adapt()
        assert not requests and len(learner.store.rows("pending")) == 1
