"""Tiny random models, built in code: a transformers model and the same weights as a GGUF file that llama.cpp loads.

The file is written with gguf's own writer and gguf's own tensor names, not with the code under test. Weights have a standard
deviation of 0.2: with the usual 0.02 attention is nearly uniform, and a wrong rotary base or a forgotten permutation hides.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from edgecl_convert import Adapter, GgufFile
from edgecl_convert.names import PROJECTIONS, from_gguf_rows, head_counts, n_heads_permuted, to_gguf_rows

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
STD = 0.2
WINDOW = 16  # gemma3's sliding window, in tokens
MERGES = ["h e", "t he", "Ġ the", "i n", "a n"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}


@dataclass(frozen=True)
class Tiny:
    """What to build; everything not named here is fixed.

    `permute` and `theta_in_file` exist to write files that are wrong.
    """

    architecture: str = "llama"
    seed: int = 0
    width: int = 64
    n_layer: int = 0  # 0: 2, or 6 for gemma3, whose sixth layer is the first that sees everything
    theta: float = 10000.0
    theta_in_file: float = 0.0  # 0: the model's
    window: int = WINDOW  # gemma3's, 0: not in the file
    rope_factors: tuple[float, ...] = ()  # what Llama 3.1 divides its rotary frequencies by
    permute: bool = True
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    fields: dict[str, int | float | str] = field(default_factory=dict)  # more metadata, below the architecture's name

    @property
    def layers(self) -> int:
        return self.n_layer or (6 if self.architecture == "gemma3" else 2)

    @property
    def head_dim(self) -> int:
        wide = self.architecture in ("qwen3", "gemma3")  # heads that do not add up to the width
        return self.width // 2 if wide else self.width // 4


N_HEAD, N_KV = 4, 2


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in a gpt2-type vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


BYTES = byte_alphabet()
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "<|im_start|>", "<|im_end|>"]
N_VOCAB = len(TOKENS)
START, END = N_VOCAB - 2, N_VOCAB - 1  # <|im_start|>, <|im_end|>


def config(tiny: Tiny) -> Any:
    """Return the transformers configuration."""
    settings: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "hidden_size": tiny.width,
        "intermediate_size": tiny.width * 2 if tiny.width % 256 == 0 else tiny.width + 32,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV,
        "head_dim": tiny.head_dim,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": tiny.theta},
        "tie_word_embeddings": tiny.architecture != "llama",
        "pad_token_id": None,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    if tiny.architecture == "gemma3":
        settings |= {
            "sliding_window": tiny.window,
            "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(tiny.layers)],
            "query_pre_attn_scalar": tiny.head_dim,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": tiny.theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        }
    return _CONFIGS[tiny.architecture](**settings)


def torch_model(tiny: Tiny) -> PreTrainedModel:
    """Return the transformers model, with transformers' own attention in its plainest form."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(tiny), dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(tiny.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STD, generator=generator)
            if name.endswith("norm.weight") and tiny.architecture != "gemma3":  # gemma3's count from zero
                parameter += 1.0
    return model.eval()


def write_model(path: Path, model: PreTrainedModel, tiny: Tiny, vocab: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    """Write a model as GGUF, with the tiny vocabulary or what `vocab` adds."""
    writer = gguf.GGUFWriter(path, tiny.architecture)
    writer.add_context_length(2048)
    writer.add_embedding_length(tiny.width)
    writer.add_block_count(tiny.layers)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_KV)
    writer.add_key_length(tiny.head_dim)
    writer.add_value_length(tiny.head_dim)
    writer.add_rope_dimension_count(tiny.head_dim)
    writer.add_rope_freq_base(tiny.theta_in_file or tiny.theta)
    writer.add_layer_norm_rms_eps(1e-6)
    if tiny.architecture == "gemma3" and tiny.window:
        writer.add_sliding_window(tiny.window)
    for key, value in tiny.fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{tiny.architecture}.{key}", value)
    (vocab or add_vocab)(writer)
    _add_tensors(writer, model, tiny)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocab(writer: gguf.GGUFWriter, add_bos: bool = False) -> None:
    """Add the tiny vocabulary, which wants a token before every text or none."""
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([normal] * (N_VOCAB - 2) + [control] * 2)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(START)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, tiny: Tiny) -> None:
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == tiny.architecture)
    names = gguf.get_tensor_name_map(architecture, tiny.layers)
    if tiny.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(tiny.rope_factors, np.float32))
    heads = {"n_head": N_HEAD, "n_head_kv": N_KV} if tiny.permute else {"n_head": 0, "n_head_kv": 0}
    for module, parameter in model.named_parameters():
        name = names.get_name(module, try_suffixes=(".weight", ".bias"))
        assert name is not None, module
        weights = parameter.detach().numpy()
        if tiny.architecture == "gemma3" and module.endswith("norm.weight"):
            weights = weights + 1
        weights = np.ascontiguousarray(to_gguf_rows(weights, n_heads_permuted(name, tiny.architecture, heads)))
        if weights.ndim < 2 or tiny.qtype == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, gguf.quantize(weights, tiny.qtype), raw_dtype=tiny.qtype)


def build(path: Path, architecture: str = "llama", **options: Any) -> tuple[Path, PreTrainedModel]:
    """Build a model (options: the fields of Tiny), write it to `path`, return the path and the torch model."""
    tiny = Tiny(architecture, **options)
    model = torch_model(tiny)
    return write_model(path, model, tiny), model


def random_adapter(base: GgufFile, seed: int = 0, r: int = 4, lora_alpha: float = 8.0, size: float = 0.5) -> Adapter:
    """Return an adapter on all projections, in GGUF's layout, whose update is about `size` times as large as the weights."""
    rng = np.random.default_rng(seed)
    adapter = Adapter(base.architecture, lora_alpha)
    std_b = size * STD * r / lora_alpha / r**0.5  # the product with A, times alpha / r, then has std size * STD
    for name, info in base.tensors.items():
        if name.split(".")[-2] in PROJECTIONS and name.endswith(".weight"):
            n_out, n_in = info.shape
            a = rng.normal(0, 1, (r, n_in)).astype(np.float32)
            adapter.pairs[name] = (a, rng.normal(0, std_b, (n_out, r)).astype(np.float32))
    return adapter


def with_b_in_torch_order(adapter: Adapter, base: GgufFile) -> Adapter:
    """Return an adapter whose q and k rows of lora_B lie as torch has them: wrong for llama, the same for the others."""
    heads = head_counts(base)
    pairs = {
        name: (a, from_gguf_rows(b, n_heads_permuted(name, adapter.architecture, heads)))
        for name, (a, b) in adapter.pairs.items()
    }
    return Adapter(adapter.architecture, adapter.lora_alpha, pairs)


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """Return ids of bytes and merged tokens: no special ones."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, N_VOCAB - 2, n)]
