"""Chatting while a night trains: how long a turn's first token takes, idle and beside a training child.

The child is a night's own, with its niceness and threads, on a few rows made up here; what it writes goes to a temporary folder
and is thrown away. *Does not cover*: a night in another control group than the chat's (see `child`).
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from .chat import Chat
from .child import run_stage
from .data import Example
from .errors import EdgeclError
from .learner import Learner
from .measure import record_of

N_TURNS = 9
PAUSE_S = 0.5  # between turns: a person reads, and the training child takes the cores back
ENDLESS = 10_000  # steps; the child is ended long before
MINUTES = 1e6  # that the planner is told, so that it trains as many layers as a night does


class _Stopped(Exception):
    """Ends the training child from within its progress."""


def ttft_beside_training(learner: Learner, n_turns: int = N_TURNS) -> dict[str, float]:
    """Return the median time to the first token of chat turns in ms, idle and while a night's child trains, and their ratio.

    Raises:
        EdgeclError: the model cannot be loaded, or training failed.
    """
    idle = _first_tokens_s(learner, n_turns)
    with _training(learner):
        learning = _first_tokens_s(learner, n_turns)
    return {
        "ttft_idle_ms": 1e3 * median(idle),
        "ttft_learning_ms": 1e3 * median(learning),
        "ratio": median(learning) / median(idle),
        "n_turns": n_turns,
    }


def _first_tokens_s(learner: Learner, n_turns: int) -> list[float]:
    """Time the first token of turns of one chat, after one that warms up."""
    chat, times = Chat(learner), []
    for i in range(n_turns + 1):
        began = time.perf_counter()
        answer = chat.turn(
            f"This is note {i} of today. The plants by the window want water on Friday; who could give it to them?"
        )
        next(answer, None)
        times.append(time.perf_counter() - began)
        answer.close()
        time.sleep(PAUSE_S)
    return times[1:]


@contextmanager
def _training(learner: Learner) -> Iterator[None]:
    """Have a night's child train, from its first steps on until the end of the block."""
    is_training, is_over = threading.Event(), threading.Event()
    failures: list[Exception] = []

    def look(*_: object) -> None:
        is_training.set()
        if is_over.is_set():
            raise _Stopped

    def run() -> None:
        limits = replace(learner.limits(), nice=learner.profile.nice, seconds=3600.0)
        try:
            with tempfile.TemporaryDirectory(prefix="edgecl-bench-") as folder:
                run_stage("train", _request(learner, folder), limits, look)
            failures.append(EdgeclError("training came to its end before the chat was measured; run it again"))
        except _Stopped:
            pass
        except (EdgeclError, OSError) as error:
            failures.append(error)
        finally:
            is_training.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        is_training.wait()
        if not failures:
            yield
    finally:
        is_over.set()
        thread.join()
    if failures:
        raise failures[0]


def _request(learner: Learner, folder: str) -> dict[str, Any]:
    """Return what a night asks its training child for, with made-up rows and no end."""
    rows = [Example((("user", f"What is in box {i} of the cellar?"), ("assistant", f"{i} jars of plums."))) for i in range(32)]
    return {
        "base": learner.settings.base,
        "base_sha256": learner.generations.load(0).manifest.base_sha256,
        "start": None,
        "new": [record_of(row) for row in rows],
        "replay": [],
        "written": [],
        "reworded": [],
        "heldout": [],
        "quant": "Q8_0",
        "settings": asdict(replace(learner.settings.train, min_steps=ENDLESS)),
        "limits": asdict(replace(learner.profile, minutes=MINUTES)),
        "runs": folder,
        "adapter_gguf": f"{folder}/adapter.gguf",
        "asker_gguf": None,
    }
