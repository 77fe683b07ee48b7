"""The rows that a stream learns and is tested on, task by task: read from a folder, limited, joined, and told apart."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from .data import Example, parse_lines
from .errors import DataError
from .measure import record_of


@dataclass(frozen=True)
class Stream:
    """The tasks of a stream, in order, each with its rows."""

    tasks: tuple[str, ...]
    train: dict[str, list[Example]]
    test: dict[str, list[Example]]

    @classmethod
    def read(cls, folder: Path, order: Sequence[str] = (), train_limit: int = 0, test_limit: int = 0, seed: int = 0) -> Stream:
        """Read a stream; limits take a sample drawn with `seed` (0: all rows).

        Raises:
            DataError: a file is missing, empty or malformed.
        """
        tasks = tuple(order) or tuple(_order(folder))
        if not tasks:
            raise DataError(f"{folder}: no tasks; expected train/TASK.jsonl and test/TASK.jsonl")
        if len(set(tasks)) != len(tasks):
            raise DataError(f"order names a task twice: {', '.join(tasks)}")
        train = {t: _rows(folder / "train" / f"{t}.jsonl", t, train_limit, seed) for t in tasks}
        test = {t: _rows(folder / "test" / f"{t}.jsonl", t, test_limit, seed) for t in tasks}
        return cls(tasks, train, test)

    def joined(self) -> Stream:
        """Return the same rows as one task."""
        train, test = ([row for task in self.tasks for row in rows[task]] for rows in (self.train, self.test))
        return Stream(("all",), {"all": train}, {"all": test})

    def digest(self) -> str:
        """Return a digest of the rows in their order, each with what judges its answer."""
        rows = [[task, *map(record_of, split[task])] for split in (self.train, self.test) for task in self.tasks]
        return sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _order(folder: Path) -> list[str]:
    path = folder / "order.json"
    if not path.is_file():
        return sorted(p.stem for p in (folder / "train").glob("*.jsonl"))
    try:
        order = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    if not isinstance(order, list) or not all(isinstance(t, str) and Path(t).name == t for t in order):
        raise DataError(f"{path}: must be a list of task names, got {str(order)[:60]}")
    return order


def _rows(path: Path, task: str, limit: int, seed: int) -> list[Example]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    rows, bad = parse_lines(lines, task, path.name)
    if bad:
        raise DataError(f"{path}: line {bad[0][0]} {bad[0][1]}")
    if not rows:
        raise DataError(f"{path}: is empty; expected JSONL chats")
    return random.Random(seed).sample(rows, limit) if 0 < limit < len(rows) else rows
