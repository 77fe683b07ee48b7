"""The forward pass of training: packed rows through the layers, or through those above their cached states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .decoder import Decoder
from .latents import Latents
from .lora import Lora
from .packing import WANTED_MULTIPLE, pack


def hidden_states(
    decoder: Decoder,
    lora: Lora | None,
    prefix: Sequence[int],
    rows: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int]],
    n_bare: int = 0,
    latents: Latents | None = None,
) -> torch.Tensor:
    """Return what the head multiplies at some tokens, (N, D).

    Args:
        rows, n_bare: as for `pack`; wanted: which of them, and which token of it.
    """
    packed = pack(decoder, prefix, rows, n_bare)
    if latents is None:
        x, first = decoder.weights.embed(packed.ids), 0
    else:
        x, first = latents.states(prefix, rows, n_bare), latents.lora.first_layer
        x = F.pad(x, (0, 0, 0, len(packed.ids) - len(x)))
    at = [packed.starts[row] + token for row, token in wanted]
    filled = torch.tensor(at + [0] * (-len(at) % WANTED_MULTIPLE), device=x.device)
    return decoder.norm(decoder.run(x, packed.where, lora, first, wanted=filled))[: len(at)]
