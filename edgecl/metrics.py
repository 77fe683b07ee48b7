"""Continual-learning metrics over a stream's accuracy matrix, and paired intervals.

ACC compares recipes at the end of a stream; BWT says whether earlier tasks suffered or gained; FWT whether later tasks start
better; forgetting how far each earlier task fell from its best. Row i of the matrix holds the scores on all tasks after
night i; column j is task j.
"""

from __future__ import annotations

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


def survival(before: float, adapter: float, merged: float) -> float:
    """Return how much of the adapter's gain the merged, quantized file keeps: 1 is all, 0 is none.

    Args:
        before: answer loss of yesterday's model on tonight's rows, in nats.
        adapter: of base + unmerged adapter, merged: of the merged file, on the same rows.
    """
    gain = before - adapter
    return float((before - merged) / gain) if gain > 1e-9 else 1.0
