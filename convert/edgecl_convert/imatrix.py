"""What a text tells about weights: which columns matter, and how much the output suffers from errors in each tensor.

*Importance.* An error in a weight reaches the layer's output multiplied by the activation that it meets, so a column's
importance is its mean squared activation. Files are llama.cpp's GGUF imatrix: `general.type` is "imatrix", and each
weight NAME has two F32 tensors, `NAME.in_sum2` (sums of squared activations) and `NAME.counts` (tokens summed). What
llama-quantize reads from such a file is what `importance` returns, to the last bit.

*Sensitivity.* Errors of rounding are small and independent, so they cost half the Fisher information of each weight times
its squared error (KL divergence from the float model, in nats per token). A tensor's sensitivity is that half, summed over
its weights: times the mean squared error it is what the tensor's rounding costs. Files of ours carry it as a third F32 tensor,
`NAME.sensitivity`, which llama.cpp passes over.

*Does not cover*: llama.cpp's older binary format, and the per-expert matrices of mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConvertError, GgufError, UnsupportedError
from .ggml import F32Array, QType
from .gguf_file import GgufFile, PlannedTensor, encode_field, write_gguf
from .names import gguf_names
from .source import Source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK_TOKENS = 512  # llama-imatrix's default, so that files of both can be compared
_N_CHUNKS = 128  # of a longer text, as many chunks are taken, evenly spread
_N_FISHER_CHUNKS = 32  # of these, for the sensitivity, whose sums over a million weights settle sooner
_SUMS, _COUNTS, _SENSITIVITY = ".in_sum2", ".counts", ".sensitivity"


@dataclass
class Imatrix:
    """What was measured, by GGUF tensor name.

    Attributes:
        sums: (n_in,) sums of squared activations.
        counts: tokens summed.
        sensitivities: nats per token for a mean squared error of one; empty if they were not measured.
        datasets: names of the texts.
        n_chunks: how many chunks of `chunk_tokens` tokens were run.
    """

    sums: dict[str, F32Array] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    n_chunks: int = 0
    chunk_tokens: int = CHUNK_TOKENS

    def importance(self, name: str) -> F32Array | None:
        """Return the (n_in,) importance of a weight's columns, None where it was not measured."""
        if name not in self.sums:
            return None
        count = self.counts[name]
        return self.sums[name] / np.float32(count) if count else np.ones_like(self.sums[name])  # as llama-quantize has it

    def check_fits(self, source: Source) -> None:
        """Check that this was measured on a model of the same shape.

        Raises:
            ConvertError: column counts differ, or no weight of the model was measured.
        """
        shared = [name for name in self.sums if name in source.tensors]
        if not shared:
            raise ConvertError(f"the importance matrix has none of the weights of {source.path}; measure it on this model")
        for name in shared:
            n_in = source.tensors[name].shape[-1]
            if len(self.sums[name]) != n_in:
                raise ConvertError(
                    f"the importance matrix is of another model: {name} has {n_in} columns in {source.path}, "
                    f"{len(self.sums[name])} in the matrix"
                )

    def write(self, path: Path | str) -> None:
        """Write a GGUF imatrix, whole or not at all.

        Raises:
            ConvertError: the file cannot be written.
        """
        fields = [
            encode_field("general.type", "imatrix"),
            encode_field("imatrix.datasets", self.datasets),
            encode_field("imatrix.chunk_count", self.n_chunks),
            encode_field("imatrix.chunk_size", self.chunk_tokens),
        ]
        values: dict[str, F32Array] = {}
        for name in sorted({*self.sums, *self.sensitivities}):
            if name in self.sums:
                values[name + _SUMS] = self.sums[name].reshape(1, -1)
                values[name + _COUNTS] = np.full((1, 1), self.counts[name], np.float32)
            if name in self.sensitivities:
                values[name + _SENSITIVITY] = np.full((1, 1), self.sensitivities[name], np.float32)
        plan = [PlannedTensor(name, value.shape, QType.F32) for name, value in values.items()]
        write_gguf(path, fields, plan, (value.view(np.uint8) for value in values.values()))

    @classmethod
    def read(cls, path: Path | str) -> Imatrix:
        """Read a GGUF imatrix, ours or llama-imatrix's.

        Raises:
            GgufError: not such a file, or values that cannot be.
            UnsupportedError: it has experts.
        """
        with GgufFile(path) as file:
            if file.get("general.type") != "imatrix":
                raise GgufError(path, "is not an importance matrix: general.type must be imatrix")
            n_chunks, chunk_tokens = file.get("imatrix.chunk_count", 0), file.get("imatrix.chunk_size", CHUNK_TOKENS)
            if not (isinstance(n_chunks, int) and isinstance(chunk_tokens, int)):
                raise GgufError(path, f"chunk_count and chunk_size must be whole numbers, got {n_chunks} and {chunk_tokens}")
            matrix = cls(datasets=list(file.get("imatrix.datasets", [])), n_chunks=n_chunks, chunk_tokens=chunk_tokens)
            for entry, values in _entries(file):
                name, _, kind = entry.rpartition(".")
                if "." + kind == _SUMS:
                    matrix.sums[name] = values
                elif "." + kind == _COUNTS:
                    if values.size > 1:
                        raise UnsupportedError(f"{path}: {name} has experts, which are not supported")
                    matrix.counts[name] = round(float(values[0]))
                elif "." + kind == _SENSITIVITY:
                    matrix.sensitivities[name] = float(values[0])
            if unpaired := matrix.sums.keys() ^ matrix.counts.keys():
                raise GgufError(path, f"has sums or counts of {min(unpaired)}, but not both")
            return matrix


def _entries(file: GgufFile) -> Iterator[tuple[str, F32Array]]:
    for name, info in file.tensors.items():
        if info.qtype != QType.F32:
            raise GgufError(file.path, f"tensor {name} must be F32, got {info.qtype.name}")
        values = file.weights(name).reshape(-1).copy()
        if not (np.isfinite(values).all() and (name.endswith(".in_sum") or (values >= 0).all())):
            raise GgufError(file.path, f"tensor {name} has values that are negative or not finite; measure it again")
        yield name, values


# --- measuring: torch from here on --------------------------------------------------------------------------------------


def read_or_measure(path: Path | str, source: Source) -> Imatrix:
    """Return a GGUF imatrix, or what `measure` finds on a text file (.txt).

    Raises:
        ConvertError: neither, or as `Imatrix.read` and `measure`.
    """
    path = Path(path)
    if path.suffix.lower() != ".txt":
        return Imatrix.read(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from None
    return measure(source, text, path.name)


def measure(source: Source, text: str, dataset: str = "") -> Imatrix:
    """Return importances and sensitivities of a model's weights on a text, computed in torch.

    Args:
        text: at least one chunk of 512 tokens; of a longer one 128 chunks are taken, evenly spread.
        dataset: the text's name, for the file.

    Raises:
        ConvertError: torch or transformers is missing, the model cannot be loaded, or the text is too short.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConvertError(f"measuring needs {error.name}: pip install {error.name}; or give a GGUF imatrix") from None
    model, tokenizer = _load(source.path)
    chunks = torch.tensor(_chunks(tokenizer, text))
    matrix = Imatrix(datasets=[dataset] if dataset else [], n_chunks=len(chunks))
    _measure_importance(model, chunks, source, matrix)
    chosen = np.linspace(0, len(chunks) - 1, min(_N_FISHER_CHUNKS, len(chunks))).round()
    _measure_sensitivity(model, chunks[chosen.astype(np.int64)], source, matrix)
    return matrix


def _load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, options = path, {}
    settings: dict[str, Any] = {"use_safetensors": True}
    if path.is_file():
        folder, options = path.parent, {"gguf_file": path.name}
        settings = {"quantization_config": GgufConfig(dequantize=True)}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, **settings, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConvertError(
            f"{path}: transformers cannot load it to measure it; try its Hugging Face folder: {reason}"
        ) from None
    return model.eval(), tokenizer


def _chunks(tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[int]]:
    """Return chunks of token ids, each behind the BOS token if the tokenizer puts one there."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    n = len(ids) // CHUNK_TOKENS
    if n == 0:
        raise ConvertError(f"the text must have at least {CHUNK_TOKENS} tokens, got {len(ids)}; give a longer one")
    chosen = np.linspace(0, n - 1, min(_N_CHUNKS, n)).round().astype(int)
    chunks = [list(ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS]) for i in chosen]
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        for chunk in chunks:
            chunk[0] = tokenizer.bos_token_id
    return chunks


def _head_name(source: Source) -> str:
    return "output.weight" if "output.weight" in source.tensors else "token_embd.weight"


def _measure_importance(model: PreTrainedModel, chunks: torch.Tensor, source: Source, matrix: Imatrix) -> None:
    import torch

    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:  # x: (B, T, n_in)
        total = x.detach().float().reshape(-1, x.shape[-1]).square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total
        matrix.counts[name] = matrix.counts.get(name, 0) + x.shape[0] * x.shape[1]

    hooks = []
    for name, module in gguf_names(model.named_modules(), source):
        if isinstance(module, torch.nn.Linear) and name != "output.weight":
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0])))
    try:
        with torch.no_grad():
            for chunk in chunks:
                add(_head_name(source), model.base_model(input_ids=chunk[None], use_cache=False)[0])  # no logits needed
    finally:
        for hook in hooks:
            hook.remove()
    matrix.sums = {name: total.float().numpy() for name, total in sums.items()}


def _measure_sensitivity(model: PreTrainedModel, chunks: torch.Tensor, source: Source, matrix: Imatrix) -> None:
    """Fill in half the trace of each matrix's Fisher information per token.

    The Fisher information is the mean squared gradient of the log-likelihood of tokens that the model itself draws.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    traces: dict[str, torch.Tensor] = {}
    hooks = []

    def take(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        total = parameter.grad.square().sum(dtype=torch.float64)
        traces[name] = traces[name] + total if name in traces else total
        parameter.grad = None  # one gradient in memory at a time

    for name, parameter in gguf_names(model.named_parameters(), source):
        parameter.requires_grad_(parameter.ndim > 1)
        if parameter.ndim > 1:
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p)))
    for chunk in chunks:
        logits = model(input_ids=chunk[None], use_cache=False).logits[0].float()  # (T, V)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    matrix.sensitivities = {name: float(total) / chunks.numel() / 2 for name, total in traces.items()}
    if _head_name(source) not in matrix.sensitivities:  # tied in torch, a tensor of its own in the file
        matrix.sensitivities[_head_name(source)] = matrix.sensitivities["token_embd.weight"]
