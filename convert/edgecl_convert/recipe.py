"""Which type each tensor of a quantized file gets.

A recipe is a name: a tensor type (Q8_0, Q4_0, F16 ...), which all weight matrices get, or one of llama.cpp's mixtures
(Q4_K_M); or `adaptive`, which names a type for each tensor. Rows that do not divide by a type's block fall back as
llama.cpp's rule has it. Norms, other vectors and the small matrices that llama.cpp never quantizes stay as they are.
`keep` leaves every tensor its type; `keep_minimums` too, but for weights of the layers of 4 or 5 bits that have no minimum of
float16 for every 32 of them, which get one: what nights learn is added there (`grid`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguf import LlamaFileType

from .errors import UnsupportedError
from .ggml import Bytes, QType, block_size, qtype_named, quantize_rows, quantize_unshrunk
from .gguf_file import TensorInfo
from .grid import GRID_TYPES, WITH_MINIMUMS
from .names import layer_of
from .source import Source

KEEP, KEEP_MINIMUMS, ADAPTIVE = "keep", "keep_minimums", "adaptive"
_KEEPING = (KEEP, KEEP_MINIMUMS)
MIXTURES = ("Q4_K_M",)
INT4_BITS = 5.0  # of a weight, at most, its block's scales counted: what Q4_1 takes; Q4_K_M takes less
# llama.cpp: a type whose block does not divide the row -> the type to take instead
_FALLBACK = {
    QType.Q2_K: QType.Q4_0, QType.Q3_K: QType.Q4_0, QType.Q4_K: QType.Q5_0, QType.Q5_K: QType.Q5_1, QType.Q6_K: QType.Q8_0,
}  # fmt: skip
_WRITABLE = (
    QType.F32, QType.F16, QType.BF16, QType.Q8_0, QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1,
    QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K,
)  # fmt: skip
# parts of names; llama.cpp, src/llama-quant.cpp, tensor_allows_quantization, less what it keeps in one architecture (glm5-next)
_NEVER_QUANTIZED = (
    "ffn_gate_inp.", "ffn_gate_tid2eid.", "altup", "laurel", "per_layer_model_proj", "position_embd.", "token_types.",
    "ssm_conv1d", "shortconv.conv.", "indexer.k_proj.", "indexer.q_proj.",
    "time_mix_first.", "time_mix_w0.", "time_mix_w1.", "time_mix_w2.", "time_mix_v0.", "time_mix_v1.", "time_mix_v2.",
    "time_mix_a0.", "time_mix_a1.", "time_mix_a2.", "time_mix_g1.", "time_mix_g2.",
    "time_mix_decay_w1.", "time_mix_decay_w2.", "time_mix_lerp_fused.", "attn_rel_b.",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        quant: `keep`, `keep_minimums`, a tensor type, a mixture, or `adaptive`.
        types: by tensor, for `adaptive`; a tensor that is not named keeps its type.
        predicted_nats: KL divergence per token that `adaptive` expects, where sensitivities were measured.
    """

    quant: str
    types: Mapping[str, QType] = field(default_factory=dict)
    predicted_nats: float | None = None

    @classmethod
    def named(cls, quant: str) -> Recipe:
        """Return the recipe called `quant`; case does not matter.

        Raises:
            UnsupportedError: no such recipe.
        """
        name = quant if quant in _KEEPING else quant.upper()
        if name in (*_KEEPING, *MIXTURES) or name in (t.name for t in _WRITABLE):
            return cls(name)
        allowed = ", ".join(["int8", "int4", *_KEEPING, *(t.name for t in _WRITABLE), *MIXTURES])
        raise UnsupportedError(f"quant must be one of {allowed}; got {quant}")

    def qtype(self, info: TensorInfo, n_layer: int, tied: bool) -> QType:
        """Return the type that one tensor gets: the wanted one, or its fallback where it does not divide the rows.

        Args:
            n_layer: layers of the model.
            tied: the embedding is also the head; there is no output.weight.
        """
        if self.quant == KEEP:
            return info.qtype
        return fallback(self.wanted(info, n_layer, tied), info.shape[-1])

    def wanted(self, info: TensorInfo, n_layer: int, tied: bool) -> QType:
        """Return the type that one tensor would get if its rows were of any length."""
        if self.quant == ADAPTIVE:
            return self.types.get(info.name, info.qtype)
        if self.quant == KEEP or not is_weight(info):
            return info.qtype
        if self.quant == KEEP_MINIMUMS:
            return WITH_MINIMUMS.get(info.qtype, info.qtype) if layer_of(info.name) is not None else info.qtype
        return _q4_k_m(info, n_layer, tied) if self.quant == "Q4_K_M" else qtype_named(self.quant)

    @property
    def keeps(self) -> bool:
        """Whether the file stays of the base's kind, its file type included."""
        return self.quant in _KEEPING

    @property
    def quantizer(self) -> Callable[..., Bytes]:
        """What encodes rows: the kernels as llama.cpp calls them, so that bytes are its own; unshrunk for `adaptive`."""
        return quantize_unshrunk if self.quant == ADAPTIVE else quantize_rows

    def file_type(self, base: Source) -> int | None:
        """Return the value of `general.file_type`, None where the base's value stays; `adaptive`: by what most weights are."""
        if self.keeps:
            return None
        quant = self._commonest(base) if self.quant == ADAPTIVE else self.quant
        size = "M" if self.quant == ADAPTIVE else "S"  # llama.cpp names one K type for all after its small mixture
        for name in (f"ALL_{quant}", f"MOSTLY_{quant}", f"MOSTLY_{quant}_{size}"):
            if name in LlamaFileType.__members__:
                return int(LlamaFileType[name])
        return None

    def _commonest(self, base: Source) -> str:
        weights: Counter[str] = Counter()
        for name, qtype in self.types.items():
            weights[qtype.name] += base.tensors[name].n_weights
        return max(weights, key=lambda name: weights[name], default="F32")


def model_shape(source: Source) -> tuple[int, bool]:
    """Return what a mixture goes by: the number of layers, and whether the embedding is also the head.

    Raises:
        UnsupportedError: the number is none.
    """
    n_layer = source.get(f"{source.architecture}.block_count", 0)
    if not isinstance(n_layer, int):
        raise UnsupportedError(f"{source.path}: block_count must be a whole number, got {str(n_layer)[:40]}; download it again")
    return n_layer, "output.weight" not in source.tensors


def is_weight(info: TensorInfo) -> bool:
    """Return whether a tensor is a weight matrix, which recipes give a type; norms, vectors and small matrices keep theirs."""
    is_matrix = len(info.shape) > 1 and "_norm" not in info.name and info.name.endswith(".weight")
    return is_matrix and not any(part in info.name for part in _NEVER_QUANTIZED)


def resolve_quant(quant: str, source: Source, learned: bool = False) -> str:
    """Return the recipe of a quant: int8 is Q8_0; int4 the source's own types where its layers take INT4_BITS, mixed or not.

    Where they take more, or a type has less than 4 bits, int4 is Q4_K_M if rows divide by 256, else Q4_1.

    Args:
        learned: nights' adapters will be merged in, which loses nothing with `keep_minimums`.

    Raises:
        UnsupportedError: no such quant.
    """
    if quant == "int8":
        return "Q8_0"
    if quant != "int4":
        return Recipe.named(quant).quant
    weights = [info for info in source.tensors.values() if layer_of(info.name) is not None and is_weight(info)]
    n_bits = sum(8 * info.n_bytes for info in weights)
    if all(info.qtype in GRID_TYPES for info in weights) and 0 < n_bits <= INT4_BITS * sum(info.n_weights for info in weights):
        return KEEP_MINIMUMS if learned else KEEP
    return "Q4_K_M" if all(info.shape[-1] % 256 == 0 for info in weights) else "Q4_1"


def fallback(qtype: QType, n_per_row: int) -> QType:
    """Return `qtype`, or the next type whose block divides the row; F16 when none does (llama.cpp's rule)."""
    while n_per_row % block_size(qtype):
        qtype = _FALLBACK.get(qtype, QType.F16)
    return qtype


def _q4_k_m(info: TensorInfo, n_layer: int, tied: bool) -> QType:
    """Q4_K, with Q6_K for the head, and for attn_v (or a fused attn_qkv) and ffn_down of the layers llama.cpp gives more bits.

    Source:
        llama.cpp, src/llama-quant.cpp: the first and last eighth of the layers, and every third between them.
    """
    if info.name == ("token_embd.weight" if tied else "output.weight"):
        return QType.Q6_K
    if any(part in info.name for part in (".attn_v.", ".attn_qkv.", ".ffn_down.")):
        layer, eighth = layer_of(info.name) or 0, n_layer // 8
        if layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2:
            return QType.Q6_K
    return QType.Q4_K
