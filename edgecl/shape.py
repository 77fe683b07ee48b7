"""Shape of a base: what its GGUF metadata says about the decoder that llama.cpp would build from it.

Four architectures differ in little: llama, qwen2 (biases), qwen3 (normed queries and keys), gemma3 (both, norms behind each
half of a layer, a window on most layers). What llama.cpp would compute differently (a rotary scaling that is not carried
over) is refused, never ignored; parity with llama.cpp's logits is tested for each architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgecl_convert import GgufError, UnsupportedError
from edgecl_convert.names import check_architecture, head_counts
from edgecl_convert.source import Source

# projections that share an input, in the order in which their rows stand in one product
GROUPS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}

# fields by which llama.cpp computes something else, and the value that changes nothing
_NOT_CARRIED_OVER = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "final_logit_softcapping": 0.0,
}


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of a decoder.

    Attributes:
        width: of the hidden states; n_ff: inside a feed-forward part.
        score_scale: what attention scores are multiplied by.
        rope_theta: rotary base; rope_theta_window: that of layers that look back over a window.
        window: tokens that such a layer sees, 0 where no layer has one; n_period: the last of so many layers sees everything.
    """

    architecture: str
    n_vocab: int
    width: int
    n_ff: int
    n_layer: int
    n_head: int
    n_kv: int
    head_dim: int
    norm_eps: float
    score_scale: float
    rope_theta: float
    rope_theta_window: float = 0.0
    window: int = 0
    n_period: int = 0

    @property
    def is_gemma(self) -> bool:
        """Whether embeddings are scaled, the gate is a GELU, and each half of a layer ends with a norm."""
        return self.architecture == "gemma3"

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys are normed, head by head."""
        return self.architecture in ("qwen3", "gemma3")

    def looks_back_over_a_window(self, layer: int) -> bool:
        """Return whether a layer sees only the last `window` tokens."""
        return bool(self.window) and not (self.n_period and layer % self.n_period == self.n_period - 1)

    def rows(self, projection: str) -> int:
        """Return the output width of a projection, by its short GGUF name."""
        widths = {"attn_q": self.n_head, "attn_k": self.n_kv, "attn_v": self.n_kv}
        if projection in widths:
            return widths[projection] * self.head_dim
        return self.n_ff if projection in GROUPS["gate_up"] else self.width

    def columns(self, group: str) -> int:
        """Return the input width of a group of projections."""
        return {"out": self.n_head * self.head_dim, "down": self.n_ff}.get(group, self.width)

    @property
    def layer_weights(self) -> int:
        """Number of weights in one layer's projections."""
        return sum(self.rows(name) * self.columns(group) for group, names in GROUPS.items() for name in names)


def read_shape(gguf: Source) -> Shape:
    """Return the shape of a GGUF model.

    Raises:
        UnsupportedError: an architecture, a rotary scaling or a soft cap that is not carried over.
        GgufError: a field or the embedding is missing.
    """
    architecture = check_architecture(gguf)
    heads = head_counts(gguf)

    def field(name: str, default: Any = None) -> Any:
        key = f"{architecture}.{name}"
        return gguf.require(key) if default is None else gguf.get(key, default)

    for name, neutral in _NOT_CARRIED_OVER.items():
        if field(name, neutral) != neutral:
            raise UnsupportedError(f"{gguf.path}: {architecture}.{name} = {field(name)} is not supported for training")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise GgufError(gguf.path, "lacks the tensor token_embd.weight; download or convert the model again")
    width, n_layer = field("embedding_length"), field("block_count")
    head_dim = field("attention.key_length", width // heads["n_head"])
    if field("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{gguf.path}: partial rotary embedding is not supported for training")
    windows: dict[str, Any] = {}
    scale_dim = head_dim
    if architecture == "gemma3":
        windows = {
            "window": field("attention.sliding_window"),
            "n_period": field("attention.sliding_window_pattern", 6),
            "rope_theta_window": field("rope.freq_base_swa", 10000.0),
        }
        if n_layer == 62:  # llama.cpp knows the 27B size, whose scores are scaled otherwise, by its layers
            scale_dim = width // heads["n_head"]
    return Shape(
        architecture=architecture,
        n_vocab=embedding.shape[0],
        width=width,
        n_ff=field("feed_forward_length"),
        n_layer=n_layer,
        n_head=heads["n_head"],
        n_kv=heads["n_head_kv"],
        head_dim=head_dim,
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        score_scale=scale_dim**-0.5,
        rope_theta=field("rope.freq_base", 10000.0),
        **windows,
    )
