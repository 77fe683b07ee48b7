"""A Hugging Face model's config.json, read with care, and its rotary embedding.

Values are asked for by type; where a file is silent, the default is the one of transformers' own configuration class. The
rotary settings of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) come out in one form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConvertError, UnsupportedError
from .ggml import F32Array

_MAX_INTEGER = 1 << 31
_MIN_FLOAT, _MAX_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # GGUF has float32


class HfConfig:
    """config.json, with the defaults of its configuration class.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        """Hold what `read` read."""
        self.path = path
        self._values = values

    @classmethod
    def read(cls, folder: Path) -> HfConfig:
        """Read the config.json of a model folder.

        Raises:
            ConvertError: it is missing, or no JSON object.
        """
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConvertError(f"{path}: cannot be read: {error.strerror or error}; give a Hugging Face model folder") from None
        except (ValueError, RecursionError) as error:
            raise ConvertError(f"{path}: is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConvertError(f"{path}: must be a JSON object, got {type(values).__name__}")
        return cls(path, values)

    def with_defaults(self, defaults: Mapping[str, Any]) -> HfConfig:
        """Return the same file with `defaults` where it is silent."""
        return HfConfig(self.path, {**defaults, **self._values})

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands; null counts as absent."""
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 on.

        Raises:
            ConvertError: it is missing, or something else.
        """
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < _MAX_INTEGER:
            raise ConvertError(f"{self.path}: {key} must be a whole number above 0, got {json.dumps(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above 0 that float32 has.

        Raises:
            ConvertError: it is missing, or something else.
        """
        return positive(self.get(key, default), key, self.path)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false.

        Raises:
            ConvertError: it is something else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConvertError(f"{self.path}: {key} must be true or false, got {json.dumps(value)}")
        return value

    def refuse(self, key: str, why: str) -> UnsupportedError:
        """Return the error for a value that cannot be carried over to GGUF."""
        return UnsupportedError(f"{self.path}: {key} = {json.dumps(self.get(key))[:60]} is not supported: {why}")


def positive(value: Any, key: str, path: Path) -> float:
    """Return `value` as a number above 0 that float32 has.

    Raises:
        ConvertError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _MIN_FLOAT <= value <= _MAX_FLOAT:
        raise ConvertError(f"{path}: {key} must be a number above 0, got {json.dumps(value)[:60]}; allowed: 1.2e-38 to 3.4e38")
    return float(value)


# --- rotary embedding -----------------------------------------------------------------------------------------------

_THETA = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}  # where transformers 4 has them


class Rope:
    """The rotary settings of one kind of layer.

    Attributes:
        theta: base of the rotary frequencies.
        kind: default, linear, yarn or llama3.
        share: of a head's dimensions, how many rotate.
    """

    def __init__(self, config: HfConfig, layer_type: str = "") -> None:
        """Read them; `layer_type` where each kind of layer has its own (gemma3).

        Raises:
            ConvertError, UnsupportedError: they are missing, not sound, or of a kind that llama.cpp does not compute.
        """
        self._path = config.path
        found = config.get("rope_parameters", {})
        old = config.get("rope_scaling", {})
        if isinstance(found, dict) and layer_type:
            found = found.get(layer_type) or {}
            old = {} if layer_type == "sliding_attention" else old
        if not isinstance(found, dict) or not isinstance(old, dict):
            raise ConvertError(f"{config.path}: rope_parameters and rope_scaling must be JSON objects")
        self._values = {**found, **old}
        self.kind = str(self._values.get("rope_type") or self._values.get("type") or "default")
        self.theta = self._number("rope_theta", config.get(_THETA.get(layer_type, "rope_theta")))
        self.share = self._number("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        self._context = config.integer("max_position_embeddings")

    def check_kind(self, allowed: tuple[str, ...]) -> None:
        """Check that llama.cpp computes this kind for an architecture.

        Raises:
            UnsupportedError: it does not.
        """
        if self.kind not in allowed:
            raise UnsupportedError(
                f"{self._path}: rotary scaling {self.kind!r} is not supported for this architecture; "
                f"allowed: {', '.join(allowed)}"
            )

    def fields(self) -> dict[str, Any]:
        """Return the metadata of the scaling, keys below `rope.scaling.`; llama3 has a tensor instead."""
        if self.kind == "linear":
            return {"type": "linear", "factor": self._number("factor")}
        return self._yarn() if self.kind == "yarn" else {}

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        return positive(default if value is None else value, f"rotary {key}", self._path)

    def _yarn(self) -> dict[str, Any]:
        for key, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):  # llama.cpp has no key for them
            if self._values.get(key) not in (None, fixed):
                raise UnsupportedError(
                    f"{self._path}: yarn's {key} must be {fixed}, got {self._values[key]}; llama.cpp has no other"
                )
        original = math.ceil(self._number("original_max_position_embeddings", self._context))
        factor = self._number("factor", self._context / original)
        # llama.cpp scales queries and keys by this on its own; what differs goes into a factor beside it
        wanted = usual = _mscale(factor, 1.0)
        if self._values.get("mscale") and self._values.get("mscale_all_dim"):
            wanted = _mscale(factor, self._number("mscale")) / _mscale(factor, self._number("mscale_all_dim"))
        wanted = self._number("attention_factor", wanted)
        fields = {"type": "yarn", "factor": factor, "original_context_length": original}
        return fields if wanted == usual else fields | {"attn_factor": wanted / usual}

    def llama3_factors(self, head_dim: int) -> F32Array:
        """Return (head_dim / 2,): what Llama 3.1 divides each rotary frequency by.

        Source:
            Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are blended.
        """
        context = self._number("original_max_position_embeddings", self._context)
        low, high, factor = (self._number(key) for key in ("low_freq_factor", "high_freq_factor", "factor"))
        if not low < high:
            raise ConvertError(f"{self._path}: rotary low_freq_factor {low} must be below high_freq_factor {high}")
        turns = context / (2 * np.pi) / self.theta ** (np.arange(0, head_dim, 2) / head_dim)  # in the original context
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: stays
        return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def _mscale(factor: float, scale: float) -> float:
    """YaRN's attention factor for a context that is `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
