"""A continual-learning stream: one night a task, every task measured after every night, on the file that is served.

DIR/train/T.jsonl, DIR/test/T.jsonl, the order from DIR/order.json or the names. Lists of quants, replay shares and seeds
run as a grid, cell by cell; a finished cell is a JSON file in the home, and is not run again. No task label is shown.
Test rows are scored on tasks learned so far and on the one that comes next (for forward transfer).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_convert import GgufFile, open_source, resolve_quant, write_atomic

from .child import Progress, run_stage
from .data import Example
from .errors import DataError, SettingError, translated
from .gate import GateSettings
from .generations import Generation, sha256_file, unpublished
from .learner import Learner
from .lock import night_lock
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
from .profile import PrivacySettings, ReplaySettings, TrainSettings, load_profile
from .tasks import Stream

__all__ = ["Cell", "Stream", "run_stream"]

PROFILE = "laptop-cpu"  # on every machine: cells of one grid have the same limits
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
        DataError: a kept result is damaged, or of other rows, another model or other settings.
        SettingError: `home` is a learner's; NotNow: another stream runs there. Both before anything is written.
        EdgeclError: the model cannot be read, a quant is unknown, or a night failed.
    """
    with tempfile.TemporaryDirectory(prefix="edgecl-stream-") as temporary:
        root, train = home or Path(temporary), train or TrainSettings()
        if (root / "edgecl.toml").exists():
            raise SettingError(f"{root} is a learner's home; name another --home for the cells of a stream")
        of = _facts(stream, cells, model, gate, compare, train)
        root.mkdir(parents=True, exist_ok=True)
        with night_lock(root):
            paths = {cell: root / f"{cell.name}.json" for cell in cells}
            results = {cell: _kept(path, of[cell]) for cell, path in paths.items() if path.is_file()}
            firsts = [next((c for c in cells if replace(c, replay=0.0, written=0) == cell), cell) for cell in cells]
            for cell, first in zip(cells, firsts, strict=True):
                if cell not in results:
                    rows, settings = stream.joined() if cell.joint else stream, replace(train, seed=cell.seed)
                    run = _Run(rows, of[cell], cell, first, root, model, gate, compare, settings, progress)
                    write_atomic(paths[cell], json.dumps(run.run()) + "\n")
                    results[cell] = _read(paths[cell])
                yield results[cell]
            for first in firsts:
                shutil.rmtree(root / first.first_night, ignore_errors=True)


def _facts(
    stream: Stream, cells: Sequence[Cell], model: str, gate: str, compare: Sequence[str], train: TrainSettings
) -> dict[Cell, dict[str, Any]]:
    """Return what each cell's result comes of, beside what its name says; unknown quants are found before hours of work."""
    path, profile = find_model(model), load_profile(PROFILE)
    with translated(), open_source(path) as source:
        recipes = {quant: resolve_quant(quant, source, learned=True) for quant in (*(cell.quant for cell in cells), *compare)}
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    told = {"train": asdict(replace(train, seed=0)), "gate": asdict(GateSettings()), "profile": profile.engine_options()}
    facts = {
        "base": sha256(" ".join(map(sha256_file, files)).encode()).hexdigest()[:16],
        "edgecl": version("edgecl"),
        "gate": gate,
        **{f"{part}.{key}": value for part, settings in told.items() for key, value in settings.items()},
        "profile.ram_bytes": profile.ram_bytes,
        "replay.heldout": ReplaySettings.heldout,
    }
    rows = {joint: (stream.joined() if joint else stream).digest() for joint in {cell.joint for cell in cells}}
    return {cell: {"rows": rows[cell.joint], "quant": recipes[cell.quant], **facts} for cell in cells}


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of a stream's home holds.

    Raises:
        DataError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged: {error}; remove it, and it is measured again") from None


def _kept(path: Path, of: dict[str, Any]) -> dict[str, Any]:
    """Return a finished cell.

    Raises:
        DataError: it is damaged, or comes of something else than `of`.
    """
    result = _read(path)
    was = result.get("of")
    if not isinstance(was, dict):
        other = ["an earlier version did not note them"]
    else:
        other = [f"{key} {was.get(key)}, now {of.get(key)}" for key in {**was, **of} if was.get(key) != of.get(key)]
    if other:
        raise DataError(
            f"{path}: is of other rows, another model or other settings ({'; '.join(other)}); name another --home, or remove it"
        )
    return result


@dataclass
class _Run:
    """One cell: the first night of `first` in a home that other cells go on from too, then the others in a copy of it."""

    stream: Stream
    of: dict[str, Any]  # see `_facts`
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
        base = np.array([_right(begun["base"][task]).mean() for task in tasks])
        return {
            **asdict(self.cell),
            "of": self.of,
            "tasks": list(tasks),
            "acc": average_accuracy(accuracy),
            "bwt": backward_transfer(accuracy),
            "fwt": forward_transfer(accuracy, base),
            "forgetting": forgetting(accuracy),
            "plasticity_retention": _plain(plasticity_retention(accuracy)),
            "intervals": stream_intervals(
                [[_right(found[task]) for task in found] for found in rows], [_right(begun["base"][task]) for task in tasks]
            ),
            "matrix": _plain(accuracy),
            "answer_loss_nats": _plain(loss),
            "base": [round(float(x), 4) for x in base],
            "base_rows": begun["base"],
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
        if not measured.is_file() or _read(measured).get("of") != self.of:
            shutil.rmtree(home, ignore_errors=True)
            with Learner.init(
                find_model(self.model),
                home,
                quant=self.first.quant,
                precision=self.first.precision,
                profile=PROFILE,
                replay=ReplaySettings(share=1.0, written=self.first.written),
                train=self.train,
                privacy=PrivacySettings(redact=False),  # what is measured is what the data set says
                keep_models=1,
            ) as learner:
                base = self._rows(learner, self._merged(learner, "", self.first.quant), self.stream.tasks)
                night, rows = self._night(learner, 0, self.compare)
            write_atomic(measured, json.dumps({"of": self.of, "base": base, "night": night, "rows": rows}))
        return _read(measured)

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
        path, qtype = learner.home / f"{quant}-{'base' if not adapter else 'wide'}.gguf", _qtype(learner, quant, bool(adapter))
        request = {"base": learner.settings.base, "adapter": adapter, "out": str(path), "quant": qtype}
        run_stage("merge", request, learner.limits(), self.progress)
        return unpublished(path.parent, path, None)

    def _against_int8(self, learner: Learner, served: dict[str, Any]) -> dict[str, Any] | None:
        """Compare the last night's adapter, merged at the cell's quant (where that is INT8: at INT4) and at INT8, row by row.

        What serves is one of the two, unless too little of the night survived in it, and a wider type serves.

        Returns:
            What is not INT8 minus INT8, on all test rows; None where no night was published.
        """
        tasks, quant = self.stream.tasks, self.cell.quant
        serving = learner.generations.current()
        if not serving.number:
            return None  # every night was refused
        adapter = str(serving.folder / "adapter.gguf")
        is_wanted = serving.manifest.model in (f"model-{quant}.gguf", f"model-{_qtype(learner, quant, True)}.gguf")

        def rows_at(at: str) -> dict[str, Any]:
            is_served = is_wanted and at == quant
            return served if is_served else self._rows(learner, self._merged(learner, adapter, at), tasks)

        less = "int4" if quant == "int8" else quant
        losses, right = zip(*(_joined(rows_at(at), tasks) for at in ("int8", less)), strict=True)
        mean, low, high = paired_interval(losses[0], losses[1])
        return {
            "quant": less,
            "answer_loss_nats": mean,
            "low": low,
            "high": high,
            "accuracy": float((right[1] - right[0]).mean()),
            "n_rows": len(right[0]),
        }


def _qtype(learner: Learner, quant: str, learned: bool) -> str:
    with translated(), GgufFile(learner.settings.base) as gguf:
        return resolve_quant(quant, gguf, learned)


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
