"""Adding an update to weights that must stay on the base's own quantization grid.

A night's update is a few percent of a quantization step: rounding to nearest puts every weight back where it was, and
the night is gone. There are two ways that keep it.

*Minimums.* A block of Q4_1 or Q5_1 is 32 times step * code + minimum. An update that is the same for all of a block's
weights is added to its minimum, and no code moves (QA-LoRA, Xu et al. 2024). What is lost is what float16 leaves of the
minimum: about a thousandth of a step. Weights of other types of 4 and 5 bits have a place in these (`with_minimums`).

*Codes.* Any other update moves codes, by `floor(update / step + u)` with u uniform in [0, 1): scales stay, the update
survives in expectation, and a weight without an update keeps its code exactly. u is a hash of the tensor's name and the
weight's index, so the same adapter always gives the same file and an update that did not change from one night to the
next does not roll again.

All types go one way: weight = step * code - something that stays. A `_Layout` says where a block keeps its float16
scales, what multiplies them for each group of weights, and the bit planes that its codes are cut into.

*Does not cover*: updates of codes larger than the grid's range, which are clipped (a block's extreme weight is at its end).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .ggml import Bytes, F32Array, QType, block_size, dequantize_rows, row_bytes


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
MINIMUM_BLOCK = 32  # weights that have a minimum in common
WITH_MINIMUMS = {
    QType.Q4_0: QType.Q4_1, QType.Q4_1: QType.Q4_1, QType.Q4_K: QType.Q4_1,
    QType.Q5_0: QType.Q5_1, QType.Q5_1: QType.Q5_1, QType.Q5_K: QType.Q5_1,
}  # fmt: skip
MINIMUM_TYPES = (*dict.fromkeys(WITH_MINIMUMS.values()),)


def with_minimums(blocks: Bytes, qtype: QType, name: str) -> Bytes:
    """Return `blocks` (rows, row_bytes) as the type that WITH_MINIMUMS has for `qtype`: the same codes, other scales.

    Of Q4_0 and Q5_0 weights stay what they are. Those of Q4_K and Q5_K, whose steps and minimums are products of a float16 and
    six bits, are rounded to float16: by a 60th of a step at most, or by what float16 leaves of a larger minimum.

    Raises:
        ConvertError: scales or minimums that are not finite, or beyond the range of float16.
    """
    target = WITH_MINIMUMS[qtype]
    if target == qtype:
        return blocks
    layout, n = _LAYOUTS[qtype], block_size(qtype)
    flat = np.array(blocks).reshape(-1, row_bytes(qtype, n))  # (blocks, bytes)
    steps = _steps(flat, layout).ravel()  # of each 32 weights, in all of these types
    codes = np.zeros((len(flat), n), np.uint8)
    for plane in layout.planes:
        codes += plane.unpack(flat, codes.shape)
        plane.pack(np.zeros_like(codes), flat)
    minimums = dequantize_rows(flat, qtype, n)[:, ::MINIMUM_BLOCK].ravel()  # what weights are where their code is 0
    out = np.empty((len(steps), row_bytes(target, MINIMUM_BLOCK)), np.uint8)
    with np.errstate(over="ignore"):
        halves = np.stack([steps, minimums], 1).astype(np.float16)
    _check_finite(name, halves)
    out[:, :4] = halves.view(np.uint8)
    for plane in _LAYOUTS[target].planes:
        plane.pack(codes.reshape(-1, MINIMUM_BLOCK), out)
    return out.reshape(len(blocks), -1)


def by_block(a: F32Array) -> F32Array | None:
    """Return lora_A (r, in / 32) where all weights of a block get the same of (r, in), None where they do not."""
    r, n_in = a.shape
    blocks = a.reshape(r, -1, MINIMUM_BLOCK) if n_in % MINIMUM_BLOCK == 0 else None
    return blocks[..., 0] if blocks is not None and (blocks == blocks[..., :1]).all() else None


def add_to_minimums(blocks: Bytes, update: F32Array, name: str) -> Bytes:
    """Return `blocks` with `update` added to their minimums; codes and scales stay bit for bit.

    Args:
        blocks: (rows, row_bytes) of Q4_1 or Q5_1.
        update: (rows, n_per_row / 32), the same for all weights of a block.

    Raises:
        ConvertError: scales, minimums or updates that are not finite, or beyond the range of float16.
    """
    out = np.array(blocks).reshape(update.size, -1)  # (blocks, bytes)
    halves = out[:, :4].copy().view(np.float16)  # step and minimum
    with np.errstate(over="ignore", invalid="ignore"):
        halves[:, 1] = halves[:, 1].astype(np.float32) + update.ravel()
    _check_finite(name, halves)
    out[:, :4] = halves.view(np.uint8)
    return out.reshape(blocks.shape)


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
    step = _steps(out, layout)
    with np.errstate(divide="ignore"):
        inverse = np.where(step == 0, np.float32(0), np.float32(1) / step)
    moves = update.reshape(inverse.size, -1) * inverse.reshape(-1, 1)
    moves += dither(name, first, update.size).reshape(moves.shape)
    np.floor(moves, out=moves)
    _check_finite(name, _scales(out, layout), moves)
    _move_codes(out, layout.planes, moves.reshape(-1, n))
    return out.reshape(blocks.shape)


def _scales(blocks: Bytes, layout: _Layout) -> NDArray[np.float16]:
    """Return the float16 values of (blocks, bytes): the step's, and a minimum's where there is one."""
    return blocks[:, layout.scales].copy().view(np.float16)


def _steps(blocks: Bytes, layout: _Layout) -> F32Array:
    """Return the step of each group of weights, (blocks, groups), of (blocks, bytes)."""
    step = _scales(blocks, layout)[:, :1].astype(np.float32)
    return step if layout.factors is None else step * layout.factors(blocks).astype(np.float32)  # 11 bits times 8: exact


def _check_finite(name: str, *found: NDArray[np.floating]) -> None:
    if not all(np.isfinite(values).all() for values in found):
        raise ConvertError(f"tensor {name} has NaN or infinite weights or updates; use a sound base and adapter")


def _move_codes(out: Bytes, planes: tuple[_Plane, ...], moves: F32Array) -> None:
    """Add whole `moves` (blocks, weights) to the codes of `out` (blocks, bytes), in place, clipped to the codes' range."""
    for plane in planes:
        moves += plane.unpack(out, moves.shape)
    np.clip(moves, 0, 2 ** sum(plane.bits for plane in planes) - 1, out=moves)
    codes = moves.astype(np.uint8)
    for plane in planes:
        plane.pack(codes, out)
