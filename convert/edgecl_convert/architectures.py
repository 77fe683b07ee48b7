"""What each Hugging Face family is in GGUF: its metadata, and the tensors that it must have.

The tables say which tensors a config.json promises, by transformers' name and shape; the GGUF names come from gguf's own
TensorNameMap. What llama.cpp would compute differently is refused, never ignored.

*Does not cover*: experts, vision, and rotary scalings other than linear, yarn and Llama 3.1's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from .errors import ConvertError, UnsupportedError
from .hf_config import HfConfig, Rope

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_PERIOD = 6  # of gemma3: every sixth layer sees everything, where the metadata does not say otherwise

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face.

    Attributes:
        arch: what llama.cpp runs it as.
        defaults: of its configuration class, where config.json may be silent.
        activations: which llama.cpp computes.
        ropes: rotary scalings which llama.cpp computes.
    """

    arch: MODEL_ARCH
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu",)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")

    @property
    def name(self) -> str:
        """general.architecture."""
        return MODEL_ARCH_NAMES[self.arch]


_COMMON = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, _COMMON, ropes=("default", "linear", "yarn", "llama3")),
    "mistral": Family(MODEL_ARCH.LLAMA, _COMMON | {"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(MODEL_ARCH.QWEN2, _COMMON | {"max_window_layers": 28}),
    "qwen3": Family(MODEL_ARCH.QWEN3, _COMMON | {"max_window_layers": 28, "head_dim": 128}),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3,
        {
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
            "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
        },
        _TANH_GELU,
        ("default", "linear"),
    ),
    # llama.cpp computes the tanh form for Pythia's "gelu", too; they differ by less than 0.0005
    "gpt_neox": Family(MODEL_ARCH.GPTNEOX, {"layer_norm_eps": 1e-5, "hidden_act": "gelu"}, ("gelu", *_TANH_GELU)),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config that tensors and metadata share."""

    width: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    tied: bool


def family_of(config: HfConfig) -> tuple[Family, HfConfig]:
    """Return the family of a config, and the config with that family's defaults.

    Raises:
        UnsupportedError: another family, remote code, quantized weights, or a setting that llama.cpp does not compute.
    """
    if config.get("auto_map"):
        raise config.refuse("auto_map", "it asks to run code from the folder, which is never done")
    if config.get("quantization_config"):
        raise config.refuse("quantization_config", "these weights are quantized already; take the original ones")
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UnsupportedError(f"{config.path}: model_type must be one of {', '.join(FAMILIES)}; got {json.dumps(kind)}")
    config = config.with_defaults(family.defaults)
    key = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    if config.get(key) not in family.activations:
        raise config.refuse(key, f"allowed: {', '.join(family.activations)}")
    return family, config


def sizes_of(family: Family, config: HfConfig) -> Sizes:
    """Return the sizes of a model.

    Raises:
        ConvertError, UnsupportedError: a size is missing, or they do not fit each other or the architecture.
    """
    width, n_head = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_head_kv = n_head if family.arch == MODEL_ARCH.GPTNEOX else config.integer("num_key_value_heads", n_head)
    head_dim = config.integer("head_dim", width // n_head or 1)
    if n_head % n_head_kv or head_dim % 2:
        raise ConvertError(
            f"{config.path}: {n_head} attention heads of {head_dim} cannot share {n_head_kv} key heads; "
            "the first must be a multiple of the last, and a head's size even"
        )
    if family.arch in (MODEL_ARCH.QWEN2, MODEL_ARCH.GPTNEOX) and n_head * head_dim != width:
        raise UnsupportedError(f"{config.path}: {n_head} heads of {head_dim} must make up hidden_size {width} in {family.name}")
    return Sizes(
        width=width,
        n_layer=config.integer("num_hidden_layers"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=config.integer("intermediate_size"),
        n_vocab=config.integer("vocab_size"),
        tied=config.flag("tie_word_embeddings"),
    )


# --- tensors --------------------------------------------------------------------------------------------------------


def tensors_of(family: Family, config: HfConfig, sizes: Sizes) -> dict[str, Shape]:
    """Return every tensor that the weights must have, by transformers' name, in the order of the GGUF file.

    Raises:
        UnsupportedError: the config asks for biases that llama.cpp does not add, or leaves out those it needs.
    """
    if family.arch == MODEL_ARCH.GPTNEOX:
        return _gpt_neox_tensors(config, sizes)
    n_q, n_kv, width, n_ff = sizes.n_head * sizes.head_dim, sizes.n_head_kv * sizes.head_dim, sizes.width, sizes.n_ff
    layer: dict[str, Shape] = {"input_layernorm.weight": (width,)}
    biased = _biased(family, config)
    for name, shape in (
        ("self_attn.q_proj", (n_q, width)),
        ("self_attn.k_proj", (n_kv, width)),
        ("self_attn.v_proj", (n_kv, width)),
        ("self_attn.o_proj", (width, n_q)),
        ("mlp.gate_proj", (n_ff, width)),
        ("mlp.up_proj", (n_ff, width)),
        ("mlp.down_proj", (width, n_ff)),
    ):
        layer[f"{name}.weight"] = shape
        if name in biased:
            layer[f"{name}.bias"] = shape[:1]
    if family.arch in (MODEL_ARCH.QWEN3, MODEL_ARCH.GEMMA3):
        layer |= {f"self_attn.{x}_norm.weight": (sizes.head_dim,) for x in "qk"}
    norms = ["post_attention_layernorm"]
    if family.arch == MODEL_ARCH.GEMMA3:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layer |= {f"{norm}.weight": (width,) for norm in norms}
    named: dict[str, Shape] = {"model.embed_tokens.weight": (sizes.n_vocab, width)}
    named |= {f"model.layers.{i}.{name}": shape for i in range(sizes.n_layer) for name, shape in layer.items()}
    named["model.norm.weight"] = (width,)
    return named if sizes.tied else named | {"lm_head.weight": (sizes.n_vocab, width)}


def _biased(family: Family, config: HfConfig) -> set[str]:
    """Return the projections of a layer that have a bias."""
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    if family.arch == MODEL_ARCH.QWEN2:
        return attention - {"self_attn.o_proj"}
    if family.arch != MODEL_ARCH.LLAMA and config.flag("attention_bias"):
        raise config.refuse("attention_bias", f"llama.cpp adds no such biases in {family.name}")
    biased = attention if config.flag("attention_bias") else set()
    return biased | {f"mlp.{x}_proj" for x in ("gate", "up", "down")} if config.flag("mlp_bias") else biased


def _gpt_neox_tensors(config: HfConfig, sizes: Sizes) -> dict[str, Shape]:
    if not config.flag("attention_bias", True):
        raise config.refuse("attention_bias", "llama.cpp wants these biases in gptneox")
    width, n_ff = sizes.width, sizes.n_ff
    modules: dict[str, Shape] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "attention.query_key_value": (3 * width, width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (n_ff, width),
        "mlp.dense_4h_to_h": (width, n_ff),
    }
    named: dict[str, Shape] = {"gpt_neox.embed_in.weight": (sizes.n_vocab, width)}
    for i in range(sizes.n_layer):
        for name, shape in modules.items():
            named |= {f"gpt_neox.layers.{i}.{name}.weight": shape, f"gpt_neox.layers.{i}.{name}.bias": shape[:1]}
    named |= {"gpt_neox.final_layer_norm.weight": (width,), "gpt_neox.final_layer_norm.bias": (width,)}
    return named if sizes.tied else named | {"embed_out.weight": (sizes.n_vocab, width)}


# --- metadata -------------------------------------------------------------------------------------------------------


def rope_of(family: Family, config: HfConfig) -> Rope:
    """Return the rotary settings of a model, of its global layers where they differ.

    Raises:
        ConvertError, UnsupportedError: they are not sound, or llama.cpp does not compute them.
    """
    if family.arch == MODEL_ARCH.GPTNEOX:
        config = config.with_defaults(
            {"rope_theta": config.get("rotary_emb_base", 10000.0), "partial_rotary_factor": config.get("rotary_pct", 0.25)}
        )
    rope = Rope(config, _FULL if family.arch == MODEL_ARCH.GEMMA3 else "")
    rope.check_kind(family.ropes)
    if family.arch != MODEL_ARCH.GPTNEOX and rope.share != 1:
        raise UnsupportedError(f"{config.path}: partial_rotary_factor must be 1 in {family.name}, got {rope.share}")
    return rope


def metadata_of(family: Family, config: HfConfig, sizes: Sizes) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of the architecture, keys below its name, and notes for the user.

    Raises:
        ConvertError, UnsupportedError: a setting is missing, not sound, or computed differently by llama.cpp.
    """
    rope, notes = rope_of(family, config), list[str]()
    n_rot = int(sizes.head_dim * rope.share)
    if n_rot < 2 or n_rot % 2 or n_rot > sizes.head_dim:
        raise ConvertError(f"{config.path}: {n_rot} of {sizes.head_dim} dimensions rotate; it must be an even number of them")
    fields: dict[str, Any] = {
        "vocab_size": sizes.n_vocab,
        "context_length": config.integer("max_position_embeddings"),
        "embedding_length": sizes.width,
        "block_count": sizes.n_layer,
        "feed_forward_length": sizes.n_ff,
        "attention.head_count": sizes.n_head,
        "attention.head_count_kv": sizes.n_head_kv,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.dimension_count": n_rot,
        "rope.freq_base": rope.theta,
    }
    fields |= {f"rope.scaling.{key}": value for key, value in rope.fields().items()}
    if family.arch == MODEL_ARCH.GPTNEOX:
        fields["attention.layer_norm_epsilon"] = config.number("layer_norm_eps")
        fields["use_parallel_residual"] = config.flag("use_parallel_residual", True)
        return fields, notes
    fields["attention.layer_norm_rms_epsilon"] = config.number("rms_norm_eps")
    if family.arch == MODEL_ARCH.GEMMA3:
        return fields | _gemma3_fields(config, sizes), notes
    window = _window(config, sizes.n_layer)
    if window and window < fields["context_length"]:  # up to the window's length both compute the same
        notes.append(f"llama.cpp has no sliding window in {family.name}: the context is limited to the window, {window} tokens")
        fields["context_length"] = window
    return fields, notes


def _window(config: HfConfig, n_layer: int) -> int:
    """Return the sliding window that some layer has, 0 where none has one."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0
    kinds = config.get("layer_types")
    if config.get("model_type") == "mistral":
        slides = True
    elif isinstance(kinds, list):
        slides = _SLIDING in kinds
    else:
        slides = config.flag("use_sliding_window") and n_layer > config.integer("max_window_layers")
    return config.integer("sliding_window") if slides else 0


def _gemma3_fields(config: HfConfig, sizes: Sizes) -> dict[str, Any]:
    """Return what only gemma3 has: most layers look back over a window, with a rotary base of their own."""
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise config.refuse(key, "llama.cpp does not compute it in gemma3")
    # llama.cpp knows the 27B model by its layers, and scales its scores by the width of a head of the residual stream
    scale_dim = sizes.width // sizes.n_head if sizes.n_layer == 62 else sizes.head_dim
    if config.number("query_pre_attn_scalar") != scale_dim:
        raise config.refuse("query_pre_attn_scalar", f"llama.cpp scales by {scale_dim} here")
    fields: dict[str, Any] = {}
    if config.get("final_logit_softcapping"):
        fields["final_logit_softcapping"] = config.number("final_logit_softcapping")
    kinds = config.get("layer_types") or _layer_types(config, sizes.n_layer)
    if not isinstance(kinds, list) or len(kinds) != sizes.n_layer or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        raise config.refuse("layer_types", f"{sizes.n_layer} entries are needed, each {_FULL} or {_SLIDING}")
    if not config.get("sliding_window") or _SLIDING not in kinds:
        return fields
    local = Rope(config, _SLIDING)
    local.check_kind(("default",))
    period = _period(kinds)
    if period is None:
        raise config.refuse("layer_types", "llama.cpp needs every n-th layer to see everything")
    fields |= {"attention.sliding_window": config.integer("sliding_window"), "rope.freq_base_swa": local.theta}
    return fields if period == _PERIOD else fields | {"attention.sliding_window_pattern": period}


def _layer_types(config: HfConfig, n_layer: int) -> list[str]:
    period = config.integer("sliding_window_pattern", config.get("_sliding_window_pattern", _PERIOD))
    return [_SLIDING if (i + 1) % period else _FULL for i in range(n_layer)]


def _period(kinds: list[str]) -> int | None:
    """Return n where every n-th layer sees everything: 6 if it can be, 0 where none does, None where there is no such n."""
    candidates: list[int] = [_PERIOD, *range(2, len(kinds) + 1)]
    for n in candidates:
        if kinds == [_SLIDING if (i + 1) % n else _FULL for i in range(len(kinds))]:
            return n
    return None if _FULL in kinds else 0
