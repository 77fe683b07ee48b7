"""Bits where they buy most: a type for each tensor, in no more bytes than a budget.

Rounding a tensor to a type costs nats per token in proportion to its mean squared error, each column weighted by its
importance, and to the tensor's sensitivity (`imatrix` measures both). So the cost of every tensor at every type is known
before anything is written, and the cheapest combination that fits is a knapsack, solved by dynamic programming.

Without measured sensitivities the prior is: what counts is the error in relation to the tensor's own weights, 16-fold for the
head and the embedding, and for a layer divided by its number from 1, because what it disturbs passes through all above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .ggml import FLOAT_TYPES, F32Array, QType, block_size, default_threads, dequantize_rows, each_chunk, quantize_unshrunk
from .gguf_file import PlannedTensor, TensorInfo
from .imatrix import Imatrix
from .merge import planned_bytes
from .names import layer_of
from .recipe import ADAPTIVE, Recipe, is_weight, resolve_quant
from .source import Source

CANDIDATES = (
    QType.Q2_K, QType.Q3_K, QType.Q4_0, QType.Q4_K, QType.Q4_1, QType.Q5_0, QType.Q5_K, QType.Q5_1, QType.Q6_K, QType.Q8_0,
)  # fmt: skip
_SAMPLE_WEIGHTS = 1 << 20  # of a larger tensor, evenly spread rows are tried
_STEPS = 1 << 16
Progress = Callable[[int, int, str], None]


def candidates(info: TensorInfo) -> tuple[QType, ...]:
    """Return the types that a weight may get: those whose block divides its rows, or F16."""
    return tuple(qtype for qtype in CANDIDATES if info.shape[-1] % block_size(qtype) == 0) or (QType.F16,)


def adaptive_recipe(
    source: Source,
    imatrix: Imatrix | None,
    sensitivities: Mapping[str, float],
    budget_bytes: int = 0,
    n_threads: int = 0,
    progress: Progress | None = None,
) -> Recipe:
    """Return the recipe of the least predicted cost whose file has at most `budget_bytes`.

    Args:
        sensitivities: nats per token for a mean squared error of one, of every weight; empty: the prior.
        budget_bytes: of the whole file; 0 is the size of Q4_K_M.

    Raises:
        ConvertError: the budget is below the smallest file that can be written, or a sensitivity is missing.
    """
    infos = [info for info in source.tensors.values() if is_weight(info)]
    if sensitivities and (missing := [info.name for info in infos if info.name not in sensitivities]):
        raise ConvertError(f"sensitivities lack {missing[0]} of {source.path}; measure them on this model, or give none")
    types = [candidates(info) for info in infos]
    sizes = [
        [PlannedTensor(info.name, info.shape, qtype).padded_bytes(source.alignment) for qtype in choices]
        for info, choices in zip(infos, types, strict=True)
    ]
    smallest = [choices[int(np.argmin(size))] for choices, size in zip(types, sizes, strict=True)]
    least_bytes = planned_bytes(source, _recipe(infos, smallest))
    budget_bytes = budget_bytes or planned_bytes(source, Recipe("Q4_K_M"))
    if budget_bytes < least_bytes:
        raise ConvertError(f"--size-budget must be at least {least_bytes} bytes for {source.path}, got {budget_bytes}")
    costs: list[list[float]] = []
    for done, (info, choices) in enumerate(zip(infos, types, strict=True)):
        if progress:
            progress(done, len(infos), info.name)
        errors, mean_square = rounding_errors(source, info, choices, imatrix, n_threads)
        sensitivity = sensitivities[info.name] if sensitivities else prior_sensitivity(info, mean_square)
        costs.append([sensitivity * error for error in errors])
    chosen = knapsack(sizes, costs, budget_bytes - least_bytes + sum(map(min, sizes)))
    predicted = sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) if sensitivities else None
    return _recipe(infos, [choices[i] for choices, i in zip(types, chosen, strict=True)], predicted)


def _recipe(infos: list[TensorInfo], types: list[QType], predicted_nats: float | None = None) -> Recipe:
    return Recipe(ADAPTIVE, {info.name: qtype for info, qtype in zip(infos, types, strict=True)}, predicted_nats)


def prior_sensitivity(info: TensorInfo, mean_square: float) -> float:
    """Return what stands in for a measured sensitivity, in no unit: see the top of this module."""
    layer = layer_of(info.name)
    weight = 16.0 if layer is None else 1 / (1 + layer)
    return weight / mean_square if mean_square else 0.0


def check_quant(quant: str, size_budget: int = 0) -> None:
    """Check that a quant is one that `choose_recipe` knows, and that a size budget goes with it.

    Raises:
        ConvertError: a budget for another quant than int4.
        UnsupportedError: no such quant.
    """
    if size_budget and quant != "int4":
        raise ConvertError(f"--size-budget goes with --quant int4, got {quant}")
    if quant not in ("int8", "int4"):
        Recipe.named(quant)


def choose_recipe(
    source: Source,
    quant: str,
    imatrix: Imatrix | None = None,
    size_budget: int = 0,
    n_threads: int = 0,
    progress: Progress | None = None,
) -> Recipe:
    """Return the recipe that `convert` uses.

    int4 is adaptive where a size budget is given, or where the source is float and sensitivities were measured; else, and
    for every other quant, it is what `resolve_quant` says.

    Raises:
        ConvertError: a budget for another quant than int4, or one that nothing fits.
        UnsupportedError: no such quant.
    """
    check_quant(quant, size_budget)
    if imatrix is not None:
        imatrix.check_fits(source)
    is_float = all(info.qtype in FLOAT_TYPES for info in source.tensors.values())
    measured = imatrix.sensitivities if imatrix else {}
    if quant == "int4" and (size_budget or (is_float and measured)):
        return adaptive_recipe(source, imatrix, measured, size_budget, n_threads, progress)
    return Recipe.named(resolve_quant(quant, source))


def rounding_errors(
    source: Source, info: TensorInfo, types: tuple[QType, ...], imatrix: Imatrix | None, n_threads: int = 0
) -> tuple[list[float], float]:
    """Return a tensor's mean squared error at each type and its mean square, columns weighted by importance (mean 1)."""
    n_per_row = info.shape[-1]
    weights = source.weights(info.name, n_threads).reshape(-1, n_per_row)
    if not np.isfinite(weights).all():
        raise ConvertError(f"{source.path}: tensor {info.name} has NaN or infinite weights; use a sound base")
    rows = np.ascontiguousarray(weights[:: -(-weights.size // _SAMPLE_WEIGHTS)])
    source.release(info.name)
    importance = imatrix.importance(info.name) if imatrix else None
    columns = _weighting(importance, n_per_row)
    errors = [
        0.0 if qtype == info.qtype else _error(rows, qtype, importance, columns, n_threads)  # what keeps its type is copied
        for qtype in types
    ]
    return errors, float((rows**2).mean(0, dtype=np.float64) @ columns) / n_per_row


def _weighting(importance: F32Array | None, n_per_row: int) -> F32Array:
    columns = np.ones(n_per_row, np.float32)
    return columns if importance is None or not importance.any() else columns * importance / importance.mean()


def _error(rows: F32Array, qtype: QType, importance: F32Array | None, columns: F32Array, n_threads: int) -> float:
    sums: list[float] = []

    def work(start: int, stop: int) -> None:
        part = rows[start:stop]
        difference = dequantize_rows(quantize_unshrunk(part, qtype, importance), qtype, part.shape[1]) - part
        sums.append(float((difference**2).sum(0, dtype=np.float64) @ columns))

    each_chunk(len(rows), rows.shape[1], work, n_threads or default_threads())
    return sum(sorted(sums)) / rows.size


def knapsack(sizes: list[list[int]], errors: list[list[float]], budget: int) -> list[int]:
    """Return one choice per item, of the least total error whose total size is at most `budget`.

    Sizes are counted in units: their greatest common divisor where 65,536 of it span their range, which is exact; else a
    multiple of it, to which they are rounded up. The budget always holds, and a larger one never gives a larger error.

    Args:
        sizes, errors: by item, of each of its choices.
        budget: at least the sum of each item's smallest size.
    """
    finest = [min(range(len(size)), key=lambda i: (error[i], size[i])) for size, error in zip(sizes, errors, strict=True)]
    if sum(size[i] for size, i in zip(sizes, finest, strict=True)) <= budget:
        return finest  # nothing to weigh, and rounded sizes might not fit
    least = [min(size) for size in sizes]
    spread = sum(max(size) for size in sizes) - sum(least)
    step = math.gcd(*(size - low for sizes_, low in zip(sizes, least, strict=True) for size in sizes_)) or 1
    unit = step * -(-spread // (step * _STEPS)) or 1
    room = min((budget - sum(least)) // unit, -(-spread // unit) + len(sizes))
    best = np.zeros(room + 1)  # least error by units spent
    picks: list[NDArray[np.int8]] = []
    for size, error, low in zip(sizes, errors, least, strict=True):
        after, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.int8)
        for choice in range(len(size)):
            units = -(-(size[choice] - low) // unit)
            if units > room:
                continue
            total = best[: room + 1 - units] + error[choice]
            better = total < after[units:]
            after[units:][better] = total[better]
            pick[units:][better] = choice
        best = after
        picks.append(pick)
    chosen, left = [], room
    for size, low, pick in zip(reversed(sizes), reversed(least), reversed(picks), strict=True):
        choice = int(pick[left])
        chosen.append(choice)
        left -= -(-(size[choice] - low) // unit)
    return chosen[::-1]
