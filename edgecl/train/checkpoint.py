"""Checkpoints of a training run: one safetensors file, its facts as JSON in the header; never a pickle.

A run is known by its facts: version, base, settings, and a digest of rows, order and start. The same facts give the same
steps, so a run that goes on from a checkpoint ends where an uninterrupted one ends, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edgecl_convert import write_atomic

from ..errors import EdgeclError

VERSION = 1
Checkpoint: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors on the CPU, and progress in JSON's types


class CheckpointError(EdgeclError):
    """A checkpoint that cannot be read, or is of another base or version; it is left where it is."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be read."""


@dataclass(frozen=True)
class Facts:
    """What a run depends on; `run` is a digest of settings, rows, their order and the adapter that it starts from."""

    base_sha256: str
    run: str
    version: int = VERSION


def write_checkpoint(path: Path, facts: Facts, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    header = {"facts": json.dumps(asdict(facts)), "progress": json.dumps(progress)}
    write_atomic(path, save(tensors, header | {"digest": _digest(tensors, header["progress"])}))


def read_checkpoint(path: Path, facts: Facts) -> Checkpoint | None:
    """Return tensors and progress of a checkpoint; None where there is none, or it is of another night of this base.

    Raises:
        DamagedCheckpointError: it cannot be read.
        CheckpointError: it is of another base or version.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            found, progress = json.loads(header["facts"]), json.loads(header["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no dict
        if header["digest"] != _digest(tensors, header["progress"]):
            raise ValueError("its numbers are damaged")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} is not a checkpoint: {error}; move it away to train from the start") from None
    for name in ("version", "base_sha256"):
        if found.get(name) != getattr(facts, name):
            raise CheckpointError(
                f"{path} is a checkpoint of {name} {found.get(name)}, training is of {getattr(facts, name)}; "
                "move it away to train from the start"
            )
    return (tensors, progress) if found["run"] == facts.run else None


def _digest(tensors: dict[str, torch.Tensor], progress: str) -> str:
    digest = hashlib.blake2b(progress.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
