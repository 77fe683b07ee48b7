r"""What a grid of streams says of each claim of "When Less is More" (8-bit continual learning): gaps, intervals, pictures.

    edgecl --home CELLS stream DATA --precision f16,int8,int4 --replay 0,0.001,0.01,0.02,0.05,0.1 --written 0 --seed 0,1 \
        --train-limit 300 --test-limit 100
    python examples/less_is_more/verdicts.py CELLS DATA --test-limit 100 [--bench bench.json] [--out DIR]

CELLS holds a JSON file for each finished cell. A gap is of the same test rows under the same seed, twice; its interval is a 95%
bootstrap over them. Where a claim is of several shares or precisions, a row counts once, with its mean over them: what is right
of it at one says much of the others.

`bench.json`: {"f16": ..., "int8": ..., "int4": ...}, each what `edgecl bench --json` printed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from edgecl.metrics import paired_interval, plasticity_retention, stream_intervals
from edgecl.stream import Stream

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARMS = {"f16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
ENOUGH = 0.1  # share of replay that is said to suffice for every kind of task
FloatArray = NDArray[np.float64]


@dataclass
class Verdict:
    """What was measured for a part of a claim: a gap of accuracies (or a ratio) with its interval."""

    claim: str
    part: str
    gap: float | None
    low: float | None
    high: float | None
    verdict: str


class Grid:
    """Cells by precision, replay share and seed: shares that a seed has at every precision, seeds that have all of those.

    So a grid may be read while its last shares still run.
    """

    def __init__(self, cells: list[dict[str, Any]]) -> None:
        self._cells = {(cell["precision"], cell["replay"], cell["seed"]): cell for cell in cells}
        self.arms = [arm for arm in ARMS if any(key[0] == arm for key in self._cells)]
        found = {(share, seed) for _, share, seed in self._cells}
        whole = {(share, seed) for share, seed in found if all((arm, share, seed) in self._cells for arm in self.arms)}
        self.shares = sorted({share for share, _ in whole})
        self.seeds = sorted({seed for _, seed in whole if all((share, seed) in whole for share in self.shares)})
        if not self.seeds:
            raise SystemExit(
                f"no seed has all cells of {', '.join(self.arms)} at replay {self.shares or sorted({s for s, _ in found})}"
            )
        told = {json.dumps(recipe_of(cell), sort_keys=True) for cell in cells}
        if len(told) > 1:
            raise SystemExit(f"cells are of {len(told)} bases, versions or settings (`of` in them); keep those of one")
        self.tasks: list[str] = cells[0]["tasks"]

    def right(self, arm: str, share: float, after: int, task: int) -> FloatArray:
        """Return what was right of a task's test rows after a stage, (n_seeds * n_rows,)."""
        rows = [self._cells[arm, share, seed]["rows"][after][self.tasks[task]]["right"] for seed in self.seeds]
        return np.array([float(digit) for row in rows for digit in row])

    def mean_right(self, arms: Sequence[str], shares: Sequence[float], after: int, task: int) -> FloatArray:
        """Return how often each of a task's test rows was right after a stage, of cells of several precisions and shares."""
        right = [self.right(arm, share, after, task) for arm in arms for share in shares]
        return np.asarray(np.mean(right, axis=0), np.float64)


def recipe_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what the cells of a grid have in common beside their rows; {} of a cell whose version did not note it."""
    of = cell.get("of")
    return {key: value for key, value in of.items() if key not in ("rows", "quant")} if isinstance(of, dict) else {}


def main() -> None:
    """Write verdicts.json and the pictures; print the verdicts as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--test-limit", type=int, default=0)
    parser.add_argument("--bench", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    grid = Grid([json.loads(path.read_text("utf-8")) for path in sorted(args.cells.glob("base-*.json"))])
    n = len(grid.tasks)
    usable = {task: beats_majority(grid, args.data, args.test_limit, task) for task in range(n)}
    bench = json.loads(args.bench.read_text("utf-8")) if args.bench else {}
    verdicts = [*first_task(grid), *later_tasks(grid, usable), *tiny_buffer(grid), *balance(grid)]
    verdicts += [*sufficient(grid, usable), *less_replay(grid, usable), *speed(bench)]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"seeds": grid.seeds, "shares": grid.shares, "beats_majority": {grid.tasks[t]: ok for t, ok in usable.items()}}
    found = facts | {"verdicts": [asdict(verdict) for verdict in verdicts]}
    (args.out / "verdicts.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    draw(grid, "forward.png", "Just after its own stage", lambda task: [(task, task)], args.out)
    draw(grid, "retention.png", "After later stages", lambda task: [(i, task) for i in range(task + 1, n)], args.out)
    draw_curve(grid, args.out / "plasticity_retention.png")
    print("| claim | measured | gap | 95% interval | verdict |\n|---|---|---|---|---|")
    for v in verdicts:
        numbers = ("" if v.gap is None else f"{v.gap:+.3f}", "" if v.low is None else f"{v.low:+.3f} to {v.high:+.3f}")
        print(f"| {v.claim} | {v.part} | {numbers[0]} | {numbers[1]} | {v.verdict} |")


def beats_majority(grid: Grid, data: Path, limit: int, task: int) -> bool:
    """Return whether a task is answered better than by its commonest answer, at every precision with the largest buffer."""
    name, n_right, n_majority = grid.tasks[task], [], 0
    for seed in grid.seeds:
        rows = Stream.read(data, grid.tasks, 0, limit, seed).test[name]
        n_majority += Counter(row.final or row.answer for row in rows).most_common(1)[0][1]
    for arm in grid.arms:
        n_right.append(grid.right(arm, grid.shares[-1], task, task).sum())
    return bool(min(n_right) > n_majority)


def compared(claim: str, part: str, more: FloatArray, less: FloatArray, holds: Callable[[float, float], bool]) -> Verdict:
    """Return the verdict of a paired gap `more` - `less`; `holds` is told the gap and the low end of its interval."""
    gap, low, high = (round(x, 6) + 0.0 for x in paired_interval(less, more))  # means of thirds miss zero by 1e-18
    return Verdict(claim, part, gap, low, high, "replicated" if holds(gap, low) else "not replicated")


def first_task(grid: Grid) -> list[Verdict]:
    """Full precision is best on the first task."""
    claim, share = "full precision is best on the first task", grid.shares[0]
    f16 = grid.right("f16", share, 0, 0)
    return [
        compared(claim, f"F16 − {ARMS[arm]}, {grid.tasks[0]}", f16, grid.right(arm, share, 0, 0), lambda gap, low: low > 0)
        for arm in grid.arms
        if arm != "f16"
    ]


def later_tasks(grid: Grid, usable: dict[int, bool]) -> list[Verdict]:
    """Quantized bases are 8 to 15% better on later tasks."""
    claim, out = "quantized bases are 8 to 15% better on later tasks", []
    for task in range(1, len(grid.tasks)):
        for arm in grid.arms:
            if arm == "f16":
                continue
            more, less = (grid.mean_right([a], grid.shares, task, task) for a in (arm, "f16"))
            part = f"{ARMS[arm]} − F16, {grid.tasks[task]}, all shares"
            verdict = compared(claim, part, more, less, lambda gap, low: low > 0 and gap >= 0.08)
            verdict.verdict = verdict.verdict if usable[task] else "not testable: not above its commonest answer"
            out.append(verdict)
    return out


def tiny_buffer(grid: Grid) -> list[Verdict]:
    """0.1% replay lifts retention of the first task after the second from 45% to 65%."""
    claim = "0.1% replay lifts retention of the first task after the second from 45 to 65%"
    if not {0.0, 0.001} <= set(grid.shares):
        return []
    out = []
    for arm in grid.arms:
        more, less = (grid.right(arm, share, 1, 0) for share in (0.001, 0.0))
        part = f"{ARMS[arm]}, {grid.tasks[0]} after {grid.tasks[1]}: 0.1% − none"
        verdict = compared(claim, part, more, less, lambda gap, low: low > 0 and gap >= 0.1)
        if not np.array_equal(grid.right(arm, 0.001, 0, 0), grid.right(arm, 0.0, 0, 0)):
            verdict.verdict = "not testable: the first nights differ"
        out.append(verdict)
    return out


def balance(grid: Grid) -> list[Verdict]:
    """INT8 is the best balance: the accuracy over all tasks at the end."""
    claim, last = "INT8 is the best balance", len(grid.tasks) - 1

    def final(arm: str) -> FloatArray:
        return np.concatenate([grid.mean_right([arm], grid.shares, last, task) for task in range(last + 1)])

    return [
        compared(claim, f"Q8_0 − {ARMS[arm]}, all tasks at the end", final("int8"), final(arm), lambda gap, low: low > 0)
        for arm in grid.arms
        if arm != "int8"
    ]


def sufficient(grid: Grid, usable: dict[int, bool]) -> list[Verdict]:
    """1 to 2% suffices for NLU, 5 to 10% for Math and Code: at the end no more than 5 points are lost against the most."""
    out, last, most = [], len(grid.tasks) - 1, grid.shares[-1]
    for task, enough in enumerate((0.02, 0.05, 0.05)[: last + 1]):
        if enough not in grid.shares:
            continue
        claim, part = f"{enough:.0%} replay suffices for {grid.tasks[task]}", f"{enough:.0%} − {most:.0%} at the end"
        if task == last:  # nothing comes after it that a buffer could keep it from
            out.append(Verdict(claim, part, None, None, None, "not testable: the last stage"))
            continue
        less, more = (grid.mean_right(grid.arms, [share], last, task) for share in (enough, most))
        verdict = compared(claim, part, less, more, lambda gap, low: low > -0.05)
        verdict.verdict = verdict.verdict if usable[task] else "not testable: not above its commonest answer"
        out.append(verdict)
    return out


def less_replay(grid: Grid, usable: dict[int, bool]) -> list[Verdict]:
    """Quantized bases need less replay: at the same small shares they keep more of earlier tasks."""
    claim, last = "quantized bases need less replay for the same retention", len(grid.tasks) - 1
    shares = [share for share in grid.shares if 0 < share < ENOUGH]
    tasks = [task for task in range(last) if usable[task]]
    if not tasks or not shares:
        return []

    def kept(arm: str) -> FloatArray:
        return np.concatenate([grid.mean_right([arm], shares, last, task) for task in tasks])

    names = ", ".join(grid.tasks[task] for task in tasks)
    part = f"{names} at the end, replay {shares[0]:.1%} to {shares[-1]:.0%}"
    return [
        compared(claim, f"{ARMS[arm]} − F16, {part}", kept(arm), kept("f16"), lambda gap, low: low > 0)
        for arm in grid.arms
        if arm != "f16"
    ]


def speed(bench: dict[str, Any]) -> list[Verdict]:
    """INT8 inference is 2 to 3 times faster than full precision."""
    if not {"f16", "int8"} <= set(bench):
        return []
    out = []
    for name in ("tg128", "pp512"):
        ratio = bench["int8"][name] / bench["f16"][name]
        verdict = "replicated" if ratio >= 2 else "not replicated"
        out.append(Verdict("INT8 inference is 2 to 3 times faster", f"Q8_0 / F16, {name}", ratio, None, None, verdict))
    return out


def draw(grid: Grid, name: str, title: str, curves: Callable[[int], list[tuple[int, int]]], out: Path) -> None:
    """Draw accuracy by replay share, a line for each precision, a panel for each (stage, task) that `curves` names."""
    panels = [panel for task in range(len(grid.tasks)) for panel in curves(task)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), sharey=True, squeeze=False)
    places = range(len(grid.shares))
    for axis, (after, task) in zip(axes[0], panels, strict=True):
        for arm in grid.arms:
            means, bands = [], []
            for share in grid.shares:
                right = grid.right(arm, share, after, task)
                mean, low, high = paired_interval(np.zeros(len(right)), right)
                means.append(100 * mean)
                bands.append((100 * low, 100 * high))
            axis.plot(places, means, marker="o", label=ARMS[arm])
            axis.fill_between(places, *zip(*bands, strict=True), alpha=0.12)
        axis.set_title(f"{grid.tasks[task]} after {grid.tasks[after]}", fontsize=10)
        axis.set_xticks(places, [f"{100 * share:g}" for share in grid.shares])
        axis.set_xlabel("replay, % of a stage's rows")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy on test rows, %")
    axes[0][-1].legend()
    figure.suptitle(f"{title} ({len(grid.seeds)} seeds, 95% intervals over rows)", fontsize=11)
    figure.tight_layout()
    figure.savefig(out / name, dpi=110)
    plt.close(figure)


def draw_curve(grid: Grid, path: Path) -> None:
    """Draw how well tasks are learned and how much of that is left at the end: a line for each precision, a point a share."""
    figure, axis = plt.subplots(figsize=(5.2, 4))
    last = len(grid.tasks) - 1
    for arm in grid.arms:
        points, bars = [], []
        for share in grid.shares:
            own = [grid.right(arm, share, task, task) for task in range(last + 1)]
            final = [grid.right(arm, share, last, task) for task in range(last + 1)]
            scores = np.diag([rows.mean() for rows in own])
            scores[last] = [rows.mean() for rows in final]
            points.append(100 * plasticity_retention(scores)[-1])
            found = stream_intervals([[grid.right(arm, share, i, task) for task in range(i + 1)] for i in range(last + 1)])
            bars.append(np.abs(100 * np.array([found["plasticity"], found["retention"]]) - points[-1][:, None]))
        x, y = np.transpose(points)
        x_bars, y_bars = np.transpose(bars, (1, 2, 0))
        line, *_ = axis.errorbar(x, y, y_bars, x_bars, marker="o", capsize=2, elinewidth=0.5, label=ARMS[arm])
        for share, point in zip(grid.shares, points, strict=True):
            axis.annotate(f"{100 * share:g}%", point, (5, 4), textcoords="offset points", fontsize=8, color=line.get_color())
    axis.set_xlabel("plasticity: accuracy just after a task's own stage, %")
    axis.set_ylabel("retention: share of it left at the end, %")
    axis.set_title(f"a point a replay share, {len(grid.seeds)} seeds, 95% intervals over rows", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
