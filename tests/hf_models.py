"""Tiny random Hugging Face folders for the tests of the export; transformers builds and saves them, only `export` is ours."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from edgecl_convert import HfModel, merge

STD = 0.2  # with the usual 0.02 attention is nearly uniform, and a wrong rotary base hides
EPS, GEMMA3_EPS = 1e-3, 3e-2  # large enough that ten times as much is seen
N_VOCAB, WIDTH, N_HEAD, N_KV, CONTEXT = 96, 64, 4, 2, 256
WINDOW = 16
VOCABULARY = {"tokenizer.ggml.model": "none"}  # llama.cpp then takes ids only
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"  # of gemma3's layers
_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
    "gpt_neox": GPTNeoXConfig,
}
FAMILIES = tuple(_CONFIGS)


def config(family: str, **changed: Any) -> Any:
    """Return a configuration of two layers, six for gemma3, whose sixth is the first that sees everything."""
    settings: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH + 32,
        "num_hidden_layers": 2,
        "num_attention_heads": N_HEAD,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": family in ("qwen2", "gemma3"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "gpt_neox":
        settings |= {"layer_norm_eps": EPS, "hidden_act": "gelu_pytorch_tanh"}
        settings["rope_parameters"]["partial_rotary_factor"] = 0.5
    else:
        settings |= {"rms_norm_eps": EPS, "num_key_value_heads": N_KV}
    if family in ("qwen3", "gemma3"):
        settings["head_dim"] = 24  # heads that do not add up to the width
    if family == "gemma3":
        settings |= {
            "num_hidden_layers": 6,
            "rms_norm_eps": GEMMA3_EPS,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }
    return _CONFIGS[family](**settings | changed)


def build(folder: Path, family: str = "llama", seed: int = 0, **changed: Any) -> PreTrainedModel:
    """Save a model of random weights, norms and biases included, as a folder and return it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config(family, **changed), dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STD, generator=generator)
            if "norm" in name and name.endswith("weight") and family != "gemma3":  # gemma3's count from zero
                parameter += 1.0
    model.save_pretrained(folder)
    return model.eval()


def edit_config(folder: Path, **changed: Any) -> None:
    """Change values of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(folder: Path, **changed: np.ndarray | None) -> None:
    """Change tensors of model.safetensors, dots in names written as `__`; None removes one."""
    path = folder / "model.safetensors"
    weights: dict[str, Any] = load_file(path) | {name.replace("__", "."): value for name, value in changed.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, path, {"format": "pt"})


def export(folder: Path, out: Path, quant: str = "F32") -> Path:
    """Convert a folder to GGUF; return the file."""
    with HfModel(folder, VOCABULARY) as model:
        merge(model, None, out, quant, n_threads=1)
    return out
