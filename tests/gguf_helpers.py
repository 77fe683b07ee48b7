"""Small GGUF models for the tests of the conversion stage, written by its own writer; llama-shaped, with grouped heads."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_convert.adapter import Adapter
from edgecl_convert.ggml import Bytes, F32Array, QType, quantize
from edgecl_convert.gguf_file import GgufFile, PlannedTensor, encode_field, write_gguf

N_HEAD, N_HEAD_KV, N_VOCAB = 4, 2, 96


def shapes(width: int, n_layer: int, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model with N_HEAD query heads and N_HEAD_KV key heads, in torch's order (out, in)."""
    kv, n_ff = width // N_HEAD * N_HEAD_KV, 2 * width
    layer = {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, width),
        "attn_k.weight": (kv, width),
        "attn_v.weight": (kv, width),
        "attn_output.weight": (width, width),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (n_ff, width),
        "ffn_up.weight": (n_ff, width),
        "ffn_down.weight": (width, n_ff),
    }
    named = {"token_embd.weight": (N_VOCAB, width), "output_norm.weight": (width,)}
    if not tied:
        named["output.weight"] = (N_VOCAB, width)
    return named | {f"blk.{i}.{name}": shape for i in range(n_layer) for name, shape in layer.items()}


def model_fields(architecture: str, width: int, n_layer: int) -> list[bytes]:
    """The metadata that llama.cpp asks of a model before it quantizes it, and some text."""
    values: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": "tiny — näme",
        "general.file_type": 1,
        f"{architecture}.vocab_size": N_VOCAB,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": width,
        f"{architecture}.block_count": n_layer,
        f"{architecture}.feed_forward_length": 2 * width,
        f"{architecture}.attention.head_count": N_HEAD,
        f"{architecture}.attention.head_count_kv": N_HEAD_KV,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return [encode_field(key, value) for key, value in values.items()]


def write_model(
    path: Path,
    qtype: QType = QType.F32,
    *,
    width: int = 64,
    n_layer: int = 2,
    tied: bool = True,
    architecture: str = "llama",
    seed: int = 0,
    **changed: F32Array,
) -> Path:
    """Write a random model whose matrices have `qtype`; `changed` replaces tensors, dots in names written as `__`."""
    rng = np.random.default_rng(seed)
    weights: dict[str, F32Array] = {}
    for name, shape in shapes(width, n_layer, tied).items():
        drawn = rng.standard_normal(shape, np.float32)
        weights[name] = changed.get(name.replace(".", "__"), drawn * np.float32(0.1))
    plan = [PlannedTensor(n, w.shape, qtype if w.ndim > 1 else QType.F32) for n, w in weights.items()]

    def data() -> Iterator[Bytes]:
        for tensor in plan:
            yield quantize(weights[tensor.name].reshape(-1, tensor.shape[-1]), tensor.qtype, n_threads=1)

    write_gguf(path, model_fields(architecture, width, n_layer), plan, data())
    return path


def lora(base: GgufFile, names: Sequence[str], r: int = 4, scale: float = 0.02, alpha: float = 8.0, seed: int = 1) -> Adapter:
    """A random adapter for the named tensors of `base`; `scale` is that of lora_A and lora_B."""
    rng = np.random.default_rng(seed)
    adapter = Adapter(base.architecture, alpha)
    for name in names:
        n_out, n_in = base.tensors[name].shape
        a, b = rng.standard_normal((r, n_in), np.float32), rng.standard_normal((n_out, r), np.float32)
        adapter.pairs[name] = (a * np.float32(scale), b * np.float32(scale))
    return adapter


def in_blocks(adapter: Adapter) -> Adapter:
    """The same adapter with lora_A the same over every 32 columns, as nights train it where the base has minimums."""
    pairs = {name: (a[:, ::32].repeat(32, 1), b) for name, (a, b) in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


def child_with_small_files(code: str, limit_bytes: int, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a Python where no file can grow past `limit_bytes`: the kernel refuses the write, as a full disk does."""
    prefix = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", prefix + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
