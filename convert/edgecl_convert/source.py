"""What weights are read from: a GGUF file or a Hugging Face folder, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from .ggml import Bytes, F32Array
from .gguf_file import GgufFile, TensorInfo
from .hf_model import HfModel


class Source(Protocol):
    """A model whose metadata and tensors are known, and whose weights are read when they are asked for.

    Attributes:
        path: the file or folder.
        alignment: of tensors in the file that is written, in bytes.
        tensors: by GGUF name, with torch's shapes, in the order of the file that is written.
        notes: what the user should know, a line each.
    """

    path: Path
    alignment: int
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """general.architecture."""

    @property
    def keys(self) -> list[str]:
        """Names of the metadata fields."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a metadata field."""

    def require(self, key: str) -> Any:
        """Return a field that the model cannot do without."""

    def raw_field(self, key: str) -> bytes:
        """Return a field's type and value as GGUF stores them."""

    def blocks(self, name: str) -> Bytes:
        """Return a tensor's (rows, row_bytes) blocks of its type."""

    def weights(self, name: str, n_threads: int = 0) -> F32Array:
        """Return a tensor decoded to float32."""

    def release(self, name: str) -> None:
        """Give the pages of a tensor back."""


def open_source(path: Path | str) -> GgufFile | HfModel:
    """Open a GGUF file, or a Hugging Face folder.

    Raises:
        ConvertError: it is neither, damaged, or not supported.
    """
    return HfModel(path) if Path(path).is_dir() else GgufFile(path)
