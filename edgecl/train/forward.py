"""The forward pass of training: packed rows through the layers, or through those above their cached states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .decoder import Decoder
from .latents import Latents
from .lora import Lora
from .packing import pack


def hidden_states(
    decoder: Decoder,
    lora: Lora | None,
    prefix: Sequence[int],
    rows: Sequence[Sequence[int]],
    n_bare: int = 0,
    latents: Latents | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Return what the head multiplies, (T, D), and where in it each row begins; arguments as for `pack`."""
    packed = pack(decoder, prefix, rows, n_bare)
    if latents is None:
        x, first = decoder.weights.embed(packed.ids), 0
    else:
        x, first = latents.states(prefix, rows, n_bare), latents.lora.first_layer
        x = F.pad(x, (0, 0, 0, len(packed.ids) - len(x)))
    return decoder.norm(decoder.run(x, packed.where, lora, first)), packed.starts
