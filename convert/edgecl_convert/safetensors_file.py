"""Reading safetensors, strictly and without copies: one file, or the shards of a folder.

The format is a length, a JSON header and the data (https://github.com/huggingface/safetensors): every offset, shape and type
of the header is checked against the file before anything is believed, and weights are views of a memory map. A folder has
model.safetensors, or an index that names its shards. Neither torch nor the safetensors library is needed.

*Does not cover*: pickled weights (pytorch_model.bin), which can run code when they are read and are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConvertError
from .ggml import Bytes, QType
from .mapped import map_file, release

QTYPES = {"F32": QType.F32, "F16": QType.F16, "BF16": QType.BF16}  # what weights may be

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # as the format has it
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        shape: in torch's order.
        dtype: as the file names it: F32, BF16, I64 ...
        offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    n_bytes: int


class SafetensorsFile:
    """One validated file, memory-mapped.

    Attributes:
        path: the file.
        tensors: by name, in file order.
        metadata: what its header says beside them.
    """

    def __init__(self, path: Path) -> None:
        """Walk the header of `path`.

        Raises:
            ConvertError: not a safetensors file, truncated, or a header that does not fit the data.
        """
        self.path = path
        try:
            self._map = map_file(path)
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise self._error("is empty, not a safetensors file") from None
        try:
            self.tensors = self._walk()
        except ConvertError:
            self.close()
            raise

    def close(self) -> None:
        """Drop the memory map; arrays handed out keep it alive until they go."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def blocks(self, name: str) -> Bytes:
        """Return a tensor as a read-only (rows, row_bytes) view of the file; a vector is one row."""
        stored = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, stored.n_bytes, stored.offset)
        rows, n_per_row = math.prod(stored.shape[:-1]), math.prod(stored.shape[-1:])
        return flat.reshape(rows, n_per_row * _ITEM_BYTES[stored.dtype])

    def release(self, name: str) -> None:
        """Give a tensor's pages back."""
        release(self._map, self.tensors[name].offset, self.tensors[name].n_bytes)

    def _error(self, reason: str) -> ConvertError:
        return ConvertError(f"{self.path}: {reason}")

    def _walk(self) -> dict[str, StoredTensor]:
        size = len(self._map)
        if size < 8:
            raise self._error(f"is not a safetensors file: it has {size} bytes")
        (length,) = struct.unpack_from("<Q", self._map)
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise self._error(f"is not a safetensors file, or truncated: its header claims {length} bytes of {size - 8}")
        try:
            header = json.loads(self._map[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_doubles)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise self._error(f"has a header that is not sound JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._error("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        tensors = [self._tensor(name, entry, 8 + length) for name, entry in header.items()]
        self._check_layout(tensors, 8 + length)
        return {tensor.name: tensor for tensor in tensors}

    def _tensor(self, name: str, entry: Any, data_start: int) -> StoredTensor:
        if not name.isprintable():
            raise self._error(f"tensor {name!r} has a name that cannot be printed")
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise self._error(f"tensor {name!r} has the dtype {dtype!r}; allowed: {', '.join(_ITEM_BYTES)}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise self._error(f"tensor {name!r} has the shape {shape!r} and the data_offsets {offsets!r}, which are not sound")
        n_bytes = _ITEM_BYTES[dtype]
        for dim in shape:
            n_bytes *= dim
        start, stop = offsets
        if stop - start != n_bytes:
            raise self._error(f"tensor {name!r} is {dtype} of shape {shape}, {n_bytes} bytes, but has {stop - start} bytes")
        return StoredTensor(name, tuple(shape), dtype, data_start + start, n_bytes)

    def _check_layout(self, tensors: list[StoredTensor], data_start: int) -> None:
        at = data_start
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
            if tensor.offset != at:
                raise self._error(f"tensor {tensor.name!r} overlaps another, or leaves a hole before it")
            at += tensor.n_bytes
        if at != len(self._map):
            what = "is truncated" if at > len(self._map) else "has bytes that no tensor owns"
            raise self._error(f"{what}: its header accounts for {at} bytes, the file has {len(self._map)}")


class SafetensorsFolder:
    """All weights of a folder: model.safetensors, or the shards that model.safetensors.index.json names.

    Attributes:
        path: the folder.
        tensors: by name, over all shards.
    """

    def __init__(self, folder: Path) -> None:
        """Open every shard.

        Raises:
            ConvertError: no safetensors (pickled weights are refused), a missing shard, or one that contradicts the index.
        """
        self.path = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, SafetensorsFile] = {}
        index = folder / _INDEX
        wanted = _read_index(index) if index.exists() else {}
        try:
            for shard in dict.fromkeys(wanted.values()) if wanted else [_the_single_file(folder).name]:
                self._add(shard, index)
            for name, shard in wanted.items():
                if self._home.get(name) is not self._files[shard]:
                    raise ConvertError(f"{index}: says that {name} is in {shard}, where it is not; fetch the folder again")
        except ConvertError:
            self.close()
            raise

    def close(self) -> None:
        """Drop all memory maps."""
        for file in self._files.values():
            file.close()

    def blocks(self, name: str) -> Bytes:
        """Return a tensor as a read-only (rows, row_bytes) view of its shard."""
        return self._home[name].blocks(name)

    def release(self, name: str) -> None:
        """Give a tensor's pages back."""
        self._home[name].release(name)

    def _add(self, shard: str, index: Path) -> None:
        path = self.path / shard
        if not path.is_file():
            raise ConvertError(f"{path}: is missing, but {index.name} names it; fetch it")
        file = self._files[shard] = SafetensorsFile(path)
        for name in file.tensors:
            if name in self._home:
                raise ConvertError(f"{path}: has the tensor {name}, which {self._home[name].path.name} has too")
            self._home[name] = file
        self.tensors |= file.tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_doubles)["weight_map"]
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConvertError(f"{path}: is not a safetensors index: {error}") from None
    if not isinstance(names, dict) or not names:
        raise ConvertError(f"{path}: is not a safetensors index: its weight_map is empty, or no object")
    for shard in names.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ConvertError(f"{path}: names the shard {shard!r}; a .safetensors file of the same folder is allowed")
    return names


def _the_single_file(folder: Path) -> Path:
    path = folder / _SINGLE
    if path.is_file():
        return path
    pickled = sorted(p.name for ending in ("bin", "pt", "pth") for p in folder.glob(f"*.{ending}"))
    if pickled:
        raise ConvertError(f"{folder}: refused: only safetensors are read, got {pickled[0]} (pickled weights can run code)")
    raise ConvertError(f"{folder}: has no {_SINGLE} and no {_INDEX}; give a Hugging Face model folder")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _are_counts(values: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on that an offset can hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
