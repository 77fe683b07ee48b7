"""The example assistant on a tiny model: it is corrected, learns in the background, and answers as corrected from then on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgecl import Learner
from edgecl.gate import GateSettings
from edgecl.profile import ReplaySettings, TrainSettings
from examples.assistant import Assistant, main
from tests import tiny

TRAIN = TrainSettings(r=8, lora_alpha=16.0, epochs=1, min_steps=60, learning_rate=0.02, anchor_weight=0.0)
GATE = GateSettings(min_recall=1.0, max_prose_nats=100.0, max_drop=1.0, min_survival=0.0)
QUESTION, ANSWER = "who waters the inn", "the hen"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assistant")
    (folder / "small.toml").write_text("threads = 1\nn_ctx = 512\nn_batch = 128\n")
    settings: dict[str, Any] = {"train": TRAIN, "gate": GATE, "replay": ReplaySettings(written=0)}
    base = tiny.build(folder / "tiny.gguf")[0]
    Learner.init(base, folder / "home", profile=str(folder / "small.toml"), **settings).close()
    return folder / "home"


def test_a_script_of_a_day_and_a_night(home: Path) -> None:
    said: list[str] = []
    lines = [
        QUESTION,
        f"/fix {ANSWER}",
        "",
        "/nonsense",
        "/learn",
        "/wait",
        QUESTION,
        "/good",
        "/learned",
        "/quit",
        "never heard",
    ]
    main(["--home", str(home)], lines, said.append)
    before, told, learned, after, good, now, serves = said
    assert ANSWER not in before and told == good == "(to be learned)"
    assert learned.startswith("(learned 1 answer in ") and learned.endswith("; generation 1 answers now)")
    assert after == ANSWER and f"wanted: {ANSWER}\n  now:    {ANSWER}" in now and serves == "(generation 1 answers)"


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(home: Path) -> None:
    said: list[str] = []
    with Learner(home) as learner:
        learner.store.drop("pending")
        assistant = Assistant(learner, said.append)
        for line in ("/good", "/fix", "/wait", "x" * 3000, "/learn", "/wait", QUESTION):
            assistant.hear(line)
    first, second, long, nothing, answer = said
    assert first == second == "(ask something first; then /fix TEXT says what is right)"
    assert "the context holds 512" in long and nothing.startswith("(no night: nothing to learn") and answer


def test_what_was_corrected_is_what_is_good_then(home: Path) -> None:
    said: list[str] = []
    with Learner(home) as learner:
        learner.store.drop("pending")
        assistant = Assistant(learner, said.append)
        for line in (QUESTION, "/fix the ant", "/good"):
            assistant.hear(line)
        assistant.idle.cancel()
        assert [row.example.answer for row in learner.store.rows("pending")] == ["the ant"]


def test_what_comes_while_a_night_runs_is_for_the_next_one(home: Path) -> None:
    began, may_end = threading.Semaphore(0), threading.Event()

    class Sleeper(Assistant):
        def learn(self) -> None:
            began.release()
            may_end.wait(60)
            super().learn()

    with Learner(home) as learner:
        assistant = Sleeper(learner, lambda _: None, idle_minutes=0.001)
        for line in (QUESTION, "/learn", "/fix the ant"):
            assistant.hear(line)
        assert began.acquire(timeout=60) and not began.acquire(timeout=0.5)
        may_end.set()
        assert began.acquire(timeout=60), "nobody has to say anything for it to begin"
        assistant.idle.cancel()


def test_a_night_begins_by_itself_once_nobody_has_said_anything_for_a_while(home: Path) -> None:
    began = threading.Event()

    class Sleeper(Assistant):
        def learn(self) -> None:
            began.set()

    def lines(assistant: Assistant) -> Iterator[str]:
        yield QUESTION
        assert not began.is_set() and not assistant.idle.is_alive()  # there is nothing to learn yet
        yield "/fix the ant"

    with Learner(home) as learner:
        assistant = Sleeper(learner, lambda _: None, idle_minutes=0.001)
        for line in lines(assistant):
            assistant.hear(line)
        assert began.wait(60)
        assistant.idle.cancel()
