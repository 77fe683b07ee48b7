"""What may happen at once in one learner: a turn and a night side by side, but never two turns, and nothing in a closed one.

A turn holds its lock from the first token to the last, so that no generation is swapped and no model freed under it. A night
holds none that a turn waits for: its models live in child processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import EdgeclError


class Turns:
    """The locks of one learner; the thread that holds one may take it again."""

    def __init__(self) -> None:
        """Begin open."""
        self._turn, self._night = threading.RLock(), threading.RLock()
        self._is_closed = False

    def _check_open(self) -> None:
        if self._is_closed:
            raise EdgeclError("this learner is closed; open another")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold a turn, once those before it have ended.

        Raises:
            EdgeclError: the learner is closed.
        """
        with self._turn:
            self._check_open()
            yield

    @contextmanager
    def night(self, stop: Callable[[], str]) -> Iterator[Callable[[], str]]:
        """Hold a night; yield what tells why it must yield, which the closing of the learner is a reason for too.

        Raises:
            EdgeclError: the learner is closed.
        """
        with self._night:
            self._check_open()
            yield lambda: "the learner was closed" if self._is_closed else stop()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let nothing begin any more, and wait for the night to stop and for the turn to end."""
        self._is_closed = True
        with self._night:
            pass  # held one after the other: who waits for a night within a turn is told that the learner is closed
        with self._turn:
            yield
