"""What precision a model can take, measured before anything is quantized for good.

Perplexity at full precision, and the gap in percent when the weights are rounded, two ways: to the GGUF types that `int8`
and `int4` stand for, and by a plain symmetric rounding to nearest with one scale per group of weights, which needs neither
calibration nor a kernel (the rounded weights are written as floats). Beside that what explains the gaps: excess kurtosis
by tensor, and the share of weights that lie on a quantization grid already.

*Does not cover*: activations. llama.cpp rounds them to 8 bits where weights are quantized, so that rounding is inside the
gap of the GGUF types and outside the group probe's.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError, UnsupportedError
from .ggml import FLOAT_TYPES, Bytes, F32Array, QType, default_threads, dequantize_rows, each_chunk, quantize_rows, row_bytes
from .gguf_file import PlannedTensor, TensorInfo, copied_fields, write_gguf
from .merge import merge, planned_tensors
from .names import layer_of
from .perplexity import nats_per_token
from .recipe import KEEP, Recipe, is_weight, resolve_quant
from .source import Source
from .weight_facts import GRID_TYPES, TensorFacts, tensor_facts

NO_LOSS_PERCENT = 1.0  # 0.01 nats a token: two pages of one author differ by more
MAX_GAP_PERCENT = 5.0  # 0.05 nats a token: beyond it a smaller model at more bits is often the better use of the bytes
ERASED_SHARE = 0.5  # of the weights on the INT4 grid, which round back to where they were: most of an update is lost
GRIDS = (QType.Q4_0, QType.Q4_1, QType.Q8_0)  # that every tensor is tried on, beside its own type and its INT4 type

Progress = Callable[[int, int, str], None]  # (steps done, steps, what)
Nats = NDArray[np.float64]  # (tokens,) negative log-likelihoods


@dataclass(frozen=True)
class Gap:
    """What one way of rounding the weights costs.

    Attributes:
        how: a GGUF type or mixture, or "8-bit groups of 128".
        percent: rise of the perplexity over full precision.
        margin: half of the 95% interval of `percent`, from the paired differences token by token.
    """

    how: str
    perplexity: float
    percent: float
    margin: float


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found; `dataclasses.asdict` of it is JSON. Only weight matrices count, norms and biases do not.

    Attributes:
        qtypes: weights by the type they are stored in.
        quantized: some of them are, so that every gap is against a model that has lost something already.
        perplexity: of the float weights, or of what the quantized ones decode to.
        gaps: int8, int4 (GGUF types; the model's own 4-bit types where it has them), int8_group, int4_group.
        kurtosis_median: over the tensors.
        on_grid: share of all weights that lie on a type's grid.
        erased: share of the weights that rounding to the nearest INT4 value puts back where they were.
    """

    model: str
    architecture: str
    n_weights: int
    qtypes: dict[str, int]
    quantized: bool
    group_size: int
    n_tokens: int
    perplexity: float
    gaps: dict[str, Gap]
    kurtosis_median: float
    on_grid: dict[str, float]
    erased: float
    verdict: str
    tensors: list[TensorFacts]


def default_text() -> str:
    """Return the text that is measured on unless another is given: prose and a few lines of code, written for this."""
    return (Path(__file__).resolve().parent / "probe.txt").read_text("utf-8")


def check_probeable(source: Source) -> None:
    """Check that a source is a whole language model.

    Raises:
        UnsupportedError: it is not.
    """
    if "token_embd.weight" not in source.tensors:
        raise UnsupportedError(f"{source.path}: is not a language model, it has no token_embd.weight; give a model")


def probe(
    source: Source, text: str = "", group_size: int = 128, n_threads: int = 0, progress: Progress | None = None
) -> ProbeReport:
    """Measure what rounding its weights costs a model; one temporary file at a time, removed in any case.

    Args:
        text: measured on; "" is `default_text`.
        group_size: weights along the input that share a scale in the group probe.

    Raises:
        UnsupportedError: not a language model, or a group size below 1.
        ConvertError: not finite weights, no room for a temporary file, or llama.cpp refuses the model.
    """
    check_probeable(source)
    if group_size < 1:
        raise UnsupportedError(f"group size must be at least 1, got {group_size}")
    infos = [info for info in source.tensors.values() if is_weight(info)]
    int4 = resolve_quant("int4", source)
    int4_types = {tensor.name: tensor.qtype for tensor in planned_tensors(source, Recipe.named(int4))}
    steps = _Steps(len(infos) + 5, progress)
    facts = []
    for info in infos:
        steps.begin(info.name)
        grids = dict.fromkeys((*GRIDS, info.qtype, int4_types[info.name]))
        facts.append(tensor_facts(source, info.name, [t for t in grids if t in GRID_TYPES], n_threads))
        source.release(info.name)
    nats = _measured(source, text or default_text(), int4, group_size, n_threads, steps)
    steps.begin("")
    own = Counter(info.qtype.name for info in infos if layer_of(info.name) is not None).most_common(1)
    names = {"int8": "Q8_0", "int4": own[0][0] if int4 == KEEP else int4}
    names |= {f"int{bits}_group": f"{bits}-bit groups of {group_size}" for bits in (8, 4)}
    gaps = {key: _gap(name, nats["full"], nats[key]) for key, name in names.items()}

    n_weights = sum(f.n_weights for f in facts)
    qtypes: Counter[str] = Counter()
    on_grid: dict[str, float] = {}
    for f in facts:
        qtypes[f.qtype] += f.n_weights
        for name, share in f.on_grid.items():
            on_grid[name] = on_grid.get(name, 0.0) + share * f.n_weights / n_weights
    erased = sum(f.on_grid.get(int4_types[f.name].name, 0.0) * f.n_weights for f in facts) / n_weights
    quantized = [name for name, _ in qtypes.most_common() if name not in {qtype.name for qtype in FLOAT_TYPES}]
    n_tokens = len(nats["full"])
    return ProbeReport(
        model=str(source.path),
        architecture=source.architecture,
        n_weights=n_weights,
        qtypes=dict(qtypes.most_common()),
        quantized=bool(quantized),
        group_size=group_size,
        n_tokens=n_tokens,
        perplexity=math.exp(nats["full"].mean()),
        gaps=gaps,
        kurtosis_median=float(np.median([f.kurtosis for f in facts])),
        on_grid=on_grid,
        erased=erased,
        verdict=_verdict(gaps, int4 == KEEP, quantized, erased, n_tokens),
        tensors=facts,
    )


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = -1, total, progress

    def begin(self, what: str) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total, what)


# --- perplexity -------------------------------------------------------------------------------------------------------


def _measured(source: Source, text: str, int4: str, group_size: int, n_threads: int, steps: _Steps) -> dict[str, Nats]:
    """Return the nats per token of the model at full precision and rounded in each of four ways."""
    float_type = (
        QType.F32 if any(info.qtype == QType.F32 and is_weight(info) for info in source.tensors.values()) else QType.F16
    )
    out = {}
    with tempfile.TemporaryDirectory(prefix="edgecl-probe-") as folder:
        _check_room(source, Path(folder), float_type)
        path = Path(folder) / "model.gguf"
        for key, quant in (("full", float_type.name), ("int8", "Q8_0"), ("int4", int4)):
            steps.begin("full precision" if key == "full" else key)
            merge(source, None, path, quant, n_threads=n_threads)
            out[key] = _nats(source, path, text, n_threads)
        for bits in (8, 4):
            steps.begin(f"{bits}-bit groups")
            write_rounded(source, path, float_type, bits, group_size, n_threads)
            out[f"int{bits}_group"] = _nats(source, path, text, n_threads)
    return out


def _nats(source: Source, path: Path, text: str, n_threads: int) -> Nats:
    try:
        nats = nats_per_token(path, text, n_threads)
    except ConvertError as error:
        raise ConvertError(f"{source.path}: {error}") from None
    finally:
        path.unlink()  # before the next one is written
    if not np.isfinite(nats).all():
        raise ConvertError(f"{source.path}: llama.cpp computes NaN or infinite logits; use a sound model")
    return nats


def _check_room(source: Source, folder: Path, qtype: QType) -> None:
    needed = sum(tensor.n_bytes for tensor in _float_plan(source, qtype))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConvertError(
            f"{source.path}: a probe writes a temporary file of {needed / 1e6:.1f} MB, {folder.parent} has {free / 1e6:.1f} MB "
            f"left; set TMPDIR to a folder with more room"
        )


def _gap(how: str, full: Nats, rounded: Nats) -> Gap:
    change = rounded - full
    ratio = math.exp(change.mean())
    error = float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.inf
    return Gap(how, math.exp(rounded.mean()), 100 * (ratio - 1), 100 * ratio * 1.96 * error)


# --- the group probe --------------------------------------------------------------------------------------------------


def round_groups(weights: F32Array, bits: int, group_size: int) -> F32Array:
    """Return (rows, n_per_row) weights rounded to nearest, symmetrically, with one scale per group of a row.

    A group's scale is its largest magnitude / (2 ** (bits - 1) - 1); the last group of a row may be shorter.
    """
    out = np.empty_like(weights)
    for first in range(0, weights.shape[1], group_size):
        group = weights[:, first : first + group_size]
        scale = np.abs(group).max(1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
        scale[scale == 0] = 1
        out[:, first : first + group_size] = np.rint(group / scale) * scale
    return out


def _float_plan(source: Source, qtype: QType) -> list[PlannedTensor]:
    return [PlannedTensor(i.name, i.shape, qtype if is_weight(i) else i.qtype) for i in source.tensors.values()]


def write_rounded(source: Source, out: Path, qtype: QType, bits: int, group_size: int, n_threads: int = 0) -> None:
    """Write a source as a float GGUF of `qtype` whose weights went through `round_groups`."""

    def rounded(info: TensorInfo) -> Bytes:
        blocks, n_per_row = source.blocks(info.name), info.shape[-1]
        encoded = np.empty((len(blocks), row_bytes(qtype, n_per_row)), np.uint8)

        def work(start: int, stop: int) -> None:
            weights = dequantize_rows(blocks[start:stop], info.qtype, n_per_row)
            encoded[start:stop] = quantize_rows(round_groups(weights, bits, group_size), qtype)

        each_chunk(len(blocks), n_per_row, work, n_threads or default_threads())
        return encoded

    def data() -> Iterator[Bytes]:
        for info in source.tensors.values():
            yield rounded(info) if is_weight(info) else source.blocks(info.name)
            source.release(info.name)

    write_gguf(out, copied_fields(source), _float_plan(source, qtype), data(), source.alignment)


# --- the verdict ------------------------------------------------------------------------------------------------------


def _verdict(gaps: dict[str, Gap], own_int4: bool, quantized: list[str], erased: float, n_tokens: int) -> str:
    """Return one sentence: what precision the model can take, and what nearest rounding to INT4 would do to an update."""
    parts = []
    if quantized:
        state = "INT4" if own_int4 else "quantized"
        parts.append(f"is {state} already ({', '.join(quantized)}), so every gap is against a quantized model")
    if not own_int4:
        parts.append(_precision(gaps["int8"], gaps["int4"]))
        if any(abs(gap.percent - MAX_GAP_PERCENT) < gap.margin for gap in (gaps["int8"], gaps["int4"])):
            parts.append(f"that is too close to the limit of {MAX_GAP_PERCENT:.0f}% to be sure on {n_tokens} tokens")
    fate = "would be erased" if erased > ERASED_SHARE else "would mostly be kept"
    parts.append(f"an update merged back to INT4 by nearest rounding {fate} ({erased:.0%} of the weights are on that grid)")
    return f"This model {'; '.join(parts)}."


def _precision(int8: Gap, int4: Gap) -> str:
    taken = next((gap for gap in (int4, int8) if gap.percent <= MAX_GAP_PERCENT), None)
    if taken is None:
        return f"needs full precision: even {int8.how} costs {int8.percent:.1f}% of perplexity"
    loss = "without loss" if taken.percent <= NO_LOSS_PERCENT else f"at a cost of {taken.percent:.1f}% of perplexity"
    refused = f", but not INT4 ({int4.how} costs {int4.percent:.1f}%)" if taken is int8 else ""
    return f"takes {'INT8' if taken is int8 else 'INT4'} ({taken.how}) {loss}{refused}"
