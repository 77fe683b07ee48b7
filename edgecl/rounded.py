"""Quantization-aware training: what a night's last steps are trained on, where few bits are served.

A merge at 4 bits rounds base + adapter, and what rounding changes is noise to the model. But the next merge of nearly the
same adapter makes nearly the same noise: a weight's dither is fixed, and its code moves only where the update does
(`edgecl_convert.grid`). So the adapter is trained for some steps more on the base with that noise in it, and merged again.
As in quantization-aware training (Jacob et al. 2018), but the weights are rounded once, not in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgecl_convert import Adapter, GgufFile, merge
from edgecl_convert.ggml import QType, bits_per_weight
from edgecl_convert.merge import planned_tensors
from edgecl_convert.recipe import ADAPTIVE, Recipe

from .profile import TrainSettings

COARSE = 6  # bits a weight: below, rounding costs more than a night can afford
SHARE = 1 / 3  # of a night's steps more, on rounded weights
RATE = 0.3  # of the learning rate


def is_coarse(base: GgufFile, quant: str) -> bool:
    """Return whether a merge at `quant` leaves weights of the layers less than COARSE bits."""
    layers = (tensor for tensor in planned_tensors(base, Recipe.named(quant)) if tensor.name.startswith("blk."))
    return any(len(tensor.shape) > 1 and bits_per_weight(tensor.qtype) < COARSE for tensor in layers)


@contextmanager
def rounded_base(base: GgufFile, adapter: Adapter, quant: str, folder: Path) -> Iterator[GgufFile]:
    """Yield a base on which `adapter` computes what the file merged at `quant` does; gone afterwards.

    That is the merged file with the adapter taken out again, in INT8, which adds a fiftieth to the power of the noise.

    Raises:
        ConvertError: the disk is full, or weights are not finite.
    """
    merged, rounded = folder / ".merged.tmp", folder / ".rounded.tmp"
    taken_out = replace(adapter, pairs={name: (a, -b) for name, (a, b) in adapter.pairs.items()})
    try:
        merge(base, adapter, merged, quant)
        with GgufFile(merged) as file:
            merge(file, taken_out, rounded, Recipe(ADAPTIVE, dict.fromkeys(adapter.pairs, QType.Q8_0)), "nearest")
        merged.unlink()
        with GgufFile(rounded) as file:
            yield file
    finally:
        for path in (merged, rounded):
            path.unlink(missing_ok=True)


def aware(settings: TrainSettings) -> TrainSettings:
    """Return what the steps on rounded weights are told."""
    epochs, min_steps = round(SHARE * settings.epochs), max(1, round(SHARE * settings.min_steps))
    return replace(settings, epochs=epochs, min_steps=min_steps, learning_rate=RATE * settings.learning_rate, patience=0)
