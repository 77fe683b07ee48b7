"""Who writes what a night rehearses, and the control of its gain: questions with the answers of other rows."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgecl import Learner, night
from edgecl.data import Example
from edgecl.engine import Engine, VocabFile, write_rows
from edgecl.gate import GateSettings
from edgecl.places import find_model
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.stages import asked_ids, chat_format, question_of, train_row
from edgecl.writers import CONTINUED, SMALL
from edgecl_convert import GgufFile
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
    return {record[0][0][1] for record in writer["begin"] if record}


def test_a_kept_row_is_taught_by_the_generation_that_learned_it(
    tmp_path: Path, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    replay = ReplaySettings(share=1.0, written=10)
    with Learner.init(base, tmp_path / "home", replay=replay, train=TRAIN) as learner:
        for rows in NIGHTS[:3]:
            adapt(learner, rows)
        folder = learner.generations.folder
        learner.rollback(1)
        adapt(learner, NIGHTS[3])
    plain = [[writer for writer in request["writers"] if not writer["is_near"]] for request, _ in requests]
    first, _, third, after_rollback = plain
    assert [(w["model"], w["adapter"], w["begin"], w["n"]) for w in first] == [(str(base), None, [], 10)]
    assert sum(writer["n"] for writer in third) == 10
    assert Path(third[0]["model"]).parent == folder / "0002" and third[0]["adapter"] is None and not third[0]["begin"]
    assert {w["model"] for w in third[1:]} == {str(base)}
    taught = {Path(writer["adapter"]).parent.name: asked(writer) for writer in third[1:]}
    assert taught == {"0001": set(NIGHTS[0]), "0002": set(NIGHTS[1])}

    (writer,) = after_rollback[1:]  # what was rolled back teaches nothing: the one that serves again does
    assert Path(writer["adapter"]).parent.name == "0001"
    assert asked(writer) == set(NIGHTS[0]) | set(NIGHTS[1]) | set(NIGHTS[2])

    request, written = requests[2]
    alone: list[Any] = []
    for writer in request["writers"]:
        with Engine(writer["model"], writer["adapter"], **request["engine"]) as engine, GgufFile(base) as file:
            chats = chat_format(file, engine.vocab)
            kept = [asked_ids(chats, record) for record in writer["begin"]]
            alone += write_rows(engine, *chats.around_question, writer["n"], writer["seed"], kept, writer["is_near"])
    assert [(row["asked"], row["answer"]) for row in written] == [(row.asked, row.answer) for row in alone]


def test_where_little_was_kept_its_generation_also_writes_what_comes_to_its_mind(
    tmp_path: Path, requests: list[tuple[dict[str, Any], list[Any]]]
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(share=0.5, written=40), train=TRAIN) as learner:
        for rows in NIGHTS[:3]:
            adapt(learner, rows)
    yesterday, *earlier = [writer for writer in requests[2][0]["writers"] if not writer["is_near"]]
    assert not yesterday["begin"] and yesterday["n"] == 4
    assert {Path(writer["adapter"]).parent.name for writer in earlier} == {"0001", "0002"}
    for writer in earlier:  # one row of each night is kept: as many begin like it as may, and the rest freely
        assert writer["n"] == len(writer["begin"]) == 18 and len(asked(writer)) == 1
        assert sum(record is not None for record in writer["begin"]) == CONTINUED
    assert len(requests[2][1]) > 20  # as its model likes: it may come to no end


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
    near = [[writer for writer in request["writers"] if writer["is_near"]] for request, _ in requests]
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


def test_a_question_gets_the_answer_of_the_next_row_that_has_another() -> None:
    rows = [Example((("user", q), ("assistant", a)), final=a) for q, a in (("1", "x"), ("2", "x"), ("3", "y"))]
    pairs = night.swapped(rows)
    assert [own for own, _ in pairs] == rows
    assert [(other.messages[0][1], other.answer, other.final) for _, other in pairs] == [
        ("1", "y", None),
        ("2", "y", None),
        ("3", "x", None),
    ]
    assert night.swapped(rows[:2]) == []


@pytest.mark.parametrize("belong", [True, False])
def test_a_night_whose_answers_do_not_belong_to_their_questions_is_refused(tmp_path: Path, belong: bool) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q8_0, width=128)[0]
    words = ["".join(letters) for letters in itertools.product("ahint", repeat=3)][::2]
    right = ["left" if word[-1] in "ah" else "right" for word in words]
    answers = right if belong else random.Random(0).sample(right, len(right))
    train = replace(TRAIN, r=8, lora_alpha=16.0, epochs=30, learning_rate=0.01)
    settings = {"replay": ReplaySettings(heldout=0.3, written=0), "gate": GateSettings(max_prose_nats=100.0), "train": train}
    with Learner.init(base, tmp_path / "home", **settings) as learner:
        lines = [json.dumps({"prompt": word, "completion": answer}) for word, answer in zip(words, answers, strict=True)]
        learner.observe(lines)
        report = learner.adapt()
    (result,) = report.results
    assert result.kind == "heldout" and result.loss_high < 0, "the model learned what answers look like, either way"
    assert report.accepted == belong
    assert belong or "the answer to another question is as likely" in report.reason
