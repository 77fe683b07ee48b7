"""A continual-learning stream: one night a task, every task measured after every night, on the file that is served.

DIR/train/T.jsonl, DIR/test/T.jsonl, the order from DIR/order.json or the names. Lists of quants, replay shares and seeds
run as a grid, cell by cell; a finished cell is a JSON file in the home, and is not run again. No task label is shown.
Test rows are scored on tasks learned so far and on the one that comes next (for forward transfer).
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_convert import GgufFile, resolve_quant, write_atomic

from .child import Progress, run_stage
from .data import Example, parse_lines
from .errors import DataError
from .generations import Generation, unpublished
from .learner import Learner, translated
from .measure import Meter
from .metrics import (
    FloatArray,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    paired_interval,
    stream_intervals,
)
from .places import find_model
from .profile import ReplaySettings, TrainSettings
from .store import Scored


@dataclass(frozen=True)
class Cell:
    """One run of a stream.

    Attributes:
        quant: what is served.
        replay: share of each night's rows that may be kept; written: rows that the model writes each night, for rehearsal too.
        precision: of the base; "": its own.
        joint: whether all tasks are learned in one night: the ceiling of what nights can reach.
    """

    quant: str = "int8"
    replay: float = 0.1
    seed: int = 0
    precision: str = ""
    written: int = ReplaySettings.written
    joint: bool = False

    @property
    def name(self) -> str:
        """File name of its result."""
        what = f"base-{self.precision}" if self.precision else self.quant
        joint = "-joint" if self.joint else ""
        return f"{what}{joint}-replay{self.replay:g}-written{self.written}-seed{self.seed}"


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


def run_stream(
    stream: Stream,
    cells: Sequence[Cell],
    *,
    model: str = "smollm2",
    home: Path | None = None,
    gate: str = "report",
    compare: Sequence[str] = (),
    train: TrainSettings | None = None,
    progress: Progress | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Yield the result of every cell; with `home` they are kept there, and finished ones are read back.

    On a first night nothing of an earlier one is there to rehearse. A cell without any rehearsal therefore goes on from the
    first night of the cell before it, where quant and seed are the same.

    Args:
        compare: further quants to merge and measure for `survival` after each night, but not in a cell that goes on.

    Raises:
        EdgeclError: a night failed.
    """
    with tempfile.TemporaryDirectory(prefix="edgecl-stream-") as temporary:
        root = home or Path(temporary)
        first = _FirstNight(root / ".first-night")
        for cell in cells:
            path = root / f"{cell.name}.json"
            if not path.is_file():
                root.mkdir(parents=True, exist_ok=True)
                settings = replace(train or TrainSettings(), seed=cell.seed)
                run = _Run(
                    stream.joined() if cell.joint else stream, cell, root / cell.name, model, gate, compare, settings, progress
                )
                write_atomic(path, json.dumps(run.run(first)) + "\n")
            yield json.loads(path.read_text("utf-8"))
        shutil.rmtree(first.folder, ignore_errors=True)


@dataclass
class _FirstNight:
    """A home after its first night, and what was measured: where a cell without replay may go on from."""

    folder: Path
    cell: Cell | None = None
    state: tuple[Any, ...] = ()

    def serves(self, cell: Cell) -> bool:
        return (
            self.cell is not None and replace(self.cell, replay=0.0, written=0) == cell and not cell.precision
        )  # whose base is gone


@dataclass
class _Run:
    """One cell."""

    stream: Stream
    cell: Cell
    home: Path
    model: str
    gate: str
    compare: Sequence[str]
    train: TrainSettings
    progress: Progress | None

    def run(self, first: _FirstNight) -> dict[str, Any]:
        """Run every night and return the cell's result."""
        tasks, n = self.stream.tasks, len(self.stream.tasks)
        accuracy, loss = np.full((n, n), np.nan), np.full((n, n), np.nan)
        nights: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        shutil.rmtree(self.home, ignore_errors=True)
        if goes_on := first.serves(self.cell):
            shutil.copytree(first.folder, self.home, symlinks=True)
            start, accuracy[0], loss[0], row, night = first.state
            nights.append(night)
            rows.append(row)
        with self._open(goes_on) as learner:
            meter = learner.meter(self.progress)
            if not goes_on:
                start = self._base_accuracy(learner, meter)
            for i, task in enumerate(tasks):
                if i < len(nights):
                    continue
                learner.observe(self.stream.train[task])
                compare = () if goes_on else self.compare
                report = learner.adapt(gate=self.gate, compare=compare, progress=self.progress)
                known = tasks[: i + 2]
                scores = meter.scores(learner.generations.current(), self._tests(known))
                accuracy[i, : len(known)], loss[i, : len(known)] = self._by_task(scores, known)
                rows.append({t: self._row_scores(scores, t) for t in known})
                facts = report.as_dict()
                nights.append({"task": task} | {key: facts[key] for key in facts if key not in ("results", "train")})
                if i == 0 and n > 1 and not first.cell:
                    state = start, accuracy[0].copy(), loss[0].copy(), rows[0], nights[0]
                    first.cell, first.state = self.cell, state
                    shutil.copytree(self.home, first.folder, symlinks=True)
            result = {
                **asdict(self.cell),
                "tasks": list(tasks),
                "acc": average_accuracy(accuracy),
                "bwt": backward_transfer(accuracy),
                "fwt": forward_transfer(accuracy, start),
                "forgetting": forgetting(accuracy),
                "intervals": stream_intervals(
                    [_right(row[task]) for row, task in zip(rows, tasks, strict=True)],
                    [_right(rows[-1][task]) for task in tasks],
                ),
                "matrix": _plain(accuracy),
                "answer_loss_nats": _plain(loss),
                "base": [round(float(x), 4) for x in start],
                "n_test": {task: len(self.stream.test[task]) for task in tasks},
                "nights": nights,
                "rows": rows,
            }
            if self.cell.quant != "int8":
                result["against_int8"] = self._against_int8(learner, meter, scores)
        shutil.rmtree(self.home)
        return result

    def _open(self, goes_on: bool) -> Learner:
        settings = ReplaySettings(share=self.cell.replay, written=self.cell.written)
        if not goes_on:
            path = find_model(self.model)
            cell = self.cell
            return Learner.init(
                path, self.home, quant=cell.quant, precision=cell.precision, replay=settings, train=self.train, keep_models=1
            )
        learner = Learner(self.home)
        learner.settings = replace(learner.settings, replay=settings)
        learner.store.drop("replay")
        return learner

    def _tests(self, tasks: Sequence[str]) -> list[Example]:
        return [row for task in tasks for row in self.stream.test[task]]

    def _row_scores(self, scores: dict[str, Scored], task: str) -> dict[str, Any]:
        """Return what was right of a task's test rows, in their order, as a string of 0 and 1, and their answer losses."""
        found = [scores[row.hash] for row in self.stream.test[task]]
        return {
            "right": "".join(str(int(score.correct)) for score in found),
            "loss_nats": [round(score.loss_nats, 4) for score in found],
        }

    def _by_task(self, scores: dict[str, Scored], tasks: Sequence[str]) -> tuple[FloatArray, FloatArray]:
        """Return (accuracy, answer loss in nats) of each task."""
        found = [[scores[row.hash] for row in self.stream.test[task]] for task in tasks]
        losses = [np.mean([score.loss_nats for score in part]) for part in found]
        return np.array([np.mean([score.correct for score in part]) for part in found]), np.array(losses)

    def _base_accuracy(self, learner: Learner, meter: Meter) -> FloatArray:
        """Return the accuracy of the untouched base on every task, at the type that is served."""
        base = self._merged(learner, "", self.cell.quant)
        return self._by_task(meter.scores(base, self._tests(self.stream.tasks)), self.stream.tasks)[0]

    def _merged(self, learner: Learner, adapter: str, quant: str) -> Generation:
        """Write the base, with an adapter or without, at a quant, beside the generations; it is measured, never served."""
        path = self.home / f"{quant}-{'base' if not adapter else 'wide'}.gguf"
        with translated(), GgufFile(learner.settings.base) as gguf:
            qtype = resolve_quant(quant, gguf, learned=bool(adapter))
        request = {"base": learner.settings.base, "adapter": adapter, "out": str(path), "quant": qtype}
        run_stage("merge", request, learner.limits(), self.progress)
        return unpublished(path.parent, path, None)

    def _against_int8(self, learner: Learner, meter: Meter, scores: dict[str, Scored]) -> dict[str, float]:
        """Compare the last night's file with the same adapter merged at INT8, row by row: this quant minus INT8."""
        wide = self._merged(learner, str(learner.generations.current().folder / "adapter.gguf"), "int8")
        other = meter.scores(wide, self._tests(self.stream.tasks))
        pairs = [(other[key], scores[key]) for key in other]
        mean, low, high = paired_interval(np.array([a.loss_nats for a, _ in pairs]), np.array([b.loss_nats for _, b in pairs]))
        return {
            "answer_loss_nats": mean,
            "low": low,
            "high": high,
            "accuracy": float(np.mean([float(b.correct) - float(a.correct) for a, b in pairs])),
            "n_rows": len(pairs),
        }


def _right(scores: dict[str, Any]) -> FloatArray:
    return np.array([float(digit) for digit in scores["right"]])


def _plain(matrix: np.ndarray[Any, Any]) -> list[list[float | None]]:
    return [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in matrix]
