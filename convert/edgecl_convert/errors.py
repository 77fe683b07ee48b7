"""Every exception of the conversion stage.

ConvertError(ValueError)          the base: catch this one
├── GgufError                     the file is not a GGUF, is truncated or contradicts itself
├── AdapterError                  an adapter that GGUF cannot express, or that fits another base
└── UnsupportedError              an architecture or tensor type this stage does not handle
"""

from __future__ import annotations

from pathlib import Path


class ConvertError(ValueError):
    """Base of every error of edgecl_convert; the message says what, got, allowed and what to do."""


class GgufError(ConvertError):
    """A GGUF file that cannot be trusted.

    Attributes:
        path: the file.
        reason: what is wrong with it, without the path.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


class AdapterError(ConvertError):
    """An adapter that cannot be merged or written as GGUF LoRA."""


class UnsupportedError(ConvertError):
    """An architecture, tensor type or recipe that is not handled."""
