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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_convert import GgufFile, write_atomic

from .child import Progress, run_stage
from .data import Example, parse_lines
from .errors import DataError
from .generations import Generation, Manifest, now
from .learner import Learner, find_model, translated
from .measure import Meter
from .metrics import average_accuracy, backward_transfer, forgetting, forward_transfer, paired_interval
from .profile import ReplaySettings, TrainSettings, resolve_quant
from .store import Scored


@dataclass(frozen=True)
class Cell:
    """One run of a stream: what is served, how much may be rehearsed, and the seed."""

    quant: str = "int8"
    replay: float = 0.1
    seed: int = 0

    @property
    def name(self) -> str:
        """File name of its result."""
        return f"{self.quant}-replay{self.replay:g}-seed{self.seed}"


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
) -> Iterator[dict[str, Any]]:
    """Yield the result of every cell; with `home` they are kept there, and finished ones are read back.

    Raises:
        EdgeclError: a night failed.
    """
    with tempfile.TemporaryDirectory(prefix="edgecl-stream-") as temporary:
        root = home or Path(temporary)
        for cell in cells:
            path = root / f"{cell.name}.json"
            if not path.is_file():
                root.mkdir(parents=True, exist_ok=True)
                result = _run_cell(stream, cell, root / cell.name, model, gate, compare, train or TrainSettings(), progress)
                write_atomic(path, json.dumps(result, indent=1) + "\n")
            yield json.loads(path.read_text("utf-8"))


def _run_cell(
    stream: Stream,
    cell: Cell,
    home: Path,
    model: str,
    gate: str,
    compare: Sequence[str],
    train: TrainSettings,
    progress: Progress | None,
) -> dict[str, Any]:
    n = len(stream.tasks)
    accuracy, loss = np.full((n, n), np.nan), np.full((n, n), np.nan)
    nights = []
    settings: dict[str, Any] = {
        "replay": ReplaySettings(share=cell.replay),
        "train": replace(train, seed=cell.seed),
        "keep_models": 1,
    }
    with Learner.init(find_model(model), home, quant=cell.quant, force=True, **settings) as learner:
        meter = learner.meter(progress)
        base = _merged_base(learner, cell.quant, home / "base.gguf", progress)
        rows = [row for task in stream.tasks for row in stream.test[task]]
        start = _by_task(stream, meter.scores(base, rows))[0]
        for i, task in enumerate(stream.tasks):
            learner.observe(stream.train[task])
            report = learner.adapt(gate=gate, compare=compare, progress=progress)
            known = stream.tasks[: i + 2]
            scores = meter.scores(learner.generations.current(), [row for t in known for row in stream.test[t]])
            accuracy[i, : len(known)], loss[i, : len(known)] = _by_task(stream, scores, known)
            facts = report.as_dict()
            nights.append({"task": task} | {key: facts[key] for key in facts if key not in ("results", "train")})
        result = {
            "quant": cell.quant,
            "replay": cell.replay,
            "seed": cell.seed,
            "tasks": list(stream.tasks),
            "acc": average_accuracy(accuracy),
            "bwt": backward_transfer(accuracy),
            "fwt": forward_transfer(accuracy, start),
            "forgetting": forgetting(accuracy),
            "matrix": _plain(accuracy),
            "answer_loss_nats": _plain(loss),
            "base": [round(float(x), 4) for x in start],
            "n_test": {task: len(stream.test[task]) for task in stream.tasks},
            "nights": nights,
        }
        if cell.quant != "int8":
            result["against_int8"] = _against_int8(learner, meter, rows, scores, home / "int8.gguf", progress)
    shutil.rmtree(home)
    return result


def _by_task(
    stream: Stream, scores: dict[str, Scored], tasks: Sequence[str] | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return (accuracy, answer loss in nats) of each task."""
    parts = [[scores[row.hash] for row in stream.test[task]] for task in tasks or stream.tasks]
    return np.array([np.mean([s.correct for s in p]) for p in parts]), np.array(
        [np.mean([s.loss_nats for s in p]) for p in parts]
    )


def _merged_base(learner: Learner, quant: str, path: Path, progress: Progress | None) -> Generation:
    """Return the untouched base at the type that is served: what later nights are compared with."""
    return _requantized(learner, "", quant, path, progress) or learner.generations.load(0)


def _requantized(learner: Learner, adapter: str, quant: str, path: Path, progress: Progress | None) -> Generation | None:
    with translated(), GgufFile(learner.settings.base) as gguf:
        qtype = resolve_quant(quant, gguf)
    if qtype == "keep" and not adapter:
        return None
    request = {"base": learner.settings.base, "adapter": adapter, "out": str(path), "quant": qtype}
    run_stage("merge", request, learner.limits(), progress)
    manifest = Manifest(number=-1, parent="", base_sha256="", model=path.name, created=now())
    return Generation(manifest, path.parent, f"stream {path.name}", path, None)


def _against_int8(
    learner: Learner, meter: Meter, rows: list[Example], scores: dict[str, Scored], path: Path, progress: Progress | None
) -> dict[str, float]:
    """Compare the last night's file with the same adapter merged at INT8, row by row: this quant minus INT8."""
    adapter = learner.generations.current().folder / "adapter.gguf"
    wide = _requantized(learner, str(adapter), "int8", path, progress)
    assert wide is not None
    other = meter.scores(wide, rows)
    pairs = [(other[row.hash], scores[row.hash]) for row in rows]
    mean, low, high = paired_interval(np.array([a.loss_nats for a, _ in pairs]), np.array([b.loss_nats for _, b in pairs]))
    right = [(a.correct, b.correct) for a, b in pairs]
    return {
        "answer_loss_nats": mean,
        "low": low,
        "high": high,
        "accuracy": float(np.mean([b for _, b in right]) - np.mean([a for a, _ in right])),
        "n_rows": len(rows),
    }


def _plain(matrix: np.ndarray[Any, Any]) -> list[list[float | None]]:
    return [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in matrix]
