"""The forward pass of training: packed rows through the layers, or through those above their cached states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .decoder import Decoder
from .latents import Latents
from .lora import Lora
from .packing import pack


def hidden_states(
    decoder: Decoder,
    lora: Lora | None,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int]],
    latents: Latents | None = None,
) -> torch.Tensor:
    """Return what the head multiplies at some tokens, (N, D).

    Args:
        rows: token ids; wanted: which of them, and which token of it.
    """
    packed = pack(decoder, rows, wanted)
    if latents is None:
        x, first = decoder.weights.embed(packed.ids), 0
    else:
        x, first = latents.states(rows), latents.lora.first_layer
        x = x.index_select(0, torch.tensor(packed.order, device=x.device))
    return decoder.norm(decoder.run(x, packed.where, lora, first, n_wanted=len(wanted)))
