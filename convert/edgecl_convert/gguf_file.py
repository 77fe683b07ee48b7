"""Reading and writing GGUF, strictly and without copies.

llama.cpp aborts the whole process on some malformed files, so every file is walked here first: each length, type,
offset and name is checked against the file before anything is believed. Metadata stays as the bytes it came in
(a merged file keeps its tokenizer to the last bit, and 100,000 vocabulary entries cost nothing until asked for);
tensors are views of a memory map. Format: GGUF versions 2 and 3, little endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

*Does not cover*: big-endian files, version 1, parts of a split model. A flipped bit inside the weights is not visible
here; the manifest's sha256 finds it.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC

from .atomic import atomic_file
from .errors import GgufError
from .ggml import Bytes, F32Array, QType, dequantize, row_bytes
from .gguf_value import SCALARS, encode_string, encode_value
from .mapped import map_file, release

if TYPE_CHECKING:
    from .source import Source

_MAX_NAME_BYTES = 65535
_MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME, less the closing zero
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        shape: in torch's order, rows first: (out, in) for a weight.
        offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    offset: int
    n_bytes: int

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class _Field:
    value_type: GGUFValueType
    start: int  # of the value, after its type
    stop: int


class GgufFile:
    """A validated GGUF file, memory-mapped; close it, or use it as a context manager.

    Attributes:
        path: the file.
        tensors: by name, in file order.
        notes: what the user should know; none for a GGUF file.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | str) -> None:
        """Walk the header of `path`.

        Raises:
            GgufError: not a GGUF, truncated, or malformed.
        """
        self.path = Path(path)
        try:
            self._map = map_file(self.path)
        except OSError as error:
            raise GgufError(self.path, f"cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise GgufError(self.path, "is empty, not a GGUF file") from None
        self._fields: dict[str, _Field] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._walk()
        except (struct.error, OverflowError):  # OverflowError: a length that no offset can hold
            self._map.close()
            raise GgufError(self.path, "is truncated: its header ends in the middle of an entry") from None
        except GgufError:
            self._map.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the memory map; arrays handed out keep it alive until they go."""
        with contextlib.suppress(BufferError):  # a view is still in use; the map goes with it
            self._map.close()

    # --- the walk -----------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        magic, version, n_tensors, n_fields = struct.unpack_from("<IIQQ", self._map, 0)
        if magic != GGUF_MAGIC:
            raise GgufError(self.path, f"is not a GGUF file: it starts with {self._map[:4]!r}, not b'GGUF'")
        if version not in (2, 3):
            raise GgufError(self.path, f"has GGUF version {version}; 2 and 3 are read")
        size = len(self._map)
        if n_tensors > size // 24 or n_fields > size // 13:  # the least bytes an entry takes
            raise GgufError(self.path, f"claims {n_tensors} tensors and {n_fields} fields in {size} bytes")
        at = 24
        for _ in range(n_fields):
            at = self._walk_field(at)
        self.fields_end = at
        self._check_whole()
        self.alignment = self._read_alignment()
        raw_infos = []
        for _ in range(n_tensors):
            name, shape, qtype, offset, at = self._walk_tensor(at)
            raw_infos.append((name, shape, qtype, offset))
        data_start = -(-at // self.alignment) * self.alignment
        for name, shape, qtype, offset in raw_infos:
            self._add_tensor(name, shape, qtype, offset, data_start)
        self._check_overlap()

    def _check_whole(self) -> None:
        n_parts = self.get("split.count")
        if isinstance(n_parts, int) and n_parts > 1:
            raise GgufError(
                self.path, f"is one of {n_parts} parts of a model; join them with llama-gguf-split --merge FIRST-PART OUT"
            )

    def _read_alignment(self) -> int:
        alignment = self.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise GgufError(self.path, f"general.alignment must be a power of two of at least 8, got {alignment!r}")
        return alignment

    def _string(self, at: int, limit: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._map, at)
        stop = at + 8 + length
        if length > limit or stop > len(self._map):
            raise GgufError(self.path, f"has a string of {length} bytes at offset {at}, past its end or its limit")
        try:
            return self._map[at + 8 : stop].decode("utf-8"), stop
        except UnicodeDecodeError:
            raise GgufError(self.path, f"has a name at offset {at} that is not UTF-8") from None

    def _value_type(self, number: int, at: int) -> GGUFValueType:
        try:
            return GGUFValueType(number)
        except ValueError:
            raise GgufError(self.path, f"has an unknown value type {number} at offset {at}") from None

    def _walk_field(self, at: int) -> int:
        key, at = self._string(at, _MAX_NAME_BYTES)
        (number,) = struct.unpack_from("<I", self._map, at)
        value_type = self._value_type(number, at)
        stop = self._skip(value_type, at + 4)
        if stop > len(self._map):
            raise GgufError(self.path, f"is truncated inside its field {key!r}")
        if not key or key in self._fields:
            raise GgufError(self.path, f"has the field {key!r} twice" if key else "has a field without a name")
        self._fields[key] = _Field(value_type, at + 4, stop)
        return stop

    def _skip(self, value_type: GGUFValueType, at: int) -> int:
        if value_type in SCALARS:
            return at + struct.calcsize(SCALARS[value_type])
        if value_type == GGUFValueType.STRING:
            return int(at + 8 + struct.unpack_from("<Q", self._map, at)[0])
        number, count = struct.unpack_from("<IQ", self._map, at)
        item_type, at = self._value_type(number, at), at + 12
        if item_type in SCALARS:
            return int(at + count * struct.calcsize(SCALARS[item_type]))
        if item_type == GGUFValueType.ARRAY or count > len(self._map) // 8:
            raise GgufError(self.path, f"has an array at offset {at} that is nested or longer than the file")
        unpack, data = struct.Struct("<Q").unpack_from, self._map
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        return at

    def _walk_tensor(self, at: int) -> tuple[str, tuple[int, ...], QType, int, int]:
        name, at = self._string(at, _MAX_TENSOR_NAME_BYTES)
        (n_dims,) = struct.unpack_from("<I", self._map, at)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise GgufError(self.path, f"tensor {name!r} has {n_dims} dimensions; 1 to {_MAX_DIMS} are allowed")
        dims = struct.unpack_from(f"<{n_dims}Q", self._map, at + 4)
        number, offset = struct.unpack_from("<IQ", self._map, at + 4 + 8 * n_dims)
        try:
            qtype = QType(number)
        except ValueError:
            raise GgufError(self.path, f"tensor {name!r} has an unknown type {number}") from None
        return name, tuple(reversed(dims)), qtype, offset, at + 16 + 8 * n_dims

    def _add_tensor(self, name: str, shape: tuple[int, ...], qtype: QType, offset: int, data_start: int) -> None:
        if not name or name in self.tensors:
            raise GgufError(self.path, f"has the tensor {name!r} twice" if name else "has a tensor without a name")
        n_weights = 1
        for dim in shape:
            n_weights *= dim  # Python integers: no overflow
        if not 0 < n_weights < 1 << 62:
            raise GgufError(self.path, f"tensor {name!r} has the impossible shape {shape}")
        if shape[-1] % GGML_QUANT_SIZES[qtype][0]:
            raise GgufError(self.path, f"tensor {name!r}: rows of {shape[-1]} weights do not fit {qtype.name} blocks")
        n_bytes = row_bytes(qtype, shape[-1]) * (n_weights // shape[-1])
        if offset % self.alignment:
            raise GgufError(self.path, f"tensor {name!r} is not aligned to {self.alignment} bytes")
        if data_start + offset + n_bytes > len(self._map):
            raise GgufError(self.path, f"is truncated: tensor {name!r} ends past the end of the file")
        self.tensors[name] = TensorInfo(name, shape, qtype, data_start + offset, n_bytes)

    def _check_overlap(self) -> None:
        ordered = sorted(self.tensors.values(), key=lambda info: info.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.n_bytes > after.offset:
                raise GgufError(self.path, f"tensors {before.name!r} and {after.name!r} overlap")

    # --- metadata -----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """Names of the metadata fields, in file order."""
        return list(self._fields)

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, or an empty string."""
        value = self.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the decoded value of a metadata field: a scalar, a string or a list."""
        field = self._fields.get(key)
        return default if field is None else self._decode(field.value_type, field.start)[0]

    def require(self, key: str) -> Any:
        """Return a field that the model cannot do without.

        Raises:
            GgufError: the field is missing.
        """
        if key not in self._fields:
            raise GgufError(self.path, f"lacks the field {key}; download or convert the model again")
        return self.get(key)

    def raw_field(self, key: str) -> bytes:
        """Return a field's type and value as stored."""
        field = self._fields[key]
        return self._map[field.start - 4 : field.stop]

    def _decode(self, value_type: GGUFValueType, at: int) -> tuple[Any, int]:
        if value_type in SCALARS:
            code = "<" + SCALARS[value_type]
            return struct.unpack_from(code, self._map, at)[0], at + struct.calcsize(code)
        if value_type == GGUFValueType.STRING:
            (length,) = struct.unpack_from("<Q", self._map, at)
            return self._map[at + 8 : at + 8 + length].decode("utf-8", "replace"), at + 8 + length
        number, count = struct.unpack_from("<IQ", self._map, at)
        at += 12
        item_type = GGUFValueType(number)
        if item_type in SCALARS:
            code = f"<{count}{SCALARS[item_type]}"
            return list(struct.unpack_from(code, self._map, at)), at + struct.calcsize(code)
        items = []
        for _ in range(count):
            item, at = self._decode(item_type, at)
            items.append(item)
        return items, at

    # --- tensors ------------------------------------------------------------------------------------------------

    def blocks(self, name: str) -> Bytes:
        """Return a tensor's blocks as a read-only (rows, row_bytes) view of the file."""
        info = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, info.n_bytes, info.offset)
        return flat.reshape(-1, row_bytes(info.qtype, info.shape[-1]))

    def weights(self, name: str, n_threads: int = 0) -> F32Array:
        """Return a tensor decoded to float32, in its own shape."""
        info = self.tensors[name]
        return dequantize(self.blocks(name), info.qtype, info.shape[-1], n_threads).reshape(info.shape)

    def release(self, name: str) -> None:
        """Give the pages of a tensor back."""
        release(self._map, self.tensors[name].offset, self.tensors[name].n_bytes)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    qtype: QType

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return row_bytes(self.qtype, self.shape[-1]) * int(np.prod(self.shape[:-1], dtype=np.int64))

    def padded_bytes(self, alignment: int) -> int:
        """Size of its data in the file, up to where the next tensor begins."""
        return -(-self.n_bytes // alignment) * alignment


def encode_field(key: str, value: Any) -> bytes:
    """Return one metadata field as GGUF bytes; types as `encode_value` has them."""
    return encode_string(key) + encode_value(value)


def copied_fields(source: Source, **replaced: int) -> list[bytes]:
    """Return `source`'s metadata as bytes, with `general.<name>` values replaced where they exist.

    Args:
        replaced: by the part after `general.`, such as file_type=7.
    """
    fields = []
    for key in source.keys:
        value = replaced.get(key.removeprefix("general."))
        is_replaced = key.startswith("general.") and value is not None
        fields.append(encode_field(key, value) if is_replaced else encode_string(key) + source.raw_field(key))
    return fields


def _header(fields: list[bytes], plan: list[PlannedTensor], alignment: int) -> bytes:
    header = bytearray(struct.pack("<IIQQ", GGUF_MAGIC, 3, len(plan), len(fields)))
    header += b"".join(fields)
    offset = 0
    for tensor in plan:
        header += encode_string(tensor.name)
        header += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.qtype, offset)
        offset += tensor.padded_bytes(alignment)
    return bytes(header) + b"\0" * (-len(header) % alignment)


def file_bytes(fields: list[bytes], plan: list[PlannedTensor], alignment: int = GGUF_DEFAULT_ALIGNMENT) -> int:
    """Return the size of the file that `write_gguf` would write."""
    return len(_header(fields, plan, alignment)) + sum(tensor.padded_bytes(alignment) for tensor in plan)


def write_gguf(
    path: Path | str,
    fields: list[bytes],
    plan: list[PlannedTensor],
    data: Iterator[Bytes],
    alignment: int = GGUF_DEFAULT_ALIGNMENT,
) -> int:
    """Write a GGUF file under a temporary name, fsync it and rename it to `path`; return its size in bytes.

    Args:
        fields: metadata, each as `encode_field` returns it.
        plan: what the tensors are, in the order of `data`.
        data: yields each tensor's blocks; one tensor is in memory at a time.

    Raises:
        ConvertError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    header = _header(fields, plan, alignment)
    with atomic_file(path) as out:
        out.write(header)
        for tensor, blocks in zip(plan, data, strict=True):
            out.write(np.ascontiguousarray(blocks).data)
            out.write(b"\0" * (-tensor.n_bytes % alignment))
        return out.tell()
