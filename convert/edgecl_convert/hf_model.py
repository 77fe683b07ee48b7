"""A Hugging Face folder as a source of weights, with the reading interface of GgufFile.

config.json becomes GGUF metadata and the safetensors become GGUF tensors, row by row where their order differs: nothing is
read before it is asked for, nothing is kept, and neither torch nor transformers is imported. Matrices keep the type that they
are stored in, vectors are F32, as llama.cpp wants them. What the config promises and what the weights are must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, LlamaFileType, get_tensor_name_map
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from .architectures import Sizes, family_of, metadata_of, rope_of, sizes_of, tensors_of
from .errors import ConvertError
from .ggml import Bytes, F32Array, QType, dequantize, dequantize_rows
from .gguf_file import PlannedTensor, TensorInfo
from .gguf_value import encode_value
from .hf_config import HfConfig
from .names import n_heads_permuted, to_gguf_rows
from .safetensors_file import QTYPES, SafetensorsFolder
from .vocab import read_vocabulary

_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # computed values that old folders carry
_ROPE_FACTORS = "rope_freqs.weight"
_FILE_TYPES = {QType.F32: LlamaFileType.ALL_F32, QType.F16: LlamaFileType.MOSTLY_F16, QType.BF16: LlamaFileType.MOSTLY_BF16}


@dataclass(frozen=True)
class _Stored:
    """Where a GGUF tensor comes from: its name in the folder, the order of its rows, and what is added to each weight."""

    name: str
    reorder: Callable[[Bytes], Bytes] | None = None
    add: float = 0.0


class HfModel:
    """A Hugging Face folder, validated; close it, or use it as a context manager.

    Attributes:
        path: the folder.
        tensors: by GGUF name, in the order of the file that is written.
        notes: what the user should know: lines for the terminal.
    """

    alignment = GGUF_DEFAULT_ALIGNMENT

    def __init__(self, folder: Path | str, vocabulary: Mapping[str, Any] | None = None) -> None:
        """Read config.json and the headers of the weights.

        Args:
            vocabulary: every `tokenizer.*` field; None reads the folder's tokenizer.

        Raises:
            UnsupportedError: a family, setting or tokenizer that is not carried over.
            ConvertError: a file is missing or damaged, or config and weights contradict each other.
        """
        self.path = Path(folder)
        family, config = family_of(HfConfig.read(self.path))
        sizes = sizes_of(family, config)
        self._config_path = config.path
        self.architecture = family.name
        self.tensors: dict[str, TensorInfo] = {}
        self._sources: dict[str, _Stored] = {}
        self._computed: dict[str, F32Array] = {}
        self._weights = SafetensorsFolder(self.path)
        try:
            fields, notes = metadata_of(family, config, sizes)
            self.notes = tuple(notes)
            if sizes.n_layer > (n_stored := len(self._weights.tensors)):
                raise self._contradiction(f"the config has {sizes.n_layer} layers, the weights have {n_stored} tensors")
            wanted = tensors_of(family, config, sizes)
            self._check(wanted, sizes)
            self._plan(family.arch, wanted, sizes)
            rope = rope_of(family, config)
            if rope.kind == "llama3":
                self._compute(_ROPE_FACTORS, rope.llama3_factors(sizes.head_dim))
            self._fields = self._general() | {f"{family.name}.{key}": value for key, value in fields.items()}
            self._fields |= self._vocabulary(sizes.n_vocab) if vocabulary is None else vocabulary
        except ConvertError:
            self.close()
            raise

    def __enter__(self) -> HfModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the memory maps."""
        self._weights.close()

    # --- what must be there -------------------------------------------------------------------------------------

    def _contradiction(self, reason: str) -> ConvertError:
        return ConvertError(f"{self._config_path} and the weights contradict each other: {reason}")

    def _check(self, wanted: Mapping[str, tuple[int, ...]], sizes: Sizes) -> None:
        stored = self._weights.tensors
        if missing := [name for name in wanted if name not in stored]:
            raise self._contradiction(f"the weights lack {_few(missing)}")
        unexpected = [name for name in stored if name not in wanted and not name.endswith(_BUFFERS)]
        if sizes.tied:
            unexpected = [name for name in unexpected if not self._is_tied_head(name, next(iter(wanted)))]
        if unexpected:
            raise self._contradiction(f"the model has no place for {_few(unexpected)}")
        for name, shape in wanted.items():
            if stored[name].shape != shape:
                raise self._contradiction(f"{name} must be {shape}, got {stored[name].shape}")
            if (dtype := stored[name].dtype) not in QTYPES:
                raise ConvertError(f"{self.path}: tensor {name} has the dtype {dtype}; allowed: {', '.join(QTYPES)}")

    def _is_tied_head(self, name: str, embedding: str) -> bool:
        """Whether a tensor is the head of a model whose head is its embedding, stored once more."""
        if name not in ("lm_head.weight", "embed_out.weight") or embedding not in self._weights.tensors:
            return False
        if self._weights.tensors[name].dtype not in QTYPES:
            return False
        head, rows = self._weights.blocks(name), self._weights.blocks(embedding)
        step = 1024  # rows at once: a comparison makes a byte for every byte
        if head.shape != rows.shape or any((head[i : i + step] != rows[i : i + step]).any() for i in range(0, len(rows), step)):
            raise self._contradiction(f"tie_word_embeddings is true, but {name} differs from {embedding}")
        return True

    # --- the plan -----------------------------------------------------------------------------------------------

    def _plan(self, arch: MODEL_ARCH, wanted: Mapping[str, tuple[int, ...]], sizes: Sizes) -> None:
        names = get_tensor_name_map(arch, sizes.n_layer)
        heads = {"n_head": sizes.n_head, "n_head_kv": sizes.n_head_kv}
        for stored_name, shape in wanted.items():
            name = names.get_name(stored_name, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise self._contradiction(f"gguf has no name for {stored_name}")
            reorder: Callable[[Bytes], Bytes] | None = None
            if n_heads := n_heads_permuted(name, self.architecture, heads):
                reorder = _rows_reordered(to_gguf_rows, n_heads, shape)
            elif ".attn_qkv." in name:
                reorder = _rows_reordered(_split_qkv, sizes.n_head, shape)
            add = 1.0 if arch == MODEL_ARCH.GEMMA3 and name.endswith("norm.weight") else 0.0  # its norms count from zero
            self._add(name, shape, _Stored(stored_name, reorder, add))
        if sizes.tied and arch == MODEL_ARCH.GPTNEOX:  # llama.cpp wants a head of its own there
            embedding = next(iter(wanted))
            self._add("output.weight", wanted[embedding], _Stored(embedding))

    def _add(self, name: str, shape: tuple[int, ...], source: _Stored) -> None:
        qtype = QTYPES[self._weights.tensors[source.name].dtype] if len(shape) > 1 else QType.F32
        self.tensors[name] = TensorInfo(name, shape, qtype, 0, PlannedTensor(name, shape, qtype).n_bytes)
        self._sources[name] = source

    def _compute(self, name: str, values: F32Array) -> None:
        self.tensors[name] = TensorInfo(name, values.shape, QType.F32, 0, values.nbytes)
        self._computed[name] = values

    # --- metadata -----------------------------------------------------------------------------------------------

    def _general(self) -> dict[str, Any]:
        weights = {info.qtype: 0 for info in self.tensors.values()}
        for info in self.tensors.values():
            weights[info.qtype] += info.n_weights
        return {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": self.path.resolve().name,
            "general.file_type": int(_FILE_TYPES[max(weights, key=lambda qtype: weights[qtype])]),
        }

    def _vocabulary(self, n_vocab: int) -> dict[str, Any]:
        vocabulary = read_vocabulary(self.path)
        self.notes += tuple(vocabulary.limits)
        n_tokens = len(vocabulary.fields["tokenizer.ggml.tokens"])
        if n_tokens != n_vocab:
            raise self._contradiction(f"the tokenizer has {n_tokens} tokens, the embedding has {n_vocab} rows")
        return vocabulary.fields

    @property
    def keys(self) -> list[str]:
        """Names of the metadata fields, in the order of the file that is written."""
        return list(self._fields)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a metadata field: a scalar, a string or a list."""
        return self._fields.get(key, default)

    def require(self, key: str) -> Any:
        """Return a field that the model cannot do without.

        Raises:
            ConvertError: the field is missing.
        """
        if key not in self._fields:
            raise ConvertError(f"{self.path}: lacks the field {key}; download the model again")
        return self._fields[key]

    def raw_field(self, key: str) -> bytes:
        """Return a field's type and value as GGUF stores them."""
        return encode_value(self._fields[key])

    # --- tensors ------------------------------------------------------------------------------------------------

    def blocks(self, name: str) -> Bytes:
        """Return a tensor as (rows, row_bytes) of its type: a view of the file unless its rows are reordered."""
        if name in self._computed:
            return self._computed[name].view(np.uint8).reshape(1, -1)
        source, info = self._sources[name], self.tensors[name]
        stored = QTYPES[self._weights.tensors[source.name].dtype]
        blocks = self._weights.blocks(source.name)
        if source.reorder:
            blocks = source.reorder(blocks)
        if stored == info.qtype and not source.add:
            return blocks
        weights = dequantize_rows(blocks, stored, info.shape[-1])
        return (weights + np.float32(source.add) if source.add else weights).view(np.uint8)

    def weights(self, name: str, n_threads: int = 0) -> F32Array:
        """Return a tensor decoded to float32, in its own shape."""
        info = self.tensors[name]
        return dequantize(self.blocks(name), info.qtype, info.shape[-1], n_threads).reshape(info.shape)

    def release(self, name: str) -> None:
        """Give the pages of a tensor back."""
        if name in self._sources:
            self._weights.release(self._sources[name].name)


def _rows_reordered(order: Callable[[Any, int], Any], n_heads: int, shape: tuple[int, ...]) -> Callable[[Bytes], Bytes]:
    """Return a function that reorders the rows of a matrix, or the items of a vector, given as (rows, row_bytes)."""

    def reorder(blocks: Bytes) -> Bytes:
        items = blocks.reshape(shape[0], -1)  # one row, or one weight, each
        return np.ascontiguousarray(order(items, n_heads)).reshape(blocks.shape)

    return reorder


def _split_qkv(rows: Bytes, n_heads: int) -> Bytes:
    """Return fused rows in GGUF's order, all queries, all keys, all values, from each head's query, key and value."""
    head_dim = len(rows) // n_heads // 3
    return rows.reshape(n_heads, 3, head_dim, -1).swapaxes(0, 1).reshape(rows.shape)


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
