"""LoRA adapters as PEFT folders and as GGUF files, both ways.

In memory an adapter is named and laid out as GGUF has it; PEFT's names and row order appear only at the edge.
llama.cpp applies `lora_alpha / r`, with one alpha for the whole file and r read from each tensor, so whatever PEFT can say
beyond that (rsLoRA, DoRA, alpha_pattern, trained biases or whole modules) is refused by name, never dropped.
PEFT folders are read and written with safetensors alone: no torch, no peft.

Format: https://github.com/ggml-org/llama.cpp (convert_lora_to_gguf), peft's adapter_config.json.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from .atomic import write_atomic
from .errors import AdapterError, ConvertError
from .ggml import F32Array, QType, dequantize_rows
from .gguf_file import GgufFile, PlannedTensor, encode_field, write_gguf
from .names import (
    check_architecture,
    from_gguf_rows,
    head_counts,
    module_of,
    n_heads_permuted,
    projection_of,
    to_gguf_rows,
)
from .safetensors_file import QTYPES, SafetensorsFile
from .source import Source

_PEFT_PREFIX = "base_model.model."
_HASH_KEY = "edgecl.base_sha256"
# adapter_config.json fields, and the values that GGUF LoRA can express
_EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": ([], None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base's weights
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}


@dataclass
class Adapter:
    """A LoRA adapter in GGUF's layout.

    Attributes:
        lora_alpha: scaling of a tensor = lora_alpha / its r.
        pairs: by base tensor name, (lora_A (r, in), lora_B (out, r)), float32.
        base_sha256: hash of the base it was trained on; empty when the file does not say.
    """

    architecture: str
    lora_alpha: float
    pairs: dict[str, tuple[F32Array, F32Array]] = field(default_factory=dict)
    base_sha256: str = ""

    def scaling(self, name: str) -> float:
        """Return lora_alpha / r of one tensor."""
        return self.lora_alpha / int(self.pairs[name][0].shape[0])

    def check_fits(self, base: Source) -> None:
        """Check that every pair has a tensor of its shape in `base`.

        Raises:
            AdapterError: another architecture, a missing tensor, or another shape.
        """
        if self.architecture != base.architecture:
            raise AdapterError(
                f"adapter is for architecture {self.architecture}, {base.path} is {base.architecture}; use its own base"
            )
        if not 0 < self.lora_alpha < math.inf:
            raise AdapterError(f"adapter's lora_alpha must be a finite number above 0, got {self.lora_alpha}; train it again")
        for name, (a, b) in self.pairs.items():
            info = base.tensors.get(name)
            if info is None:
                raise AdapterError(f"adapter changes {name}, which {base.path} does not have; use its own base")
            if a.ndim != 2 or b.ndim != 2 or not a.size or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != info.shape:
                raise AdapterError(f"adapter's {name} is {b.shape} x {a.shape}, {base.path} has {info.shape}; use its own base")
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise AdapterError(f"adapter's {name} has NaN or infinite values; train it again")

    def check_hash(self, sha256: str) -> None:
        """Check that the adapter was trained on the base with this hash, where it says on which.

        Raises:
            AdapterError: it names another base.
        """
        if self.base_sha256 and self.base_sha256 != sha256:
            raise AdapterError(
                f"adapter was trained on the base with sha256 {self.base_sha256[:12]}, got one with {sha256[:12]}; "
                "use its own base"
            )


# --- GGUF -----------------------------------------------------------------------------------------------------------


def read_gguf_adapter(path: Path | str) -> Adapter:
    """Read a GGUF LoRA file.

    Raises:
        GgufError: not a GGUF.
        AdapterError: a GGUF that is not a LoRA adapter, is an activated one (aLoRA), or has a half pair.
    """
    with GgufFile(path) as gguf:
        if gguf.get("general.type") != "adapter" or gguf.get("adapter.type") != "lora":
            raise AdapterError(f"{path}: is a GGUF {gguf.get('general.type', 'model')}, not a LoRA adapter")
        if tokens := gguf.get("adapter.alora.invocation_tokens"):
            raise _inexpressible(path, "alora_invocation_tokens", tokens)
        alpha = gguf.require("adapter.lora.alpha")
        if not isinstance(alpha, int | float):
            raise AdapterError(f"{path}: adapter.lora.alpha must be a number, got {alpha!r}")
        adapter = Adapter(gguf.architecture, float(alpha), {}, str(gguf.get(_HASH_KEY, default="")))
        halves = {name: np.array(gguf.weights(name)) for name in gguf.tensors}
    for name, a in halves.items():
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            if f"{stem}.lora_b" not in halves:
                raise AdapterError(f"{path}: {stem} has a lora_a but no lora_b")
            adapter.pairs[stem] = (a, halves[f"{stem}.lora_b"])
    if not adapter.pairs or len(adapter.pairs) * 2 != len(halves):
        raise AdapterError(f"{path}: has no lora_a/lora_b pairs, or tensors other than those")
    return adapter


def write_gguf_adapter(path: Path | str, adapter: Adapter) -> int:
    """Write a GGUF LoRA file that llama.cpp loads (float32 tensors); return its bytes.

    Raises:
        ConvertError: the file cannot be written.
    """
    fields = [
        encode_field("general.architecture", adapter.architecture),
        encode_field("general.type", "adapter"),
        encode_field("adapter.type", "lora"),
        encode_field("adapter.lora.alpha", float(adapter.lora_alpha)),
    ]
    if adapter.base_sha256:
        fields.append(encode_field(_HASH_KEY, adapter.base_sha256))
    halves = [
        (f"{name}.{half}", tensor)
        for name, pair in adapter.pairs.items()
        for half, tensor in zip(("lora_a", "lora_b"), pair, strict=True)
    ]
    plan = [PlannedTensor(name, tensor.shape, QType.F32) for name, tensor in halves]
    return write_gguf(path, fields, plan, (np.ascontiguousarray(t, np.float32).view(np.uint8) for _, t in halves))


# --- PEFT -----------------------------------------------------------------------------------------------------------


def read_peft_adapter(folder: Path | str, base: GgufFile) -> Adapter:
    """Read a PEFT LoRA folder (adapter_config.json, adapter_model.safetensors) for `base`.

    Raises:
        AdapterError: not such a folder, or fields that GGUF LoRA cannot express.
    """
    folder = Path(folder)
    config = _read_config(folder)
    architecture = check_architecture(base)
    heads = head_counts(base)
    tensors, metadata = _read_safetensors(folder / "adapter_model.safetensors")
    adapter = Adapter(architecture, float(config["lora_alpha"]), {}, metadata.get(_HASH_KEY, ""))
    for key in tensors:
        module, _, half = key.removeprefix(_PEFT_PREFIX).partition(".lora_")
        if half not in ("A.weight", "B.weight"):
            raise AdapterError(f"{folder}: holds {key}, which is not a lora_A or lora_B weight and cannot be expressed")
        if half == "B.weight":
            continue
        name = projection_of(module)
        b = tensors.get(f"{_PEFT_PREFIX}{module}.lora_B.weight")
        if b is None:
            raise AdapterError(f"{folder}: {module} has a lora_A but no lora_B")
        n_heads = n_heads_permuted(name, architecture, heads)
        if b.ndim != 2 or (n_heads and b.shape[0] % (2 * n_heads)):
            raise AdapterError(f"{folder}: lora_B of {module} is {b.shape}, which does not fit {base.path}; use its own base")
        adapter.pairs[name] = (tensors[key], to_gguf_rows(b, n_heads))
    if not adapter.pairs or len(adapter.pairs) * 2 != len(tensors):
        raise AdapterError(f"{folder}: has no complete lora_A/lora_B pairs, or a lora_B without its lora_A")
    return adapter


def write_peft_adapter(folder: Path | str, adapter: Adapter, base: GgufFile) -> None:
    """Write `adapter` as a PEFT folder that `PeftModel.from_pretrained` loads.

    Raises:
        ConvertError: the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    heads = head_counts(base)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    ranks: dict[str, int] = {}
    for name, (a, b) in adapter.pairs.items():
        module = module_of(name, adapter.architecture).removesuffix(".weight")
        rows = from_gguf_rows(b, n_heads_permuted(name, adapter.architecture, heads))
        tensors[f"{_PEFT_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"{_PEFT_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(rows, np.float32)
        ranks[module] = a.shape[0]
    r = max(set(ranks.values()), key=list(ranks.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path.name,
        "r": r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    metadata = {"format": "pt"} | ({_HASH_KEY: adapter.base_sha256} if adapter.base_sha256 else {})
    write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata=metadata))
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_adapter(path: Path | str, base: GgufFile) -> Adapter:
    """Read an adapter of either form and check that it fits `base`.

    Raises:
        AdapterError, GgufError: it cannot be read, expressed, or does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise AdapterError(f"{path}: no such adapter; give a GGUF LoRA file or a PEFT folder")
    adapter = read_peft_adapter(path, base) if path.is_dir() else read_gguf_adapter(path)
    adapter.check_fits(base)
    return adapter


def _inexpressible(path: Path | str, name: str, value: Any) -> AdapterError:
    return AdapterError(
        f"{path}: {name}={json.dumps(value)} cannot be expressed in GGUF LoRA; "
        f"allowed: {json.dumps(_EXPRESSIBLE[name][0])}; train without it"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}; give a PEFT adapter folder") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: is not JSON: {error}") from None
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "LORA":
        raise AdapterError(f"{path}: peft_type must be LORA, got {peft_type!r}")
    for name, allowed in _EXPRESSIBLE.items():
        if name in config and config[name] not in allowed:
            raise _inexpressible(path, name, config[name])
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise AdapterError(f"{path}: lora_alpha must be a number above 0, got {alpha!r}")
    return dict(config)


def _read_safetensors(path: Path) -> tuple[dict[str, F32Array], dict[str, str]]:
    try:
        file = SafetensorsFile(path)
    except ConvertError as error:
        raise AdapterError(str(error)) from None
    tensors = {}
    for name, stored in file.tensors.items():
        if stored.dtype not in QTYPES:
            raise AdapterError(
                f"{path}: {name} is of {stored.dtype}; factors are of {', '.join(QTYPES)}; save it as one of these"
            )
        values = dequantize_rows(file.blocks(name), QTYPES[stored.dtype], math.prod(stored.shape[-1:]))
        tensors[name] = np.array(values).reshape(stored.shape)
    file.close()
    return tensors, file.metadata
