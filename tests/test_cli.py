"""The terminal app, run as a user runs it: whole days and nights on a tiny model, and every kind of bad input.

Bad input gives one line that says what is wrong, the right exit code, and loses nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from edgecl import Learner
from edgecl.data import Example
from edgecl.home import NEW_BASE
from edgecl.places import find_model
from edgecl.tries import last_try, note_try
from edgecl_convert import GgufFile, write_gguf_adapter, write_peft_adapter
from tests import tiny

TRAIN = "min_steps = 12\ndepth = 1.0\nlearning_rate = 0.02\nanchor_weight = 0.0\nr = 4\nlora_alpha = 8.0\nepochs = 1\n"


EDGECL = [sys.executable, "-c", "from edgecl.cli import main; main()"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def run(home: Path, *args: str | Path, stdin: bytes = b"", limit_bytes: int = 0) -> tuple[int, str, str]:
    """Run `edgecl --home HOME ARGS`; return its exit code, stdout and stderr."""

    def limit() -> None:
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    done = subprocess.run(
        [*EDGECL, "--home", str(home), *map(str, args)],
        input=stdin,
        capture_output=True,
        timeout=300,
        preexec_fn=limit,
        env=environment(),
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def one_line(error: str, *words: str) -> bool:
    """Return whether stderr is a single line, no traceback, that holds all words."""
    return len(error.strip().splitlines()) == 1 and all(word in error for word in words)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("base") / "tiny.gguf")[0]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for the tiny model with settings that learn in seconds and a gate that asks for little."""
    home = tmp_path_factory.mktemp("made") / "home"
    assert run(home, "init", base)[0] == 0
    config = home / "edgecl.toml"
    head = config.read_text().split("[train]")[0]
    gate = "[gate]\nmin_recall = 0.0\nmax_prose_nats = 100.0\nmax_drop = 1.0\nmin_survival = 0.5\n"
    config.write_text(head + "[train]\n" + TRAIN + gate)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home", symlinks=True))


def lines(n: int, first: int = 0) -> bytes:
    rows = [{"prompt": f"say {i}", "completion": f"ok {i}", "task": "echo"} for i in range(first, first + n)]
    return "\n".join(json.dumps(row) for row in rows).encode()


def pending(home: Path) -> int:
    return sum(roles["pending"] for roles in json.loads(run(home, "status", "--json")[1])["tasks"].values())


def test_a_day_and_a_night_and_back(home: Path) -> None:
    code, out, _ = run(home, "observe", "-", "--json", stdin=lines(6))
    assert (code, json.loads(out)["added"]) == (0, 6)
    assert run(home, "adapt", "--dry-run")[0] == 0
    code, out, error = run(home, "adapt", "--json")
    report = json.loads(out)
    assert code == 0, error
    assert report["accepted"] and report["generation"] == 1 and report["train"]["steps"] == 12
    assert report["losses"]["adapter"] < report["losses"]["before"]
    status = json.loads(run(home, "status", "--json")[1])
    assert status["generation"] == 1 and status["tasks"]["echo"] == {"pending": 0, "replay": 1, "heldout": 0, "archive": 0}
    assert (home / "generations/0001" / status["served"]).stat().st_mode & 0o777 == 0o600
    assert run(home, "ask", "say 1", "--max-tokens", "5")[0] == 0
    facts = json.loads(run(home, "eval", "--json")[1])
    assert facts["tasks"]["echo"]["n_rows"] == 1 and facts["latency"]["tg128"] > 0
    assert run(home, "history")[1].count("generation 1") == 1
    assert json.loads(run(home, "rollback", "--json")[1]) == {"generation": 0}
    assert json.loads(run(home, "status", "--json")[1])["generation"] == 0
    code, _, error = run(home, "rollback")
    assert code == 1 and one_line(error, "nothing to roll back to")
    assert run(home, "adapt")[0] == 4  # nothing to learn


def test_the_night_says_how_it_was_planned_and_what_it_took(home: Path) -> None:
    run(home, "observe", "-", stdin=lines(4))
    code, out, _ = run(home, "adapt", "--compare", "Q4_0,F16")
    plan = next(line for line in out.splitlines() if line.startswith("plan"))
    survival = next(line for line in out.splitlines() if line.startswith("survival"))
    assert all(f"{what} " in survival for what in ("nats unmerged; int8", "Q4_0", "F16")) and survival.count("of the gain") == 3
    assert code == 0 and "2 of 2 layers, the upper 1 from step " in plan and "weights resident" in plan and "took" in plan
    assert (home / "runs/latents.db").parent.stat().st_mode & 0o777 == 0o700
    assert not (home / "runs/checkpoint.safetensors").exists()


def test_too_little_memory_says_what_would_fit_and_loses_nothing(home: Path) -> None:
    run(home, "observe", "-", stdin=lines(4))
    code, _, error = run(home, "adapt", "--ram", "200000000")
    assert code == 1 and one_line(error, "memory"), error
    code, _, error = run(home, "adapt", "--ram", "300000000")
    assert code == 1 and one_line(error, "training needs", "MB of memory at least", "ram_bytes is 300 MB"), error
    assert pending(home) == 4
    assert json.loads(run(home, "history", "--json")[1])["nights"][-1]["accepted"] == 0


def test_a_loss_that_is_not_a_number_refuses_the_night_and_names_step_and_rows(home: Path) -> None:
    config = home / "edgecl.toml"
    config.write_text(config.read_text().replace("learning_rate = 0.02", "learning_rate = 1e38"))
    run(home, "observe", "-", stdin=lines(3))
    code, out, error = run(home, "adapt")
    assert code == 3 and re.search(r"refused: training loss is .* of 12 \(rows: [123]", out), error
    assert "`edgecl forget ID`" in out
    assert pending(home) == 3 and json.loads(run(home, "status", "--json")[1])["last_night"]["accepted"] is False


@pytest.mark.parametrize(("precision", "qtype"), [("f16", "F16"), ("int8", "Q8_0"), ("int4", "Q4_0")])
def test_a_base_of_a_precision_is_what_is_trained_and_served(tmp_path: Path, base: Path, precision: str, qtype: str) -> None:
    home = tmp_path / "home"
    assert run(home, "init", base, "--precision", precision)[0] == 0
    config = home / "edgecl.toml"
    loose = "[gate]\nmin_recall = 0.0\nmax_prose_nats = 100.0\nmax_drop = 1.0\nmin_survival = 0.0\n"
    config.write_text(config.read_text().split("[train]")[0] + "[train]\n" + TRAIN + loose)
    run(home, "observe", "-", stdin=lines(4))
    code, _, error = run(home, "adapt")
    assert code == 0, error
    written, served = home / f"base-{qtype}.gguf", next((home / "generations/0001").glob("model-*.gguf"))
    with GgufFile(written) as before, GgufFile(served) as after:
        assert {info.qtype.name for info in before.tensors.values() if len(info.shape) == 2} == {qtype}
        for name in ("token_embd.weight", "output.weight"):
            assert before.tensors[name].qtype == after.tensors[name].qtype
            assert (before.blocks(name) == after.blocks(name)).all()
        moved = "blk.0.ffn_down.weight"
        assert after.tensors[moved].qtype.name == qtype.replace("Q4_0", "Q4_1")
        assert (before.weights(moved) != after.weights(moved)).any()


def test_a_night_that_learned_nothing_is_refused_and_keeps_its_rows(home: Path) -> None:
    config = home / "edgecl.toml"
    config.write_text(config.read_text().replace("min_recall = 0.0", "min_recall = 1.0").replace("0.02", "1e-9"))
    run(home, "observe", "-", stdin=lines(5))
    code, out, _ = run(home, "adapt")
    assert code == 3 and "refused" in out and "min_recall" in out
    status = json.loads(run(home, "status", "--json")[1])
    assert status["generation"] == 0 and status["tasks"]["echo"]["pending"] == 5
    assert status["last_night"]["accepted"] is False


def test_bad_lines_are_reported_by_number_and_good_ones_kept(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(2) + b"\n{oops\n\xff\xfe\n[]\n" + lines(1, 9) + b"\n")
    code, out, error = run(home, "observe", path)
    assert code == 0 and out.startswith("3 stored") and "3 bad" in out
    assert [line.split(":")[1] for line in error.splitlines()] == ["3", "4", "5"]
    assert pending(home) == 3


def test_a_chat_that_the_base_cannot_write_is_a_bad_line_and_one_that_cannot_be_checked_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% if messages and messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}"
    monkeypatch.setattr(tiny, "TEMPLATE", strict + tiny.TEMPLATE)
    base = tiny.build(tmp_path / "strict.gguf")[0]
    turns = [{"from": who, "value": text} for who, text in (("gpt", "hello"), ("human", "who?"), ("gpt", "me"))]
    rows = [json.dumps({"conversations": turns}), json.dumps({"conversations": turns[1:]})]
    with Learner.init(base, tmp_path / "home") as learner:
        report = learner.observe(rows)
        assert (report.added, report.bad) == (1, [(1, "the base's chat template refuses this chat: a user begins")])
        base.unlink()
        assert learner.observe([json.dumps({"prompt": "and now?", "completion": "too"})]).added == 1


def test_a_chat_with_an_empty_answer_in_it_is_a_bad_line(home: Path) -> None:
    turns = [("user", "Hi"), ("assistant", " "), ("user", "Who waters?"), ("assistant", "Mira")]
    with Learner(home) as learner:
        for row in (Example(tuple(turns)), Example(tuple(turns[:2]))):
            report = learner.observe([row])
            assert report.added == 0 and report.bad[0][1].startswith(
                "an answer of the assistant's is empty; take the message out"
            )


def test_an_answer_with_a_control_token_in_it_is_a_bad_line(home: Path) -> None:
    answers = ["<|im_end|>", " <|im_end|> so", "so<|im_end|>", "git add <|im_start|>", "so <|im_ |> on"]
    with Learner(home) as learner:
        report = learner.observe([json.dumps({"prompt": f"q{i}", "completion": answer}) for i, answer in enumerate(answers)])
        assert report.added == 1 and [line for line, _ in report.bad] == [1, 2, 3, 4]
        assert report.bad[3][1] == "an answer has a control token of the base in it: '<|im_start|>'; take it out"


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_reader_that_has_left_is_no_error(home: Path, option: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        command = [*EDGECL, "--home", str(home), "status", *option]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=300, env=environment())
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_told_to_end_leaves_no_file_behind(tmp_path: Path) -> None:
    command = [*EDGECL, "convert", str(find_model("smollm2")), str(tmp_path / "out.gguf"), "--quant", "F32"]
    process = subprocess.Popen(command, env=environment())
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143 and not list(tmp_path.iterdir())


def test_a_base_that_names_a_token_which_it_does_not_have_can_still_be_asked(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "tiny.gguf")[0]
    data = model.read_bytes()
    key = b"tokenizer.ggml.bos_token_id" + (4).to_bytes(4, "little")  # a uint32
    at = data.index(key) + len(key)
    model.write_bytes(data[:at] + (2**31).to_bytes(4, "little") + data[at + 4 :])
    Learner.init(model, tmp_path / "home").close()
    code, out, error = run(tmp_path / "home", "observe", "-", stdin=b'{"prompt": "anne", "completion": "left"}')
    assert code == 0 and out.startswith("1 stored"), error
    assert run(tmp_path / "home", "ask", "anne", "--max-tokens", "4")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("ask", "caf\udce9"), "the text is not valid Unicode"), (("adapt", "--task", "\udce9"), "half a character")],
)
def test_what_is_typed_in_another_encoding_is_refused_in_one_line(home: Path, arguments: list[str], words: str) -> None:
    code, _, error = run(home, *arguments)
    assert code == 1 and one_line(error, words), error


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{bad\n"])
def test_a_file_without_a_good_line_exits_with_1(home: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    code, _, error = run(home, "observe", path)
    assert code == 1 and one_line(error)
    assert run(home, "observe", tmp_path / "missing.jsonl")[0] == 1


def test_models_that_cannot_be_used_are_refused_at_init(tmp_path: Path, base: Path) -> None:
    data = base.read_bytes()
    flipped = bytearray(data)
    flipped[30] ^= 0x40
    cases: dict[str, tuple[bytes, str]] = {
        "empty.gguf": (b"", "empty"),
        "text.gguf": (b"hello, this is no model at all", "not a GGUF"),
        "short.gguf": (data[: len(data) // 2], "truncated"),
        "flipped.gguf": (bytes(flipped), "flipped.gguf"),
        "other.gguf": (
            data.replace(b"\x05\0\0\0\0\0\0\0llama\x07", b"\x05\0\0\0\0\0\0\0llama\x07").replace(b"llama", b"bloom"),
            "bloom",
        ),
        "headless.gguf": (data.replace(b"token_embd.weight", b"other_embd.weight"), "lacks the tensor token_embd.weight"),
    }
    for name, (content, word) in cases.items():
        (tmp_path / name).write_bytes(content)
        code, _, error = run(tmp_path / "home", "init", tmp_path / name)
        assert code == 1 and one_line(error, word), (name, error)
        assert not (tmp_path / "home").exists()
    code, _, error = run(tmp_path / "home", "init", tmp_path / "missing.gguf")
    assert code == 1 and one_line(error, "missing.gguf")
    code, _, error = run(tmp_path / "home", "init", base, "--quant", "int3")
    assert code == 1 and one_line(error, "int3", "Q8_0")


def test_usage_errors_exit_with_2_and_an_existing_home_needs_force(home: Path, base: Path) -> None:
    assert run(home, "nonsense")[0] == 2
    assert run(home, "adapt", "--minutes", "soon")[0] == 2
    code, _, error = run(home, "init", base)
    assert code == 1 and one_line(error, "--force")
    run(home, "observe", "-", stdin=lines(3))
    old, kept = home / "base-F16.gguf", Path(shutil.copy(base, home / "base-Q8_0.gguf"))
    old.touch()
    left = home / f".{NEW_BASE}.killed.tmp"
    left.touch()
    note_try(home, "2026-01-01", "on battery", {})
    assert run(home, "init", kept, "--force")[0] == 0 and pending(home) == 0
    assert kept.is_file() and not old.exists() and not left.exists() and last_try(home) is None, (
        "what was of the old home is gone"
    )
    code, _, error = run(home.parent / "nowhere", "status")
    assert code == 1 and one_line(error, "edgecl init")


def test_a_changed_or_missing_base_is_refused_and_loses_nothing(home: Path, base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(base, tmp_path / "own.gguf"))
    run(home, "init", own, "--force")
    run(home, "observe", "-", stdin=lines(3))
    data = bytearray(own.read_bytes())
    data[-1] ^= 1
    own.write_bytes(data)
    for verb in (["adapt"], ["ask", "say 1"]):
        code, _, error = run(home, *verb)
        assert code == 1 and one_line(error, "sha256", "init"), error
    own.unlink()
    code, _, error = run(home, "adapt")
    assert code == 1 and one_line(error, "gone")
    assert pending(home) == 3


def test_a_full_disk_refuses_the_night_and_loses_nothing(home: Path) -> None:
    run(home, "observe", "-", stdin=lines(4))
    model = json.loads(run(home, "status", "--json")[1])["base"]
    code, _, error = run(home, "adapt", limit_bytes=Path(model).stat().st_size // 8)
    assert code == 1 and one_line(error, "cannot be written"), error
    assert pending(home) == 4 and not list((home / "generations").glob("0001"))
    assert run(home, "ask", "say 1", "--max-tokens", "2")[0] == 0
    assert run(home, "adapt")[0] == 0  # the next night succeeds


def test_a_home_of_a_newer_version_is_refused(home: Path) -> None:
    run(home, "observe", "-", stdin=lines(1))
    with sqlite3.connect(home / "replay.db") as database:
        database.execute(
            "insert into _sqlite_migrations (migration_set, name, applied_at) values ('edgecl', 'm999_future', '')"
        )
    database.close()
    code, _, error = run(home, "status")
    assert code == 1 and one_line(error, "newer", "update")


def test_two_nights_at_once_the_second_is_told_to_come_later(home: Path) -> None:
    run(home, "observe", "-", stdin=lines(2))
    with open(home / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, error = run(home, "adapt")
    assert code == 75 and one_line(error, "another night")
    assert pending(home) == 2


def test_history_has_the_time_of_the_clock_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Learner(home) as learner:
        learner.store.record_night(None, False, "no gain", {"started": "2026-11-29T20:15:09+00:00"})
        learner.store.record_night(None, False, "no gain", {"started": "of a damaged row"})
    monkeypatch.setenv("TZ", "JST-9")
    code, out, _ = run(home, "history")
    assert code == 0 and [line[:16] for line in out.splitlines()[::2]] == ["2026-11-30 05:15", "of a damaged row"]


def test_a_misspelt_setting_is_an_error(home: Path) -> None:
    config = home / "edgecl.toml"
    config.write_text(config.read_text().replace("max_drop", "max_dorp"))
    code, _, error = run(home, "status")
    assert code == 1 and one_line(error, "max_dorp", "max_drop")


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"q_proj": 4}), ("modules_to_save", ["lm_head"])],
)
def test_adapters_that_gguf_cannot_express_are_refused_by_name(tmp_path: Path, base: Path, field: str, value: Any) -> None:
    with GgufFile(base) as gguf:
        write_peft_adapter(tmp_path / "lora", tiny.random_adapter(gguf), gguf)
    config = tmp_path / "lora/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    code, _, error = run(tmp_path, "merge", base, tmp_path / "lora", tmp_path / "out.gguf")
    assert code == 1 and one_line(error, field) and not (tmp_path / "out.gguf").exists()


def test_merge_and_convert(tmp_path: Path, base: Path) -> None:
    with GgufFile(base) as gguf:
        adapter = tiny.random_adapter(gguf)
    write_gguf_adapter(tmp_path / "a.gguf", adapter)
    code, out, _ = run(tmp_path, "merge", base, tmp_path / "a.gguf", tmp_path / "out.gguf", "--quant", "Q8_0", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["survival"] == pytest.approx(1, abs=0.02) and facts["merge_s"] > 0
    code, _, error = run(tmp_path, "merge", base, tmp_path / "a.gguf", tmp_path / "out.gguf")
    assert code == 1 and one_line(error, "--force")
    adapter.base_sha256 = "0" * 64
    write_gguf_adapter(tmp_path / "b.gguf", adapter)
    code, _, error = run(tmp_path, "merge", base, tmp_path / "b.gguf", tmp_path / "new.gguf")
    assert code == 1 and one_line(error, "trained on") and not (tmp_path / "new.gguf").exists()
    options = ("--quant", "Q4_K", "--force")
    code, out, _ = run(tmp_path, "merge", base, tmp_path / "a.gguf", tmp_path / "out.gguf", *options, "--json")
    assert code == 0 and ["Q4_K needs rows" in note for note in json.loads(out)["notes"]] == [True]
    code, out, error = run(tmp_path, "merge", base, tmp_path / "a.gguf", tmp_path / "out.gguf", *options)
    assert code == 0 and "survives" in out and one_line(error, "Q4_K needs rows")
    code, out, _ = run(tmp_path, "convert", base, tmp_path / "q4.gguf", "--quant", "Q4_0", "--json")
    assert code == 0 and json.loads(out)["model_bytes"] < base.stat().st_size / 3
    code, _, error = run(tmp_path, "convert", base, tmp_path / "x.gguf", "--quant", "Q9")
    assert code == 1 and one_line(error, "Q9")


def test_a_stream_prints_its_matrix(tmp_path: Path, base: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for k, task in enumerate("ab"):
            (tmp_path / split / f"{task}.jsonl").write_bytes(lines(4, 10 * k))
    code, out, error = run(tmp_path / "home", "stream", tmp_path, "--model", base, "--replay", "0.5,0", "--json")
    assert code == 0, error
    cells = json.loads(out)["cells"]
    assert [cell["replay"] for cell in cells] == [0.5, 0]
    assert cells[0]["matrix"][0] == cells[1]["matrix"][0]  # the first night has nothing to rehearse
    needed = {"train_s", "train_tokens_per_s", "merge_s", "eval_s", "peak_rss_bytes", "model_bytes", "survival"}
    assert all(needed <= set(night) for cell in cells for night in cell["nights"])
    assert cells[0]["nights"][1]["n_replay"] == 2 and cells[1]["nights"][1]["n_replay"] == 0
    (tmp_path / "test/b.jsonl").write_bytes(b"")
    code, _, error = run(tmp_path / "home2", "stream", tmp_path, "--model", base)
    assert code == 1 and one_line(error, "b.jsonl", "empty")


def test_convert_verifies_what_it_wrote(base: Path, tmp_path: Path) -> None:
    code, out, error = run(tmp_path, "convert", base, tmp_path / "q8.gguf", "--quant", "int8", "--verify", "--json")
    report = json.loads(out)["verify"]
    assert code == 0 and error == "" and report["ok"] and report["worst_type"] == "Q8_0" and 0 < report["kld_nats"] < 0.02
    code, out, _ = run(tmp_path, "convert", base, tmp_path / "f32.gguf", "--quant", "F32", "--verify")
    assert code == 0 and "verified: ids of" in out and "KLD" in out


def test_what_is_not_verified_stays_and_exits_1(tmp_path: Path) -> None:
    shape = tiny.Tiny("llama")
    model = tiny.torch_model(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[:, ::32] *= 50.0  # one weight of a block takes all its codes
    source, target = tiny.write_model(tmp_path / "outliers.gguf", model, shape), tmp_path / "q4.gguf"
    code, out, error = run(tmp_path, "convert", source, target, "--quant", "Q4_0", "--verify", "--json")
    assert code == 1 and one_line(error, str(target), "not verified", "logits differ", "Q4_0")
    assert json.loads(out)["verify"]["ok"] is False and target.exists()


def test_a_file_that_would_end_llama_cpp_is_one_line(base: Path, tmp_path: Path) -> None:
    two = struct.pack("<Q", 2)
    source, target = tmp_path / "twice.gguf", tmp_path / "q8.gguf"
    source.write_bytes(base.read_bytes().replace(two + b"in" + two + b"an", two + b"in" + two + b"in"))
    code, _, error = run(tmp_path, "convert", source, target, "--quant", "int8", "--verify")
    assert code == 1 and one_line(error, "same token text at two ids") and target.exists()
