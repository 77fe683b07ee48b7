"""Adding an update to weights that must stay on the base's own quantization grid.

A night's update is a few percent of a quantization step: rounding to nearest puts every weight back where it was, and
the night is gone. Here each block keeps its scales and only its codes move, by `floor(update / step + u)` with u uniform
in [0, 1): the update survives in expectation, and a weight without an update keeps its code exactly. u is a hash of the
tensor's name and the weight's index, so the same adapter always gives the same file and an update that did not change
from one night to the next does not roll again.

*Does not cover*: updates larger than the grid's range, which are clipped (a block's extreme weight is at its end).
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .ggml import Bytes, F32Array, QType

GRID_TYPES = (QType.Q4_0, QType.Q4_1, QType.Q8_0)

_BLOCK = 32  # weights per block of each type above
_SCALE_BYTES = {QType.Q4_0: 2, QType.Q4_1: 4, QType.Q8_0: 2}  # scale, and for Q4_1 a minimum, as float16


def dither(name: str, first: int, count: int) -> F32Array:
    """Return (count,) fixed pseudo-random numbers in [0, 1) for the weights `first`... of tensor `name`.

    Source:
        The finalizer of MurmurHash3 (Appleby) over index + crc32(name).
    """
    x: NDArray[np.uint32] = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    x *= np.uint32(0x9E3779B1)
    x += np.uint32(zlib.crc32(name.encode("utf-8")))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    x >>= np.uint32(8)
    return x.astype(np.float32) * np.float32(2.0**-24)


def add_on_grid(blocks: Bytes, qtype: QType, update: F32Array, name: str, first: int = 0) -> Bytes:
    """Return `blocks` with `update` added to their codes by stochastic rounding; scales stay bit for bit.

    Args:
        blocks: (rows, row_bytes) of a type in GRID_TYPES.
        update: (rows, n_per_row) to be added to the weights.
        name: the tensor's name, for the dither.
        first: index of the first weight within the tensor.

    Raises:
        ConvertError: scales or updates that are not finite.
    """
    n_rows = len(update)
    scale_bytes = _SCALE_BYTES[qtype]
    out = np.array(blocks).reshape(-1, (blocks.size // (update.size // _BLOCK)))  # (blocks, bytes)
    scales = out[:, :scale_bytes].copy().view(np.float16)  # (blocks, 1), with a minimum (blocks, 2)
    step = scales[:, :1].astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(step == 0, np.float32(0), np.float32(1) / step)
    moves = update.reshape(-1, _BLOCK) * inverse
    moves += dither(name, first, update.size).reshape(-1, _BLOCK)
    np.floor(moves, out=moves)
    if not (np.isfinite(scales).all() and np.isfinite(moves).all()):
        raise ConvertError(f"tensor {name} has NaN or infinite weights or updates; use a sound base and adapter")
    if qtype == QType.Q8_0:
        codes = out[:, scale_bytes:].view(np.int8)
        codes[:] = np.clip(moves + codes, -128, 127).astype(np.int8)
    else:
        packed = out[:, scale_bytes:]  # (blocks, 16): low nibbles are weights 0..15, high nibbles 16..31
        low = np.clip(moves[:, :16] + (packed & 15), 0, 15).astype(np.uint8)
        high = np.clip(moves[:, 16:] + (packed >> 4), 0, 15).astype(np.uint8)
        packed[:] = low | (high << 4)
    return out.reshape(n_rows, -1)
