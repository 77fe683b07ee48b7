"""A night that gives way to a chat: what its child processes are told, and the measurement of what that brings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from parrot import make_home

from edgecl import Learner, beside
from edgecl.child import Limits, run_stage
from edgecl.errors import EdgeclError

pytestmark = pytest.mark.alone

PLENTY = Limits(ram_bytes=4_000_000_000, seconds=120)


class _Seen(Exception):
    pass


def look_at_training(learner: Learner, folder: Path, limits: Limits) -> tuple[set[int], dict[str, str]]:
    """Return how the threads of a training child are scheduled after its first step, and its environment."""
    seen: list[Any] = []

    def look(*_: object) -> None:
        (child,) = (child for child in psutil.Process().children() if "edgecl.stages" in child.cmdline())
        threads = [thread.id for thread in child.threads()]
        seen.extend([{os.sched_getscheduler(thread) for thread in threads}, child.environ(), len(threads)])
        raise _Seen

    with pytest.raises(_Seen):
        run_stage("train", beside._request(learner, str(folder)), limits, look)
    assert seen[2] > 1  # of OpenMP or BLAS, started after the child was told
    return seen[0], seen[1]


def test_every_thread_of_a_nice_child_gives_way_and_waits_without_much_spinning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with Learner(make_home(tmp_path, "yes")) as learner:
        policies, environment = look_at_training(learner, tmp_path, Limits(4_000_000_000, 120, nice=3, threads=2))
        assert policies == {os.SCHED_IDLE}
        assert environment["OMP_WAIT_POLICY"] == "passive" and environment["GOMP_SPINCOUNT"] == "10000"
        policies, environment = look_at_training(learner, tmp_path, Limits(4_000_000_000, 120, threads=2))
        assert policies == {os.sched_getscheduler(0)} and "OMP_WAIT_POLICY" not in environment


def test_a_chat_is_timed_beside_a_training_child_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "PAUSE_S", 0.0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    children: list[int] = []
    first_tokens = beside._first_tokens_s

    def watched(*arguments: Any) -> list[float]:
        children.append(sum("train" in child.cmdline() for child in psutil.Process().children()))
        return first_tokens(*arguments)

    monkeypatch.setattr(beside, "_first_tokens_s", watched)
    with Learner(make_home(tmp_path, "yes")) as learner:
        facts = beside.ttft_beside_training(learner, n_turns=2)
        assert children == [0, 1]
        assert set(facts) == {"ttft_idle_ms", "ttft_learning_ms", "ratio", "n_turns"} and min(facts.values()) > 0
        assert learner.generations.numbers() == [0] and learner.store.counts() == {} and learner.history() == []
    assert not list(scratch.iterdir()) and not (tmp_path / "home/runs").exists()


def test_training_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Learner(make_home(tmp_path, "yes")) as learner:
        monkeypatch.setattr(beside, "_request", lambda *_: {})
        with pytest.raises(EdgeclError, match="train: the process ended with exit code 1"), beside._training(learner):
            pytest.fail("there is no training")
