"""Forward passes of training: a whole batch packed into one sequence.

A night's rows are a few dozen tokens each and begin alike (the template's system turn). The shared prefix stands once in
front, the rows follow one after another without padding. The products of a layer then have as many rows as there are real
tokens, which is what a CPU needs. Attention goes span by span: a few rows at a time, which see the prefix and each its own
row. Gradients are exact: the prefix gets the sum of what its rows send back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decoder import Decoder, Sequenced
from .lora import Lora
from .ops import Span

SPAN_TOKENS = 128  # rows share a span up to so many tokens


@dataclass(frozen=True)
class Packed:
    """Prefix + rows as one sequence.

    Attributes:
        starts: where each row begins; the prefix is not part of it.
    """

    ids: list[int]
    starts: list[int]
    where: Sequenced


def pack(decoder: Decoder, prefix: Sequence[int], rows: Sequence[Sequence[int]], n_bare: int = 0) -> Packed:
    """Pack rows behind their prefix.

    Args:
        rows: token ids without the prefix.
        n_bare: the last rows do not follow the prefix and do not see it.
    """
    n_prefix, n_behind = len(prefix), len(rows) - n_bare
    ids, positions, starts = list(prefix), list(range(n_prefix)), []
    for i, row in enumerate(rows):
        starts.append(len(ids))
        ids += row
        first = n_prefix if i < n_behind else 0
        positions += range(first, first + len(row))
    ends = [*starts[1:], len(ids)]
    spans = [_span(decoder, [(0, n_prefix)], 0)] if n_prefix else []
    for which, seen in ((range(n_behind), n_prefix), (range(n_behind, len(rows)), 0)):
        spans += [_span(decoder, part, seen) for part in _grouped([(starts[i], ends[i]) for i in which])]
    at = torch.tensor(positions, device=decoder.place.device)
    factors, shape = decoder.weights.rotary_factors(), decoder.shape
    turns = decoder.turns(at, shape.rope_theta, factors)
    near = decoder.turns(at, shape.rope_theta_window, factors) if shape.window else None
    return Packed(ids, starts, Sequenced(turns, near, spans))


def _grouped(rows: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return rows, as (first, last), in neighbouring groups of at most SPAN_TOKENS tokens (a lone row may have more)."""
    groups: list[list[tuple[int, int]]] = []
    for first, last in rows:
        if groups and last - groups[-1][0][0] <= SPAN_TOKENS:
            groups[-1].append((first, last))
        else:
            groups.append([(first, last)])
    return groups


def _span(decoder: Decoder, rows: Sequence[tuple[int, int]], n_prefix: int) -> Span:
    """Return the span of neighbouring rows, each of which sees the prefix and, of its own row, what came before."""
    first, last = rows[0][0], rows[-1][1]
    lengths = torch.tensor([b - a for a, b in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    order = torch.arange(last - first)
    own = (owner[:, None] == owner[None, :]) & (order[:, None] >= order[None, :])
    seen = torch.cat([torch.ones(len(order), n_prefix, dtype=torch.bool), own], 1)
    near = None
    if decoder.shape.window:
        begins = torch.repeat_interleave(torch.tensor([a - first for a, _ in rows]), lengths)
        position = n_prefix + order - begins
        keys = torch.cat([torch.arange(n_prefix).expand(len(order), -1), position.expand(len(order), -1)], 1)
        near = _bias(seen & (position[:, None] - keys < decoder.shape.window), decoder)
    return Span(first, last, n_prefix, _bias(seen, decoder), near)


def _bias(seen: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    bias = torch.zeros(seen.shape, dtype=decoder.place.dtype).masked_fill_(~seen, float("-inf"))
    return bias.to(decoder.place.device)


def hidden_states(decoder: Decoder, lora: Lora | None, packed: Packed) -> torch.Tensor:
    """Return what the head multiplies, (T, D), for a packed sequence."""
    x = decoder.weights.embed(packed.ids)
    return decoder.norm(decoder.run(x, packed.where, lora))
