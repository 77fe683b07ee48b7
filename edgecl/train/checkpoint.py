"""Checkpoints of a training run: one safetensors file, its facts as JSON in the header; never a pickle.

A run is known by its facts: version, base, settings, and a digest of rows, order and start. The same facts give the same
steps, so a run that goes on from a checkpoint ends where an uninterrupted one ends, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edgecl_convert import Adapter, write_atomic

from ..errors import EdgeclError
from .batches import TrainRow

VERSION = 2
Checkpoint: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors on the CPU, and progress in JSON's types


class CheckpointError(EdgeclError):
    """A checkpoint that cannot be read, or is of another base or version; it is left where it is."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint that is damaged, or of another version."""


@dataclass(frozen=True)
class Facts:
    """What a run depends on; `run` as `run_digest` has it."""

    base_sha256: str
    run: str
    version: int = VERSION


def run_digest(told: Any, rows: Sequence[TrainRow], start: Adapter | None) -> str:
    """Return a digest of what decides a run: what it is `told`, in JSON's types, its rows as it meets them, and its start."""
    digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=16)
    for row in rows:
        digest.update(np.array([len(row.ids), *row.ids, *row.supervised, len(row.likely)], np.int64).tobytes())
        digest.update(np.array(row.likely, np.float64).tobytes())
    for name, pair in start.pairs.items() if start else ():
        digest.update(name.encode() + b"".join(np.ascontiguousarray(factor).tobytes() for factor in pair))
    return digest.hexdigest()


def write_checkpoint(path: Path, facts: Facts, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    header = {"facts": json.dumps(asdict(facts)), "progress": json.dumps(progress)}
    write_atomic(path, save(tensors, header | {"digest": _digest(tensors, header)}))


def read_checkpoint(path: Path, facts: Facts) -> Checkpoint | None:
    """Return tensors and progress of a checkpoint; None where there is none, or it is of another night of this base.

    Raises:
        UnreadableCheckpointError: it is damaged, or of another version.
        CheckpointError: it is of another base.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            found, progress = json.loads(header["facts"]), json.loads(header["progress"])
            _check(path, "version", found["version"], facts.version, UnreadableCheckpointError)  # another may lack the rest
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no dict
        if header["digest"] != _digest(tensors, header):
            raise ValueError("its numbers are damaged")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UnreadableCheckpointError(
            f"{path} is not a checkpoint: {type(error).__name__}: {error}; move it away to train from the start"
        ) from None
    _check(path, "base_sha256", found["base_sha256"], facts.base_sha256, CheckpointError)
    return (tensors, progress) if found["run"] == facts.run else None


def _check(path: Path, name: str, found: Any, wanted: Any, error: type[CheckpointError]) -> None:
    if found != wanted:
        raise error(f"{path} is a checkpoint of {name} {found}, training is of {wanted}; move it away to train from the start")


def _digest(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> str:
    digest = hashlib.blake2b((header["facts"] + header["progress"]).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
