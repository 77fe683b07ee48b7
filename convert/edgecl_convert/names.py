"""How transformers and GGUF name the same tensor, and where their rows lie.

One table for the architectures whose modules share transformers' naming: llama, qwen2, qwen3, gemma3. llama's rotary
halves are interleaved in GGUF, so its q and k rows (and the rows of their lora_B) are permuted; the others are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from numpy.typing import NDArray

from .errors import AdapterError, GgufError, UnsupportedError

if TYPE_CHECKING:
    from .source import Source

T = TypeVar("T")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

# GGUF short name -> transformers module, for the seven projections that LoRA may touch
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BY_MODULE = {module: short for short, module in PROJECTIONS.items()}
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GEMMA3_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"(?:\w+\.)?blk\.(\d+)\.", re.ASCII)
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def check_architecture(gguf: Source) -> str:
    """Return the file's architecture.

    Raises:
        UnsupportedError: it is not one of ARCHITECTURES.
    """
    architecture = gguf.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{gguf.path}: architecture {architecture or 'unknown'} is not supported; "
            f"allowed: {', '.join(ARCHITECTURES)}; use a base of one of these"
        )
    return architecture


def module_of(gguf_name: str, architecture: str) -> str:
    """Return transformers' name of a GGUF tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight.

    Raises:
        UnsupportedError: the tensor has no counterpart.
    """
    stem, _, kind = gguf_name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    norms = _NORMS | _GEMMA3_NORMS if architecture == "gemma3" else _NORMS
    match stem.split("."):
        case ["blk", layer, short] if layer.isdigit() and (module := PROJECTIONS.get(short) or norms.get(short)):
            return f"model.layers.{layer}.{module}.{kind}"
    raise UnsupportedError(f"tensor {gguf_name} of architecture {architecture} has no counterpart in transformers")


def projection_of(module: str) -> str:
    """Return GGUF's name of a transformers projection: model.layers.3.mlp.up_proj -> blk.3.ffn_up.weight.

    Raises:
        AdapterError: it is not one of the seven projections of a layer.
    """
    prefix, _, rest = module.partition("layers.")
    layer, _, name = rest.partition(".")
    if prefix.endswith("model.") and layer.isdigit() and name in _BY_MODULE:
        return f"blk.{int(layer)}.{_BY_MODULE[name]}.weight"
    raise AdapterError(
        f"adapter trains {module}, which GGUF LoRA cannot express here; allowed: {', '.join(_BY_MODULE)} of a layer"
    )


def layer_of(gguf_name: str) -> int | None:
    """Return the layer that a tensor is of: 3 for blk.3.attn_q.weight and dec.blk.3.attn_q.weight; None for one of no layer."""
    found = _LAYER.match(gguf_name)
    return int(found[1]) if found else None


def n_heads_permuted(gguf_name: str, architecture: str, metadata: Mapping[str, Any]) -> int:
    """Return how many heads' rows are interleaved in GGUF, 0 where rows are in transformers' order.

    Args:
        metadata: holds n_head and n_head_kv.
    """
    if architecture != "llama":
        return 0
    if ".attn_q." in gguf_name:
        return int(metadata["n_head"])
    return int(metadata["n_head_kv"]) if ".attn_k." in gguf_name else 0


def head_counts(gguf: Source) -> dict[str, int]:
    """Return n_head and n_head_kv of a model.

    Raises:
        GgufError: they are missing, or differ from layer to layer.
    """
    prefix = f"{gguf.architecture}.attention."
    n_head = gguf.require(prefix + "head_count")
    n_head_kv = gguf.get(prefix + "head_count_kv", n_head)
    if not isinstance(n_head, int) or not isinstance(n_head_kv, int) or min(n_head, n_head_kv) < 1:
        raise GgufError(gguf.path, "has head counts that are missing or differ from layer to layer; not supported")
    return {"n_head": n_head, "n_head_kv": n_head_kv}


def to_gguf_rows(weights: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Return (out, in) rows in GGUF's order: each head's two rotary halves interleaved. n_heads 0: unchanged."""
    if not n_heads:
        return weights
    half = weights.shape[0] // n_heads // 2
    return weights.reshape(n_heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def from_gguf_rows(weights: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Return (out, in) rows in transformers' order; the inverse of `to_gguf_rows`."""
    if not n_heads:
        return weights
    half = weights.shape[0] // n_heads // 2
    return np.ascontiguousarray(weights.reshape(n_heads, half, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape))


def gguf_names(items: Iterable[tuple[str, T]], source: Source) -> Iterator[tuple[str, T]]:
    """Yield (GGUF name of the weight, item) for each of torch's named modules or parameters that is a weight in `source`."""
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == source.architecture), None)
    if arch is None:
        raise UnsupportedError(f"{source.path}: gguf knows no architecture {source.architecture}")
    names = get_tensor_name_map(arch, int(source.require(f"{source.architecture}.block_count")))
    for module, item in items:
        name = names.get_name(module.removesuffix(".weight"))
        if name is not None and f"{name}.weight" in source.tensors:
            yield f"{name}.weight", item
