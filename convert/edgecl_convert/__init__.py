"""The conversion stage, usable alone: GGUF in, GGUF out, adapters merged, nothing of edgecl imported.

Opens neither torch nor llama_cpp: ggml's kernels are called by path.
"""

from .adapter import (
    Adapter,
    read_adapter,
    read_gguf_adapter,
    read_peft_adapter,
    write_gguf_adapter,
    write_peft_adapter,
)
from .atomic import atomic_file, fsync_folder, write_atomic
from .errors import AdapterError, ConvertError, GgufError, UnsupportedError
from .gguf_file import GgufFile
from .merge import MergeReport, merge, update_survival

__all__ = [
    "Adapter",
    "AdapterError",
    "ConvertError",
    "GgufError",
    "GgufFile",
    "MergeReport",
    "UnsupportedError",
    "atomic_file",
    "fsync_folder",
    "merge",
    "read_adapter",
    "read_gguf_adapter",
    "read_peft_adapter",
    "update_survival",
    "write_atomic",
    "write_gguf_adapter",
    "write_peft_adapter",
]
