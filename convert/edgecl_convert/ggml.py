"""ggml's quantization kernels through ctypes, threaded by rows.

The kernels live in `libggml-base.so`, which llama-cpp-python installs, and the one that rounds to bfloat16 also in
`libggml-cpu.so`, compiled for this CPU. Both are opened by path, so neither llama_cpp nor torch is imported. They are
bit-identical with gguf-py, several times faster, and write the K-quants that gguf-py cannot. Where the library is not
installed, gguf-py's numpy kernels take over (`BACKEND` says which one runs).

*Does not cover*: types that need an importance matrix (IQ1, IQ2), and any type without a gguf size entry.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

from .errors import UnsupportedError

QType: TypeAlias = GGMLQuantizationType
F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Row = Callable[[int, int, int], None]  # ggml's kernels of a row: addresses of source and destination, count

FLOAT_TYPES = (QType.F32, QType.F16, QType.BF16)
# ggml's quantizer ends the whole process on these: no kernel, or none without an importance matrix
_UNWRITTEN = (
    QType.I8, QType.I16, QType.I32, QType.I64, QType.F64, QType.Q8_1, QType.Q8_K,
    QType.IQ1_S, QType.IQ2_XXS, QType.IQ2_XS,
)  # fmt: skip
CHUNK_WEIGHTS = 1 << 18  # weights a worker takes at once: 1 MiB of float32, which stays in the L2 cache
DECODED_AT_ONCE = 1 << 16  # weights between two types: read again at once, so they should still be near


def _library_path(stem: str) -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for ending in ("so", "dylib"):
            if (path := Path(folder) / "lib" / f"{stem}.{ending}").exists():
                return path
    return None


def _load() -> ctypes.CDLL | None:
    path = _library_path("libggml-base")
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # float source
        ctypes.c_void_p,  # destination
        ctypes.c_int64,  # first weight
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # weights per row
        ctypes.c_void_p,  # importance of each input column, or null
    ]
    return lib


_LIB = _load()
BACKEND = "ggml" if _LIB is not None else "gguf-py"

_TO_FLOAT_NAMES = {QType.F16: "ggml_fp16_to_fp32_row", QType.BF16: "ggml_bf16_to_fp32_row"}


@cache
def _to_float(qtype: QType) -> Row | None:
    """Return ggml's decoder of a type, or None."""
    return _row(_LIB, _TO_FLOAT_NAMES.get(qtype, f"dequantize_row_{qtype.name.lower().replace('_k', '_K')}"))


@cache
def _to_bf16() -> Row | None:
    """Return ggml's rounding of float32 to bfloat16: as compiled for this CPU, or for every one, a third as fast."""
    path = _library_path("libggml-cpu")  # loads OpenMP
    fast = _row(ctypes.CDLL(str(path)), "ggml_cpu_fp32_to_bf16") if path else None
    return fast or _row(_LIB, "ggml_fp32_to_bf16_row")


def _row(lib: ctypes.CDLL | None, name: str) -> Row | None:
    function: Any = getattr(lib, name, None) if lib is not None else None
    if function is not None:
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function  # type: ignore[no-any-return]


def qtype_named(name: str) -> QType:
    """Return the tensor type called `name` (Q8_0, q4_k, F16 ...).

    Raises:
        UnsupportedError: no such type.
    """
    try:
        return GGMLQuantizationType[name.upper()]
    except KeyError:
        known = ", ".join(t.name for t in QType if t.name[0] in "FBQ")
        raise UnsupportedError(f"tensor type must be one of {known}; got {name}") from None


def block_size(qtype: QType) -> int:
    """Return the number of weights in one block; rows must be a multiple of it."""
    return int(GGML_QUANT_SIZES[qtype][0])


def row_bytes(qtype: QType, n_per_row: int) -> int:
    """Return the bytes that one row of `n_per_row` weights takes."""
    weights, size = GGML_QUANT_SIZES[qtype]
    return n_per_row // weights * size


def bits_per_weight(qtype: QType) -> float:
    """Return the bits that one weight takes, its share of the scales included."""
    weights, size = GGML_QUANT_SIZES[qtype]
    return float(8 * size / weights)


def bf16_is_fast(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU multiplies bfloat16 faster than float32 (AMX, Armv8.6 BF16, AVX512-BF16 of AMD).

    Intel's AVX512-BF16 is half as fast as its float32 (84 and 160 GFLOPS on a core of a Xeon of the fifth generation); in a
    virtual machine that hides AMX it is all there is.
    """
    words = cpu_words(cpuinfo)
    return not {"amx_bf16", "bf16"}.isdisjoint(words) or {"avx512_bf16", "AuthenticAMD"}.issubset(words)


def cpu_words(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return what Linux says of the CPU, its maker and its flags among them; nothing elsewhere."""
    try:
        return set(cpuinfo.read_text("ascii", "replace").split())
    except OSError:
        return set()


def default_threads() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_chunk(n_rows: int, n_per_row: int, work: Callable[[int, int], None], n_threads: int) -> None:
    """Call `work(first_row, last_row)` over all rows, `n_threads` at a time; the kernels release the GIL."""
    step = max(1, CHUNK_WEIGHTS // n_per_row)
    spans = [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
    if n_threads == 1 or len(spans) == 1:
        for start, stop in spans:
            work(start, stop)
        return
    for done in [_pool(n_threads).submit(work, start, stop) for start, stop in spans]:
        done.result()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "ggml")  # kept: training decodes hundreds of tensors a step


def quantize_rows(weights: F32Array, qtype: QType, imatrix: F32Array | None = None) -> Bytes:
    """Return (rows, row_bytes) blocks of contiguous float32 (rows, n_per_row) weights, on the calling thread.

    Args:
        imatrix: (n_per_row,) importance of each input column, for the types that use one.

    Raises:
        UnsupportedError: the row length is not a multiple of the block, or no kernel writes the type.
    """
    n_rows, n_per_row = weights.shape
    if n_per_row % block_size(qtype):
        raise UnsupportedError(f"{qtype.name} needs rows that are a multiple of {block_size(qtype)} weights, got {n_per_row}")
    if qtype in _UNWRITTEN:
        raise UnsupportedError(f"tensor type {qtype.name} is not written here; give another, such as Q8_0")
    if qtype == QType.F32:
        return np.ascontiguousarray(weights, np.float32).view(np.uint8)
    if _LIB is None:
        try:
            return quants.quantize(weights, qtype).view(np.uint8).reshape(n_rows, -1)
        except NotImplementedError:
            raise UnsupportedError(f"{qtype.name} needs llama-cpp-python's ggml library, which is missing") from None
    out = np.empty((n_rows, row_bytes(qtype, n_per_row)), np.uint8)
    source = np.ascontiguousarray(weights, np.float32)
    importance = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
    _LIB.ggml_quantize_chunk(
        int(qtype),
        source.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n_per_row,
        None if importance is None else importance.ctypes.data,
    )
    return out


def quantize_unshrunk(weights: F32Array, qtype: QType, imatrix: F32Array | None = None) -> Bytes:
    """Return `quantize_rows` of rows that are scaled up by as much as rounding shrinks them.

    The kernels choose scales by least squares, and a least-squares fit is smaller than what it fits: by 1 to 10% of a row at
    3 and 2 bits. The other errors are independent from weight to weight, this one adds up over columns, rows and layers.
    """
    blocks = quantize_rows(weights, qtype, imatrix)
    if qtype in FLOAT_TYPES:
        return blocks
    columns = np.float32(1) if imatrix is None else imatrix
    rounded = dequantize_rows(blocks, qtype, weights.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = (columns * weights * weights).sum(1) / (columns * weights * rounded).sum(1)  # (rows,)
    factors = np.where(np.abs(factors - 1) < 0.5, factors, 1).astype(np.float32)  # rows of zeros, NaN
    return quantize_rows(weights * factors[:, None], qtype, imatrix)


def dequantize_rows(blocks: Bytes, qtype: QType, n_per_row: int, out: F32Array | None = None) -> F32Array:
    """Return float32 (rows, n_per_row) weights of (rows, row_bytes) blocks, on the calling thread.

    Args:
        out: contiguous (rows, n_per_row), to be filled and returned.

    Raises:
        UnsupportedError: no kernel reads the type.
    """
    n_rows = len(blocks)
    source = np.ascontiguousarray(blocks)
    if out is None:
        out = np.empty((n_rows, n_per_row), np.float32)
    decode = _to_float(qtype)
    if qtype == QType.F32 or decode is None:
        try:
            out[:] = quants.dequantize(source, qtype).reshape(n_rows, n_per_row)
        except NotImplementedError:
            raise UnsupportedError(f"no kernel reads tensor type {qtype.name}") from None
        return out
    decode(source.ctypes.data, out.ctypes.data, out.size)
    return out


def is_finite(blocks: Bytes, qtype: QType) -> bool:
    """Return whether no weight of (rows, row_bytes) blocks of a float type is NaN or infinite: exponents that are all ones."""
    bits = {QType.F32: 0x7F800000, QType.F16: 0x7C00, QType.BF16: 0x7F80}[qtype]
    exponent: np.uint32 | np.uint16 = np.uint32(bits) if qtype == QType.F32 else np.uint16(bits)
    return not ((blocks.view(exponent.dtype) & exponent) == exponent).any()


def quantize(weights: F32Array, qtype: QType, imatrix: F32Array | None = None, n_threads: int = 0) -> Bytes:
    """Return `quantize_rows` of a whole (rows, n_per_row) tensor, computed on `n_threads` (0: every core)."""
    n_rows, n_per_row = weights.shape
    if n_per_row % block_size(qtype):
        return quantize_rows(weights, qtype)  # raises
    out = np.empty((n_rows, row_bytes(qtype, n_per_row)), np.uint8)

    def work(start: int, stop: int) -> None:
        out[start:stop] = quantize_rows(weights[start:stop], qtype, imatrix)

    each_chunk(n_rows, n_per_row, work, n_threads or default_threads())
    return out


def dequantize(blocks: Bytes, qtype: QType, n_per_row: int, n_threads: int = 0) -> F32Array:
    """Return `dequantize_rows` of a whole tensor, computed on `n_threads` (0: every core)."""
    weights = np.empty((len(blocks), n_per_row), np.float32)

    def work(start: int, stop: int) -> None:
        dequantize_rows(blocks[start:stop], qtype, n_per_row, weights[start:stop])

    each_chunk(len(blocks), n_per_row, work, n_threads or default_threads())
    return weights


def dequantize_into(tensors: Sequence[tuple[Bytes, QType, NDArray[Any]]], n_threads: int = 0) -> None:
    """Write the weights of whole tensors where they are wanted.

    Every thread takes its share of the rows of each tensor: waking one takes as long as decoding 100,000 weights.

    Args:
        tensors: blocks, their type, and where the weights go, contiguous (rows, n_per_row): float32, or uint16 for the bits
            of bfloat16.
        n_threads: 0 for every core.
    """
    if _LIB is None or any(_to_float(qtype) is None for _, qtype, _ in tensors):
        for blocks, qtype, out in tensors:
            weights = dequantize(blocks, qtype, out.shape[1], n_threads)
            bits = weights.view(np.uint32)
            is_float = out.dtype == np.float32
            out[:] = weights if is_float else (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # halves to even
        return
    threads = n_threads or default_threads()
    sources = [np.ascontiguousarray(blocks) for blocks, _, _ in tensors]

    def work(share: int) -> None:
        wide = np.empty(max(DECODED_AT_ONCE, *(out.shape[1] for _, _, out in tensors)), np.float32)
        for source, (_, qtype, out) in zip(sources, tensors, strict=True):
            start, stop = len(out) * share // threads, len(out) * (share + 1) // threads
            _decode_into(source, qtype, out, wide, start, stop)

    others = [_pool(threads).submit(work, share) for share in range(1, threads)]
    work(0)
    for done in others:
        done.result()


def _decode_into(source: Bytes, qtype: QType, out: NDArray[Any], wide: F32Array, start: int, stop: int) -> None:
    """Decode some rows; addresses only, because between two calls the other threads wait for the GIL."""
    decode = _to_float(qtype)
    assert decode is not None
    n_per_row, n_row_bytes = out.shape[1], source.shape[1]
    from_, between, to = source.ctypes.data, wide.ctypes.data, out.ctypes.data
    if out.dtype == np.float32:
        decode(from_ + start * n_row_bytes, to + 4 * start * n_per_row, (stop - start) * n_per_row)
        return
    to_bf16 = _to_bf16()
    assert to_bf16 is not None
    step = len(wide) // n_per_row
    for first in range(start, stop, step):
        n = (min(first + step, stop) - first) * n_per_row
        decode(from_ + first * n_row_bytes, between, n)
        to_bf16(between, to + 2 * first * n_per_row, n)
