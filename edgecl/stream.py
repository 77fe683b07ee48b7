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
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_convert import GgufFile, resolve_quant, write_atomic

from .child import Progress, run_stage
from .data import Example, parse_lines
from .errors import DataError, translated
from .generations import Generation, unpublished
from .learner import Learner
from .metrics import (
    FloatArray,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    paired_interval,
    plasticity_retention,
    stream_intervals,
)
from .night import kept_ids
from .places import find_model
from .profile import PrivacySettings, ReplaySettings, TrainSettings

MINUTES = 24 * 60.0  # of a night: one that time cuts short is no measurement


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

    def __post_init__(self) -> None:
        """Check what its nights will be told, before any of them runs.

        Raises:
            SettingError: the share is not from 0 to 1, or written or seed is below 0.
        """
        ReplaySettings(share=self.replay, written=self.written)
        TrainSettings(seed=self.seed)

    @property
    def name(self) -> str:
        """File name of its result."""
        what = f"base-{self.precision}" if self.precision else self.quant
        joint = "-joint" if self.joint else ""
        return f"{what}{joint}-replay{self.replay:g}-written{self.written}-seed{self.seed}"

    @property
    def first_night(self) -> str:
        """Folder of its first night, before rows were dropped: the same for every share."""
        return f".first-night-{replace(self, replay=1.0).name}"


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

    def digest(self, model: str, gate: str) -> str:
        """Return a digest of the rows in their order, and of what learns them under which gate."""
        hashes = [[task, *(row.hash for row in rows[task])] for rows in (self.train, self.test) for task in self.tasks]
        return sha256(json.dumps([hashes, model, gate]).encode()).hexdigest()[:16]


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

    A first night has nothing of earlier ones to rehearse: cells that differ in what is kept of it have it in common. A cell
    without any rehearsal takes the first night of the first cell that is otherwise the same.

    Args:
        compare: further quants to merge and measure for `survival` after each night, but not in a cell without rehearsal.

    Raises:
        DataError: a kept result is of other rows, of another model or gate.
        EdgeclError: a night failed.
    """
    with tempfile.TemporaryDirectory(prefix="edgecl-stream-") as temporary:
        root = home or Path(temporary)
        firsts = [next((c for c in cells if replace(c, replay=0.0, written=0) == cell), cell) for cell in cells]
        for cell, first in zip(cells, firsts, strict=True):
            path = root / f"{cell.name}.json"
            rows = stream.joined() if cell.joint else stream
            of = rows.digest(model, gate)
            if not path.is_file():
                root.mkdir(parents=True, exist_ok=True)
                settings = replace(train or TrainSettings(), seed=cell.seed)
                run = _Run(rows, of, cell, first, root, model, gate, compare, settings, progress)
                write_atomic(path, json.dumps(run.run()) + "\n")
            result = json.loads(path.read_text("utf-8"))
            if result.get("of", of) != of:  # cells of earlier versions do not say
                raise DataError(
                    f"{path}: is of other rows, or of another order, model or gate; remove it, or name another --home"
                )
            yield result
        for first in firsts:
            shutil.rmtree(root / first.first_night, ignore_errors=True)


@dataclass
class _Run:
    """One cell: the first night of `first` in a home that other cells go on from too, then the others in a copy of it."""

    stream: Stream
    of: str  # `digest` of the stream
    cell: Cell
    first: Cell
    root: Path
    model: str
    gate: str
    compare: Sequence[str]
    train: TrainSettings
    progress: Progress | None

    def run(self) -> dict[str, Any]:
        """Run every night and return the cell's result."""
        tasks, n = self.stream.tasks, len(self.stream.tasks)
        shared, home = self.root / self.first.first_night, self.root / self.cell.name
        begun = self._first_night(shared)
        nights, rows = [begun["night"]], [begun["rows"]]
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(shared, home, symlinks=True, ignore=_bases)
        with Learner(home) as learner:
            nights[0]["n_kept"] = self._keep(learner)
            compare = self.compare if self.cell.replay or self.cell.written else ()
            for i in range(1, n):
                night, found = self._night(learner, i, compare)
                nights.append(night)
                rows.append(found)
            against = self._against_int8(learner, rows[-1])
        shutil.rmtree(home)
        accuracy, loss = np.full((n, n), np.nan), np.full((n, n), np.nan)
        for i, found in enumerate(rows):
            for j, task in enumerate(found):
                accuracy[i, j], loss[i, j] = _right(found[task]).mean(), np.mean(found[task]["loss_nats"])
        return {
            **asdict(self.cell),
            "of": self.of,
            "tasks": list(tasks),
            "acc": average_accuracy(accuracy),
            "bwt": backward_transfer(accuracy),
            "fwt": forward_transfer(accuracy, np.array(begun["base"])),
            "forgetting": forgetting(accuracy),
            "plasticity_retention": _plain(plasticity_retention(accuracy)),
            "intervals": stream_intervals(
                [_right(row[task]) for row, task in zip(rows, tasks, strict=True)],
                [_right(rows[-1][task]) for task in tasks],
            ),
            "matrix": _plain(accuracy),
            "answer_loss_nats": _plain(loss),
            "base": [round(x, 4) for x in begun["base"]],
            "n_test": {task: len(self.stream.test[task]) for task in tasks},
            "nights": nights,
            "rows": rows,
            "against_int8": against,
        }

    def _first_night(self, home: Path) -> dict[str, Any]:
        """Run the first night, unless another cell has; return what was measured of the base and after it.

        All of its rows stay in the store: each cell keeps its own share of them.
        """
        measured = home / "measured.json"
        if not measured.is_file() or json.loads(measured.read_text("utf-8")).get("of") != self.of:
            shutil.rmtree(home, ignore_errors=True)
            with Learner.init(
                find_model(self.model),
                home,
                quant=self.first.quant,
                precision=self.first.precision,
                replay=ReplaySettings(share=1.0, written=self.first.written),
                train=self.train,
                privacy=PrivacySettings(redact=False),  # what is measured is what the data set says
                keep_models=1,
            ) as learner:
                base = self._rows(learner, self._merged(learner, "", self.first.quant), self.stream.tasks)
                night, rows = self._night(learner, 0, self.compare)
            accuracy = [float(_right(base[task]).mean()) for task in self.stream.tasks]
            write_atomic(measured, json.dumps({"of": self.of, "base": accuracy, "night": night, "rows": rows}))
        return dict(json.loads(measured.read_text("utf-8")))

    def _keep(self, learner: Learner) -> int:
        """Let a copied home be as if the cell had run its first night itself; return how many rows that night leaves it."""
        share = self.cell.replay
        learner.settings = replace(learner.settings, replay=ReplaySettings(share=share, written=self.cell.written))
        kept = kept_ids(learner.store.rows("replay"), share, number=1)
        learner.store.drop("replay", keep=kept)
        return len(kept)

    def _night(self, learner: Learner, i: int, compare: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the night of task i did, and how the rows of the tasks so far, and of the next one, are answered then."""
        task = self.stream.tasks[i]
        if bad := learner.observe(self.stream.train[task]).bad:
            raise DataError(f"{task}, training row {bad[0][0]}: {bad[0][1]}")
        facts = learner.adapt(minutes=MINUTES, gate=self.gate, compare=compare, progress=self.progress).as_dict()
        rows = self._rows(learner, learner.generations.current(), self.stream.tasks[: i + 2])
        return {"task": task} | {key: facts[key] for key in facts if key not in ("results", "train")}, rows

    def _rows(self, learner: Learner, generation: Generation, tasks: Sequence[str]) -> dict[str, Any]:
        """Return what was right of each task's test rows, in their order, as a string of 0 and 1, and their answer losses."""
        scores = learner.meter(self.progress).scores(generation, self._tests(tasks))
        out = {}
        for task in tasks:
            found = [scores[row.hash] for row in self.stream.test[task]]
            right = "".join(str(int(score.correct)) for score in found)
            out[task] = {"right": right, "loss_nats": [round(score.loss_nats, 4) for score in found]}
        return out

    def _tests(self, tasks: Sequence[str]) -> list[Example]:
        return [row for task in tasks for row in self.stream.test[task]]

    def _merged(self, learner: Learner, adapter: str, quant: str) -> Generation:
        """Write the base, with an adapter or without, at a quant, beside the generations; it is measured, never served."""
        path = learner.home / f"{quant}-{'base' if not adapter else 'wide'}.gguf"
        with translated(), GgufFile(learner.settings.base) as gguf:
            qtype = resolve_quant(quant, gguf, learned=bool(adapter))
        request = {"base": learner.settings.base, "adapter": adapter, "out": str(path), "quant": qtype}
        run_stage("merge", request, learner.limits(), self.progress)
        return unpublished(path.parent, path, None)

    def _against_int8(self, learner: Learner, served: dict[str, Any]) -> dict[str, Any] | None:
        """Merge the last night's adapter again, at INT8, or at INT4 where INT8 is served; compare them row by row.

        Returns:
            What is not INT8 minus INT8, on all test rows; None where no night was published.
        """
        tasks, serves_int8 = self.stream.tasks, self.cell.quant == "int8"
        serving = learner.generations.current()
        if not serving.number:
            return None  # every night was refused
        adapter = str(serving.folder / "adapter.gguf")
        other = self._rows(learner, self._merged(learner, adapter, "int4" if serves_int8 else "int8"), tasks)
        int8, less = (served, other) if serves_int8 else (other, served)
        losses, right = zip(*(_joined(rows, tasks) for rows in (int8, less)), strict=True)
        mean, low, high = paired_interval(losses[0], losses[1])
        return {
            "quant": "int4" if serves_int8 else self.cell.quant,
            "answer_loss_nats": mean,
            "low": low,
            "high": high,
            "accuracy": float((right[1] - right[0]).mean()),
            "n_rows": len(right[0]),
        }


def _bases(folder: str, names: list[str]) -> list[str]:
    """Return the bases among the names of a home: a copy goes on with the original's."""
    return [name for name in names if name.endswith(".gguf") and "edgecl.toml" in names]


def _right(scores: dict[str, Any]) -> FloatArray:
    return np.array([float(digit) for digit in scores["right"]])


def _joined(rows: dict[str, Any], tasks: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Return the answer losses of all tasks' rows, and which are right, in one order."""
    losses = np.concatenate([np.array(rows[task]["loss_nats"], np.float64) for task in tasks])
    return losses, np.concatenate([_right(rows[task]) for task in tasks])


def _plain(matrix: np.ndarray[Any, Any]) -> list[list[float | None]]:
    return [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in matrix]
