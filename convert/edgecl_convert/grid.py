"""Adding an update to weights that must stay on the base's own quantization grid.

A night's update is a few percent of a quantization step: rounding to nearest puts every weight back where it was, and
the night is gone. Here each block keeps its scales and only its codes move, by `floor(update / step + u)` with u uniform
in [0, 1): the update survives in expectation, and a weight without an update keeps its code exactly. u is a hash of the
tensor's name and the weight's index, so the same adapter always gives the same file and an update that did not change
from one night to the next does not roll again.

All types go one way: weight = step * code - something that stays. A `_Layout` says where a block keeps its float16
scales, what multiplies them for each group of weights, and the bit planes that its codes are cut into.

*Does not cover*: updates larger than the grid's range, which are clipped (a block's extreme weight is at its end).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .ggml import Bytes, F32Array, QType, block_size


@dataclass(frozen=True)
class _Plane:
    """Some bits of every code of a block: byte j of a run of `width` bytes holds weights j, j + width, j + 2 * width ...

    Attributes:
        where: its bytes within the block; a block's runs follow each other.
        bits: how many bits of a weight's code a byte holds; the first weight's are the lowest.
        shift: where they go within the code.
        flip: bits to invert; 0x80 makes two's complement count from zero.
    """

    where: slice
    bits: int
    width: int
    shift: int = 0
    flip: int = 0

    def unpack(self, blocks: Bytes, shape: tuple[int, ...]) -> Bytes:
        """Return this plane's share of the codes, (blocks, weights), of (blocks, bytes)."""
        run = (blocks[:, self.where] ^ np.uint8(self.flip)).reshape(len(blocks), -1, self.width)
        codes = np.empty(shape, np.uint8)
        for at, view in self._fields(codes):
            view[:] = run >> at & self._mask
        return codes << np.uint8(self.shift) if self.shift else codes

    def pack(self, codes: Bytes, blocks: Bytes) -> None:
        """Write this plane's share of the codes into `blocks`."""
        run = np.array(self.flip, np.uint8)
        for at, view in self._fields(codes >> np.uint8(self.shift) & self._mask):
            run = run ^ view << at
        blocks[:, self.where] = run.reshape(len(blocks), -1)

    @property
    def _mask(self) -> np.uint8:
        return np.uint8((1 << self.bits) - 1)

    def _fields(self, codes: Bytes) -> Iterator[tuple[np.uint8, Bytes]]:
        """Yield each bit position within a byte, and the (blocks, runs, width) view of the codes that are there."""
        views = codes.reshape(len(codes), -1, 8 // self.bits, self.width)
        for i in range(views.shape[2]):
            yield np.uint8(i * self.bits), views[:, :, i]


@dataclass(frozen=True)
class _Layout:
    """How a type keeps a block.

    Attributes:
        scales: the float16 values, the step's first; the others (minimums) only have to be finite.
        factors: (blocks, bytes) -> (blocks, groups) whole numbers that the scale is multiplied with, or None.
    """

    scales: slice
    planes: tuple[_Plane, ...]
    factors: Callable[[Bytes], NDArray[np.generic]] | None = None


def _six_bits(block: Bytes) -> NDArray[np.generic]:
    """Return the (blocks, 8) scales of Q4_K and Q5_K: four in the low bits of a byte, four cut in two."""
    low, rest = block[:, 4:8], block[:, 12:16]
    return np.concatenate([low & np.uint8(63), rest & np.uint8(15) | low >> np.uint8(6) << np.uint8(4)], axis=1)


def _signed_bytes(block: Bytes) -> NDArray[np.generic]:
    """Return the (blocks, 16) scales of Q6_K."""
    return block[:, 192:208].view(np.int8)


# Source: block_q4_0 ... block_q6_K of llama.cpp's ggml-common.h
_LAYOUTS = {
    QType.Q4_0: _Layout(slice(0, 2), (_Plane(slice(2, 18), 4, 16),)),
    QType.Q4_1: _Layout(slice(0, 4), (_Plane(slice(4, 20), 4, 16),)),
    QType.Q5_0: _Layout(slice(0, 2), (_Plane(slice(6, 22), 4, 16), _Plane(slice(2, 6), 1, 1, shift=4))),
    QType.Q5_1: _Layout(slice(0, 4), (_Plane(slice(8, 24), 4, 16), _Plane(slice(4, 8), 1, 1, shift=4))),
    QType.Q8_0: _Layout(slice(0, 2), (_Plane(slice(2, 34), 8, 32, flip=0x80),)),
    QType.Q4_K: _Layout(slice(0, 4), (_Plane(slice(16, 144), 4, 32),), _six_bits),
    QType.Q5_K: _Layout(slice(0, 4), (_Plane(slice(48, 176), 4, 32), _Plane(slice(16, 48), 1, 32, shift=4)), _six_bits),
    QType.Q6_K: _Layout(
        slice(208, 210), (_Plane(slice(0, 128), 4, 64), _Plane(slice(128, 192), 2, 32, shift=4)), _signed_bytes
    ),
}
GRID_TYPES = tuple(_LAYOUTS)


def dither(name: str, first: int, count: int) -> F32Array:
    """Return (count,) fixed pseudo-random numbers in [0, 1) for the weights `first`... of tensor `name`.

    Source:
        The finalizer of MurmurHash3 (Appleby) over index + crc32(name).
    """
    x = np.arange(count, dtype=np.uint32)
    x *= np.uint32(0x9E3779B1)
    x += np.uint32((first * 0x9E3779B1 + zlib.crc32(name.encode("utf-8"))) % 2**32)
    shifted = np.empty_like(x)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= np.right_shift(x, shift, out=shifted)
        x *= np.uint32(factor)
    x ^= np.right_shift(x, 16, out=shifted)
    u = np.right_shift(x, 8, out=shifted).astype(np.float32)
    u *= np.float32(2.0**-24)
    return u


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
    layout, n = _LAYOUTS[qtype], block_size(qtype)
    out = np.array(blocks).reshape(update.size // n, -1)  # (blocks, bytes)
    scales = out[:, layout.scales].copy().view(np.float16)  # (blocks, 1), with a minimum (blocks, 2)
    step = scales[:, :1].astype(np.float32)  # (blocks, 1) or (blocks, groups)
    if layout.factors is not None:
        step = step * layout.factors(out).astype(np.float32)  # 11 bits times 8: exact
    with np.errstate(divide="ignore"):
        inverse = np.where(step == 0, np.float32(0), np.float32(1) / step)
    moves = update.reshape(inverse.size, -1) * inverse.reshape(-1, 1)
    moves += dither(name, first, update.size).reshape(moves.shape)
    np.floor(moves, out=moves)
    if not (np.isfinite(scales).all() and np.isfinite(moves).all()):
        raise ConvertError(f"tensor {name} has NaN or infinite weights or updates; use a sound base and adapter")
    _move_codes(out, layout.planes, moves.reshape(-1, n))
    return out.reshape(blocks.shape)


def _move_codes(out: Bytes, planes: tuple[_Plane, ...], moves: F32Array) -> None:
    """Add whole `moves` (blocks, weights) to the codes of `out` (blocks, bytes), in place, clipped to the codes' range."""
    for plane in planes:
        moves += plane.unpack(out, moves.shape)
    np.clip(moves, 0, 2 ** sum(plane.bits for plane in planes) - 1, out=moves)
    codes = moves.astype(np.uint8)
    for plane in planes:
        plane.pack(codes, out)
