"""Base weights: a GGUF file as a transformers model in torch, decoded one tensor at a time.

The configuration is built from the GGUF metadata and the weights are decoded with ggml's kernels straight into the dtype of
training, so peak memory is the model plus one tensor. What llama.cpp would compute differently (a rotary scaling that is
not carried over) is refused, never ignored; parity with llama.cpp's logits is tested for each architecture.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.initialization import no_init_weights

from edgecl_convert import GgufFile, UnsupportedError
from edgecl_convert.names import check_architecture, from_gguf_rows, head_counts, module_of, n_heads_permuted

from .attention import NAME

_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}

# fields by which llama.cpp computes something else, and the value that changes nothing
_NOT_CARRIED_OVER = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "final_logit_softcapping": 0.0,
}


def bf16_is_fast() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, Armv8.6 BF16)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            flags = set(handle.read().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def config_from_gguf(gguf: GgufFile) -> PreTrainedConfig:
    """Return the transformers configuration of a GGUF model.

    Raises:
        UnsupportedError: an architecture, a rotary scaling or a soft cap that is not carried over.
        GgufError: a field is missing.
    """
    architecture = check_architecture(gguf)
    heads = head_counts(gguf)

    def field(name: str, default: Any = None) -> Any:
        key = f"{architecture}.{name}"
        return gguf.require(key) if default is None else gguf.get(key, default)

    for name, neutral in _NOT_CARRIED_OVER.items():
        if field(name, neutral) != neutral:
            raise UnsupportedError(f"{gguf.path}: {architecture}.{name} = {field(name)} is not supported for training")
    width = field("embedding_length")
    head_dim = field("attention.key_length", width // heads["n_head"])
    if field("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{gguf.path}: partial rotary embedding is not supported for training")
    settings: dict[str, Any] = {
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads["n_head"],
        "num_key_value_heads": heads["n_head_kv"],
        "head_dim": head_dim,
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "use_cache": False,
        "pad_token_id": None,
    }
    if architecture == "gemma3":
        settings |= _gemma3_settings(field, settings)
    return _CONFIGS[architecture](**settings)


def _gemma3_settings(field: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what only gemma3 has: most layers look back over a window, with a rotary base of their own."""
    n_layer, period = settings["num_hidden_layers"], field("attention.sliding_window_pattern", 6)
    full, sliding = "full_attention", "sliding_attention"
    is_27b = n_layer == 62  # llama.cpp knows this size, whose scores are scaled otherwise, by its layers
    scale_dim = settings["hidden_size"] // settings["num_attention_heads"] if is_27b else settings["head_dim"]
    return {
        "sliding_window": field("attention.sliding_window"),
        "layer_types": [full if period and i % period == period - 1 else sliding for i in range(n_layer)],
        "query_pre_attn_scalar": scale_dim,
        "rope_parameters": {
            full: settings["rope_parameters"],
            sliding: {"rope_type": "default", "rope_theta": field("rope.freq_base_swa", 10000.0)},
        },
    }


def load_base(gguf: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    """Return the frozen transformers model of a GGUF file, in evaluation mode.

    Raises:
        UnsupportedError, GgufError: as `config_from_gguf`, or a tensor without counterpart.
    """
    config = config_from_gguf(gguf)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    architecture, heads = gguf.architecture, head_counts(gguf)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name in gguf.tensors:
        if name == "rope_freqs.weight":
            _scale_rotary(model, torch.from_numpy(gguf.weights(name).copy()))
            continue
        module = module_of(name, architecture)
        if module not in parameters:
            raise UnsupportedError(f"{gguf.path}: tensor {name} has no place in a {architecture} model")
        weights = from_gguf_rows(gguf.weights(name), n_heads_permuted(name, architecture, heads))
        tensor = torch.from_numpy(weights)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor - 1.0  # GGUF stores 1 + weight
        with torch.no_grad():
            parameters[module].copy_(tensor)
        missing.discard(module)
    if missing:
        raise UnsupportedError(f"{gguf.path}: lacks the weights of {sorted(missing)[0]}")
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    model.eval()
    return model


def _scale_rotary(model: nn.Module, factors: torch.Tensor) -> None:
    """Divide the rotary frequencies by Llama 3.1's factors, which llama.cpp reads from a tensor."""
    for module in model.modules():
        if isinstance(frequencies := getattr(module, "inv_freq", None), torch.Tensor):
            frequencies /= factors.to(frequencies)
