"""Base + adapter -> GGUF, tensor by tensor: the one writer of model files. The base is a GGUF file or a Hugging Face folder.

Weights are always computed from the base, which is never written to; a chunk of rows is decoded, updated and encoded by one
worker while it is in the cache, so peak memory is the largest tensor's blocks, not the model. A tensor whose type does not
change and that the adapter does not touch is copied byte for byte; one that it touches stays on the base's own grid
(`grid`) where the type allows, because rounding to nearest there erases the update: on its minimums where the update is
the same over each block, else on its codes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION
from threadpoolctl import threadpool_limits

from .adapter import Adapter
from .errors import ConvertError, UnsupportedError
from .ggml import (
    FLOAT_TYPES,
    Bytes,
    F32Array,
    QType,
    block_size,
    default_threads,
    dequantize_rows,
    each_chunk,
    is_finite,
    row_bytes,
)
from .gguf_file import GgufFile, PlannedTensor, TensorInfo, copied_fields, encode_field, file_bytes, write_gguf
from .grid import GRID_TYPES, MINIMUM_TYPES, add_on_grid, add_to_minimums, by_block, with_minimums
from .imatrix import Imatrix
from .names import layer_of
from .recipe import Recipe, model_shape
from .source import Source

ROUNDINGS = ("stochastic", "nearest")
_VERSION_KEY = "general.quantization_version"
_IMATRIX_KEYS = "quantize.imatrix."  # what the base itself was quantized with
Progress = Callable[[int, int, str], None]  # (tensors done, tensors, name)


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        merge_s: wall seconds, the final fsync included.
        qtypes: tensors by type in the written file.
        rounded: touched tensors by how they were written: "minimums", "stochastic", "nearest" or "float".
        copied: tensors copied byte for byte.
        notes: what the user should know, such as types that do not divide some rows.
    """

    model_bytes: int = 0
    merge_s: float = 0.0
    qtypes: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)
    copied: int = 0
    notes: list[str] = field(default_factory=list)


def merge(
    base: Source,
    adapter: Adapter | None,
    out: Path | str,
    quant: str | Recipe = "keep",
    rounding: str = "stochastic",
    n_threads: int = 0,
    progress: Progress | None = None,
    imatrix: Imatrix | None = None,
) -> MergeReport:
    """Write `base` with `adapter` merged in (None: re-quantized only) to `out`, whole or not at all.

    Args:
        quant: "keep" leaves every tensor its type; a recipe gives all weights new ones.
        rounding: for touched tensors that keep their grid. Tensors that change type are rounded to nearest.
        imatrix: importance of the columns of what is quantized; tensors that it lacks are quantized without, and noted.

    Raises:
        AdapterError: the adapter does not fit.
        UnsupportedError: unknown recipe, rounding, or a type without a kernel.
        ConvertError: not finite weights, an importance matrix of another model, or the file cannot be written.
    """
    if rounding not in ROUNDINGS:
        raise UnsupportedError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding}")
    check_output(base, out)
    start = time.perf_counter()
    recipe = quant if isinstance(quant, Recipe) else Recipe.named(quant)
    if adapter is not None:
        adapter.check_fits(base)
    if imatrix is not None:
        imatrix.check_fits(base)
    plan = planned_tensors(base, recipe)
    notes = [*base.notes, *_fallbacks(base, recipe, plan), *_unmeasured(base, plan, imatrix)]
    report = MergeReport(qtypes=dict(Counter(tensor.qtype.name for tensor in plan)), notes=notes)

    def tensors() -> Iterator[Bytes]:
        for done, tensor in enumerate(plan):
            if progress:
                progress(done, len(plan), tensor.name)
            importance = imatrix.importance(tensor.name) if imatrix else None
            encode = partial(recipe.quantizer, qtype=tensor.qtype, imatrix=importance)
            info = base.tensors[tensor.name]
            on_grid = rounding == "stochastic" and _stays(base, tensor, recipe)
            yield _tensor(base, info, tensor.qtype, adapter, encode, on_grid, n_threads, report)
            base.release(tensor.name)
        if progress:
            progress(len(plan), len(plan), "")

    with threadpool_limits(1, "blas"):  # each worker multiplies its own rows; BLAS threads would fight over the cores
        report.model_bytes = write_gguf(out, _fields(base, recipe, plan), plan, tensors(), base.alignment)
    report.merge_s = time.perf_counter() - start
    return report


def check_output(base: Source, out: Path | str) -> None:
    """Check that `out` is in a folder that is there, and neither the base nor a file of it.

    Raises:
        ConvertError: it is not.
    """
    target, source = Path(out).resolve(), base.path.resolve()
    if target == source or (target.parent == source and target.suffix != ".gguf"):
        raise ConvertError(f"{out}: is the base itself, or a file of it, which is never overwritten; give another output")
    if not target.parent.is_dir():
        raise ConvertError(f"{out}: cannot be written: {target.parent} is no folder; make it, or give another output")


def planned_bytes(base: Source, recipe: Recipe) -> int:
    """Return the size of the file that `merge` would write."""
    plan = planned_tensors(base, recipe)
    return file_bytes(_fields(base, recipe, plan), plan, base.alignment)


def planned_tensors(base: Source, recipe: Recipe) -> list[PlannedTensor]:
    """Return the tensors of the file that `merge` would write, each with the type that it gets."""
    shape = model_shape(base)
    return [PlannedTensor(info.name, info.shape, recipe.qtype(info, *shape)) for info in base.tensors.values()]


def in_minimums(base: Source, quant: str) -> set[str]:
    """Return the weights of layers whose updates `merge` adds to minimums, where these are the same over each block."""
    recipe = Recipe.named(quant)
    layers = (tensor for tensor in planned_tensors(base, recipe) if layer_of(tensor.name) is not None)
    return {tensor.name for tensor in layers if tensor.qtype in MINIMUM_TYPES and _stays(base, tensor, recipe)}


def _stays(base: Source, tensor: PlannedTensor, recipe: Recipe) -> bool:
    """Return whether a tensor stays on the base's own grid."""
    return (tensor.qtype == base.tensors[tensor.name].qtype or recipe.keeps) and tensor.qtype in GRID_TYPES


def _fields(base: Source, recipe: Recipe, plan: list[PlannedTensor]) -> list[bytes]:
    """Return the base's metadata with the file type of the recipe, and the version of quantized data where there is any."""
    file_type = recipe.file_type(base)
    copied = copied_fields(base, **({} if file_type is None else {"file_type": file_type}))
    named = zip(base.keys, copied, strict=True)
    fields = [field for key, field in named if recipe.keeps or not key.startswith(_IMATRIX_KEYS)]
    is_quantized = any(tensor.qtype not in FLOAT_TYPES for tensor in plan)
    if not recipe.keeps and is_quantized and _VERSION_KEY not in base.keys:
        fields.append(encode_field(_VERSION_KEY, GGML_QUANT_VERSION))
    return fields


def _unmeasured(base: Source, plan: list[PlannedTensor], imatrix: Imatrix | None) -> list[str]:
    """Return a line for the tensors that are quantized without the importance matrix, which lacks them."""
    if imatrix is None:
        return []
    changed = (t.name for t in plan if t.qtype not in FLOAT_TYPES and t.qtype != base.tensors[t.name].qtype)
    missing = [name for name in changed if name not in imatrix.sums]
    return [f"the importance matrix lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"] if missing else []


def _fallbacks(base: Source, recipe: Recipe, plan: list[PlannedTensor]) -> list[str]:
    """Return a line for each type that does not divide the rows of some tensors, and what they get instead."""
    shape = model_shape(base)
    pairs = ((recipe.wanted(base.tensors[tensor.name], *shape), tensor.qtype) for tensor in plan)
    return [
        f"{wanted.name} needs rows that are a multiple of {block_size(wanted)}: {count} tensors got {got.name} instead"
        for (wanted, got), count in Counter(pair for pair in pairs if pair[0] != pair[1]).items()
    ]


def _tensor(
    base: Source,
    info: TensorInfo,
    qtype: QType,
    adapter: Adapter | None,
    encode: Callable[[F32Array], Bytes],
    on_grid: bool,
    n_threads: int,
    report: MergeReport,
) -> Bytes:
    source = base.blocks(info.name)
    n_rows, n_per_row = len(source), info.shape[-1]

    def check(rows: Bytes) -> None:
        if not is_finite(rows, info.qtype):
            raise ConvertError(f"{base.path}: tensor {info.name} has NaN or infinite weights; use a sound base")

    pair = adapter.pairs.get(info.name) if adapter else None
    if pair is None and qtype == info.qtype:
        report.copied += 1
        if qtype in FLOAT_TYPES:
            each_chunk(n_rows, n_per_row, lambda start, stop: check(source[start:stop]), n_threads or default_threads())
        return source
    low = None
    if pair is not None and adapter is not None:
        a, b = pair[0], (pair[1] * np.float32(adapter.scaling(info.name))).astype(np.float32)
        low = by_block(a) if on_grid and qtype in MINIMUM_TYPES else None
        how = "float" if qtype in FLOAT_TYPES else "nearest"
        if on_grid:
            how = "stochastic" if low is None else "minimums"
        report.rounded[how] = report.rounded.get(how, 0) + 1
    out = np.empty((n_rows, row_bytes(qtype, n_per_row)), np.uint8)

    def work(start: int, stop: int) -> None:
        rows = source[start:stop]
        if on_grid:
            if qtype != info.qtype:
                rows = with_minimums(rows, info.qtype, info.name)
            if low is not None:
                rows = add_to_minimums(rows, b[start:stop] @ low, info.name)
            elif pair is not None:
                rows = add_on_grid(rows, qtype, b[start:stop] @ a, info.name, start * n_per_row)
            out[start:stop] = rows
            return
        weights = dequantize_rows(rows, info.qtype, n_per_row)
        if pair is not None:
            weights = np.add(weights, b[start:stop] @ a)
        if not np.isfinite(weights).all():
            raise ConvertError(f"{base.path}: tensor {info.name} has NaN or infinite weights; use a sound base")
        out[start:stop] = encode(weights)
        if qtype == QType.F16 and not is_finite(out[start:stop], qtype):
            raise ConvertError(f"{base.path}: tensor {info.name} has weights beyond the range of F16; give BF16 or F32")

    each_chunk(n_rows, n_per_row, work, n_threads or default_threads())
    return out


def update_survival(base: GgufFile, adapter: Adapter, merged: GgufFile, n_threads: int = 0) -> float:
    """Return how much of the adapter's update is in the merged weights: 1 is all, 0 is none.

    The change of the weights, projected on the update: sum(change * update) / sum(update ** 2) over all touched tensors.
    """
    kept = total = 0.0
    for name, (a, b) in adapter.pairs.items():
        update = (b * np.float32(adapter.scaling(name))) @ a  # (out, in)
        change = merged.weights(name, n_threads) - base.weights(name, n_threads)
        kept += float(np.vdot(change, update))
        total += float(np.vdot(update, update))
    return kept / total if total else 1.0
