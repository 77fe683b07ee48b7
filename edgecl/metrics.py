"""Continual-learning metrics over a stream's accuracy matrix, and paired intervals.

ACC compares recipes at the end of a stream; BWT says whether earlier tasks suffered or gained; FWT whether later tasks start
better; forgetting how far each earlier task fell from its best; plasticity how well a task was learned in its own night, and
retention how much of that is left. Row i of the matrix holds the scores on all tasks after night i; column j is task j.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

FloatArray = NDArray[np.float64]


def _checked(scores: FloatArray) -> FloatArray:
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise DataError(f"scores must be a square matrix, got shape {matrix.shape}")
    if np.isnan(matrix[np.tril_indices(len(matrix))]).any():
        raise DataError("scores has NaN where a task was already learned")
    return matrix


def average_accuracy(scores: FloatArray) -> float:
    """Return ACC: the mean score over all tasks after the last night.

    Args:
        scores: (N, N), row i = scores on all tasks after night i.

    Raises:
        DataError: not square, or NaN where j <= i.

    Source:
        Lopez-Paz & Ranzato 2017, eq. 2.
    """
    return float(_checked(scores)[-1].mean())


def backward_transfer(scores: FloatArray) -> float:
    """Return BWT: the mean change of every earlier task's score by the end of the stream.

    Args:
        scores: (N, N), row i = scores on all tasks after night i; only j <= i is read.

    Returns:
        In score units; negative means forgetting. 0.0 for a single task.

    Raises:
        DataError: not square, or NaN where j <= i.

    Source:
        Lopez-Paz & Ranzato 2017, eq. 3.
    """
    matrix = _checked(scores)
    change = matrix[-1] - np.diag(matrix)
    return float(change[:-1].mean()) if len(matrix) > 1 else 0.0


def forward_transfer(scores: FloatArray, start: FloatArray) -> float:
    """Return FWT: the mean score on a task just before its night, above the untouched base's.

    Args:
        scores: (N, N), row i = scores on all tasks after night i; j = i + 1 is read.
        start: (N,) scores of the base on every task.

    Returns:
        In score units. 0.0 for a single task.

    Raises:
        DataError: not square, or NaN where j <= i + 1.

    Source:
        Lopez-Paz & Ranzato 2017, eq. 4.
    """
    matrix = _checked(scores)
    before = np.diag(matrix, 1)
    if np.isnan(before).any() or len(start) != len(matrix):
        raise DataError("forward transfer needs every task's score just before its night, and the base's")
    return float((before - np.asarray(start)[1:]).mean()) if len(matrix) > 1 else 0.0


def forgetting(scores: FloatArray) -> float:
    """Return the mean, over earlier tasks, of the best earlier score minus the present one.

    Args:
        scores: (N, N), row i = scores on all tasks after night i; only j <= i is read.

    Returns:
        In score units; positive means forgetting. 0.0 for a single task.

    Raises:
        DataError: not square, or NaN where j <= i.

    Source:
        Chaudhry et al. 2018, eq. 3.
    """
    matrix = _checked(scores)
    n = len(matrix)
    return float(np.mean([matrix[j:-1, j].max() - matrix[-1, j] for j in range(n - 1)])) if n > 1 else 0.0


def plasticity_retention(scores: FloatArray) -> FloatArray:
    """Return the plasticity-retention curve of a stream, a point after each night.

    Args:
        scores: (N, N), row i = scores on all tasks after night i; only j <= i is read.

    Returns:
        (N, 2): plasticity, the mean score of the tasks so far, each just after its own night; retention, the share of it that
        the tasks of earlier nights still have, 1.0 where they had nothing.

    Raises:
        DataError: not square, or NaN where j <= i.

    Source:
        Plasticity is the average of learning accuracy of Riemer et al. 2019 (LA); retention is BWT as a share of it.
    """
    matrix = _checked(scores)
    own = np.diag(matrix)
    points = [(own[: i + 1].mean(), _share(matrix[i, :i].sum(), own[:i].sum())) for i in range(len(matrix))]
    return np.array(points)


def _share(left: FloatArray, had: FloatArray) -> FloatArray:
    """Return left / had, 1 where nothing was to be had."""
    return np.where(had > 0, left / np.where(had > 0, had, 1), 1.0)


def paired_interval(
    before: FloatArray, after: FloatArray, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of after - before over the same rows, and its bootstrap confidence interval (low, high).

    Args:
        before: (N,), after: (N,), in the same order.

    Raises:
        DataError: empty, or of different lengths.

    Source:
        Percentile bootstrap over rows, 2,000 draws (Efron 1979).
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise DataError(f"a paired interval needs the same rows twice, got shapes {first.shape} and {second.shape}")
    difference = second - first
    draws = np.random.default_rng(seed).integers(0, len(difference), (2000, len(difference)))
    means = difference[draws].mean(1)
    tail = 50 * (1 - confidence)
    return float(difference.mean()), float(np.percentile(means, tail)), float(np.percentile(means, 100 - tail))


def stream_intervals(nights: Sequence[Sequence[FloatArray]], base: Sequence[FloatArray] = ()) -> dict[str, tuple[float, float]]:
    """Return the 95% confidence intervals (low, high) of a stream's metrics over the test rows of each task.

    Args:
        nights: after each night, by task, (n_rows,) scores of its rows: of the tasks so far, and of the next one for FWT.
        base: by task, of the same rows under the untouched base; (): FWT has no interval.

    Returns:
        Of acc, bwt, fwt, forgetting, plasticity and retention. Of nights that are alike chance makes one the best, in a draw
        as in what was measured: the interval of forgetting lies a little high.

    Raises:
        DataError: no task, a task without rows, a score that is missing, or other rows after one night than after another.

    Source:
        Percentile bootstrap, 2,000 draws of rows within each task (Efron 1979).
    """
    n, rng = len(nights), np.random.default_rng(0)
    drawn = np.full((n + 1, n, 2000), np.nan)  # by night, the base first, and by task
    for j in range(max(n, 1)):
        rows = {i: night[j] for i, night in enumerate([base, *nights]) if j < len(night)}
        needed, lengths = {*range(j + 1, n + 1), *((0, j) if base else ())}, {len(scores) for scores in rows.values()}
        if not needed <= rows.keys() or len(lengths) != 1 or 0 in lengths:
            raise DataError("intervals need the same rows of every task after every night")
        (n_rows,) = lengths
        draws = rng.integers(0, n_rows, (2000, n_rows))
        for i, scores in rows.items():
            drawn[i, j] = np.asarray(scores, np.float64)[draws].mean(1)
    start, after, each, earlier = drawn[0], drawn[1:], np.arange(n), max(n - 1, 1)
    learned, left = after[each, each], after[-1]
    found = {
        "acc": left.mean(0),
        "bwt": (left - learned)[:-1].sum(0) / earlier,
        "fwt": (after[each[:-1], each[1:]] - start[1:]).sum(0) / earlier,
        "forgetting": sum((after[j:-1, j].max(0) - left[j] for j in each[:-1]), np.zeros(2000)) / earlier,
        "plasticity": learned.mean(0),
        "retention": _share(left[:-1].sum(0), learned[:-1].sum(0)),
    }
    if not base:
        del found["fwt"]
    low, high = np.percentile(list(found.values()), [2.5, 97.5], axis=1).tolist()
    return {name: (low[i], high[i]) for i, name in enumerate(found)}


def survival(before: float, adapter: float, merged: float) -> float:
    """Return how much of the adapter's gain the merged, quantized file keeps: 1 is all, 0 is none.

    Args:
        before: answer loss of yesterday's model on tonight's rows, in nats.
        adapter: of base + unmerged adapter, merged: of the merged file, on the same rows.
    """
    gain = before - adapter
    return float((before - merged) / gain) if gain > 1e-9 else 1.0
