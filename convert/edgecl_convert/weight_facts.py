"""What a weight matrix looks like to a quantizer: how heavy its tails are, and whether it lies on a grid already.

One pass over the rows, a chunk at a time, on every core; the tensor is never decoded as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .ggml import F32Array, QType, block_size, default_threads, dequantize_rows, each_chunk, quantize_rows
from .source import Source

_BLOCK = 32  # weights that are judged together; divides every type's block
_BITS = {
    QType.Q4_0: 4, QType.Q4_1: 4, QType.Q4_K: 4, QType.IQ4_NL: 4, QType.IQ4_XS: 4, QType.Q5_0: 5, QType.Q5_1: 5,
    QType.Q5_K: 5, QType.Q6_K: 6, QType.Q8_0: 8,
}  # fmt: skip
GRID_TYPES = tuple(_BITS)


@dataclass(frozen=True)
class TensorFacts:
    """One weight matrix.

    Attributes:
        qtype: the type it is stored in.
        kurtosis: excess kurtosis; 0 for a normal distribution, 3 for Laplace's.
        on_grid: by type, the share of weights in blocks of 32 that re-quantizing gives back; 0 where the rows do not divide.
    """

    name: str
    qtype: str
    n_weights: int
    kurtosis: float
    on_grid: dict[str, float]


def tensor_facts(source: Source, name: str, grids: Sequence[QType], n_threads: int = 0) -> TensorFacts:
    """Return the facts of one tensor.

    Args:
        grids: types of GRID_TYPES to try.

    Raises:
        ConvertError: NaN or infinite weights.
    """
    info, blocks = source.tensors[name], source.blocks(name)
    n_per_row = info.shape[-1]
    tried = [qtype for qtype in grids if n_per_row % block_size(qtype) == 0]
    sums: list[NDArray[np.float64]] = []
    counts: list[list[int]] = []

    def work(start: int, stop: int) -> None:
        weights = dequantize_rows(blocks[start:stop], info.qtype, n_per_row)
        if not np.isfinite(weights).all():
            raise ConvertError(f"{source.path}: tensor {name} has NaN or infinite weights; use a sound model")
        sums.append(power_sums(weights))
        counts.append([count_on_grid(weights, qtype) for qtype in tried])

    each_chunk(len(blocks), n_per_row, work, n_threads or default_threads())
    shares = np.sum(counts, axis=0) / info.n_weights
    on_grid = dict.fromkeys((qtype.name for qtype in grids), 0.0)
    on_grid |= {qtype.name: float(share) for qtype, share in zip(tried, shares, strict=True)}
    return TensorFacts(name, info.qtype.name, info.n_weights, excess_kurtosis(np.sum(sums, axis=0)), on_grid)


def power_sums(weights: F32Array) -> NDArray[np.float64]:
    """Return (5,) sums of x**0 ... x**4."""
    x = weights.astype(np.float64).ravel()
    squares = x * x
    return np.array([x.size, x.sum(), squares.sum(), np.vdot(squares, x), np.vdot(squares, squares)])


def excess_kurtosis(sums: NDArray[np.float64]) -> float:
    """Return the excess kurtosis of the values whose `power_sums` these are, 0 where all values are the same."""
    mean, m2, m3, m4 = (float(x) for x in sums[1:] / sums[0])
    variance = m2 - mean**2
    if variance <= 1e-12 * m2:
        return 0.0
    return (m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4) / variance**2 - 3


def count_on_grid(weights: F32Array, qtype: QType) -> int:
    """Return how many of (rows, n_per_row) weights lie in blocks of 32 that quantizing to `qtype` gives back.

    All 32 must come back within a quarter of a step. Weights that were on the grid do, in spite of scales rounded to
    float16 and weights stored in 16 bits; the 32 weights of a float block do so once in 2 ** 32.
    """
    back = dequantize_rows(quantize_rows(weights, qtype), qtype, weights.shape[-1])
    x = weights.reshape(-1, _BLOCK)
    error = np.abs(back.reshape(-1, _BLOCK) - x).max(1)
    step = (x.max(1) - x.min(1)) / 2 ** _BITS[qtype]
    return _BLOCK * int((error <= step / 4).sum())
