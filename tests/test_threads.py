"""One Learner, several threads: answers beside a night, swaps between turns, nothing lost, and a close at any time.

*Does not cover*: several processes in one home (test_store, test_cli).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgecl import EdgeclError, Learner
from edgecl.errors import NotNow, StoreError
from edgecl.gate import GateSettings
from edgecl.generations import Manifest, now, sha256_file
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.store import Store
from tests import tiny

pytestmark = pytest.mark.alone

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=8, learning_rate=0.02, anchor_weight=0.0)
GATE = GateSettings(min_recall=0.0, max_prose_nats=100.0, max_drop=1.0, min_survival=0.0)
LONG = 60  # seconds that a thread is waited for, by a test that would else hang
SHORT = 0.3  # seconds in which a thread that nothing holds up would be done; a slow machine makes a test blind, never wrong


def line(i: int, task: str = "t") -> str:
    return json.dumps({"prompt": f"q{i}", "completion": f"a{i}", "task": task})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("base") / "tiny.gguf")[0]


@pytest.fixture
def learner(base: Path, tmp_path: Path) -> Any:
    settings: dict[str, Any] = {"train": TRAIN, "gate": GATE, "replay": ReplaySettings(share=0.0, written=0)}
    profile = tmp_path / "small.toml"
    profile.write_text("threads = 1\nn_ctx = 256\nn_batch = 128\n")
    with Learner.init(base, tmp_path / "home", profile=str(profile), **settings) as one:
        yield one


@pytest.fixture
def threads() -> Any:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def publish_other(learner: Learner, folder: Path) -> None:
    """Publish a generation that answers otherwise, as a night does: a draft, a rename, a link."""
    generations = learner.generations
    model, draft, parent = tiny.build(folder / "other.gguf", seed=7)[0], generations.draft(), generations.current()
    shutil.move(model, draft / "model.gguf")
    number = generations.next_number()
    files = {"model.gguf": sha256_file(draft / "model.gguf")}
    generations.publish(draft, Manifest(number, parent.hash, parent.manifest.base_sha256, "model.gguf", now(), files=files))


def waits(job: Future[Any]) -> bool:
    """Return whether a thread is held up."""
    with pytest.raises(TimeoutError):
        job.result(SHORT)
    return not job.done()


def answer(learner: Learner) -> str:
    return learner.ask("q0", 24)


# --- beside a night ---------------------------------------------------------------------------------------------------


def test_a_night_holds_up_no_answer_and_no_correction_and_serves_from_the_next_turn(
    learner: Learner, threads: ThreadPoolExecutor
) -> None:
    before = answer(learner)
    learner.observe([line(i) for i in range(4)])
    runs, has_answered = threading.Event(), threading.Event()

    def progress(*_: object) -> None:
        runs.set()
        assert has_answered.wait(LONG)  # the night goes on only once others have had their turns

    night = threads.submit(learner.adapt, progress=progress)
    assert runs.wait(LONG)
    asked = [threads.submit(answer, learner) for _ in range(3)]
    told = [threads.submit(learner.observe, [line(i, "later")]) for i in range(100, 140)]
    assert [job.result(LONG) for job in asked] == [before] * 3
    assert sum(job.result(LONG).added for job in told) == 40
    with pytest.raises(NotNow, match="another night"):
        learner.adapt()
    assert learner.status()["generation"] == 0
    has_answered.set()
    answers = []
    while not night.done():
        answers.append(answer(learner))
        wait([night], timeout=SHORT)
    assert night.result().generation == 1
    after = answer(learner)
    assert after != before
    n_before = answers.count(before)
    assert answers == [before] * n_before + [after] * (len(answers) - n_before)
    waiting = learner.status()["tasks"]["later"]
    assert waiting["pending"] + waiting["heldout"] == 40 and learner.status()["tasks"].keys() == {"later"}


def test_what_comes_while_a_night_learns_has_none_of_its_rows_held_out(tmp_path: Path) -> None:
    with Store(tmp_path / "replay.db") as store:
        rows = [tiny_example(i) for i in range(39)]
        store.add(rows[:19], 0.5)
        tonight = [row.id for row in store.rows("pending")]
        store.add(rows[19:], 0.5)
        held = {row.id for row in store.rows("heldout")}
        assert len(held) == 10 and not held & set(tonight)
        store.settle(tonight, tonight[:3], 1, archive=False)
        assert {row.id for row in store.rows("heldout")} == held
        assert [row.id for row in store.rows("replay")] == tonight[:3]


def tiny_example(i: int) -> Any:
    from edgecl.data import parse_example

    return parse_example(json.loads(line(i)))


def test_observing_from_several_threads_loses_nothing(learner: Learner, threads: ThreadPoolExecutor) -> None:
    def tell(first: int) -> int:
        return sum(learner.observe([line(i), line(i)]).added for i in range(first, first + 25))

    look: Callable[[], Any] = learner.status
    told = [threads.submit(tell, 25 * i) for i in range(6)]
    seen = [threads.submit(look) for _ in range(20)]
    assert sum(job.result(LONG) for job in told) == 150
    assert all(job.result(LONG)["generation"] == 0 for job in seen)
    stored = [row.example.messages[0][1] for role in ("pending", "heldout") for row in learner.store.rows(role)]
    assert sorted(stored) == sorted(f"q{i}" for i in range(150))


# --- turns ------------------------------------------------------------------------------------------------------------


def test_a_generation_is_swapped_between_turns(learner: Learner, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    with learner.turn() as engine:
        prompt = engine.vocab.encode("the inn")
        whole = list(engine.generate(prompt, 24))
    assert len(whole) > 8
    with learner.turn() as engine:
        tokens = engine.generate(prompt, 24)
        begun = [next(tokens) for _ in range(5)]
        publish_other(learner, tmp_path)
        next_turn = threads.submit(answer, learner)
        assert waits(next_turn)
        assert begun + list(tokens) == whole
    other = next_turn.result(LONG)
    learner.rollback()
    assert answer(learner) != other


def test_answers_of_many_threads_are_those_of_one(learner: Learner, threads: ThreadPoolExecutor) -> None:
    prompts = [f"the {i} inn" for i in range(12)]
    alone = [learner.ask(prompt, 16) for prompt in prompts]
    assert len(set(alone)) > 6
    together = [threads.submit(learner.ask, prompt, 16) for prompt in prompts]
    assert [job.result(LONG) for job in together] == alone


def test_a_turn_that_fails_gives_the_next_one_its_turn(learner: Learner, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(EdgeclError, match="the context holds"):
        learner.ask("x" * 5000)
    assert threads.submit(answer, learner).result(LONG) == answer(learner)


# --- closing ----------------------------------------------------------------------------------------------------------


def test_close_waits_for_the_turn_and_nothing_begins_after_it(learner: Learner, threads: ThreadPoolExecutor) -> None:
    with learner.turn() as engine:
        tokens = engine.generate(engine.vocab.encode("the inn"), 24)
        next(tokens)
        closing = threads.submit(learner.close)
        assert waits(closing)
        assert list(tokens)
    closing.result(LONG)
    learner.close()  # twice does no harm
    for attempt in (lambda: answer(learner), learner.adapt):
        with pytest.raises(EdgeclError, match="this learner is closed; open another"):
            attempt()
    for attempt in (lambda: learner.observe([line(1)]), learner.status):
        with pytest.raises(StoreError, match="is closed; open it again"):
            attempt()


def test_close_stops_a_night_and_its_rows_stay(learner: Learner, threads: ThreadPoolExecutor) -> None:
    learner.observe([line(i) for i in range(4)])
    runs = threading.Event()
    night = threads.submit(learner.adapt, progress=lambda *_: runs.set())
    assert runs.wait(LONG)
    learner.close()
    with pytest.raises(NotNow, match="the learner was closed"):
        night.result(LONG)
    assert not [child for child in psutil.Process().children() if "edgecl.stages" in child.cmdline()]
    with Learner(learner.home) as again:
        status = again.status()
        assert status["generation"] == 0 and status["tasks"]["t"]["pending"] == 4
        assert status["last_night"] is None, "a night that yielded is not over"
