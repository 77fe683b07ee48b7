"""Packing: a whole batch as one sequence.

A night's rows are a few dozen tokens each and begin alike (the template's system turn). The shared prefix stands once in
front, the rows follow one after another. The products of a layer then have as many rows as there are real tokens, which is
what a CPU needs, and a few more: oneDNN compiles and keeps kernels for every shape that it meets (1 ms and 0.7 MB each), so
the sequence is filled up to a multiple of 16. Attention goes through it in spans, each of which sees the prefix and the rows
that it touches. Gradients are exact: the prefix gets the sum of what its rows send back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decoder import Decoder, Sequenced
from .ops import Span

MULTIPLE = 16  # of tokens in a sequence
KEY_MULTIPLE = 32  # of where a span begins to look
SPAN_TOKENS = 96

_FILL = -2  # the row of a token that fills up

_PREFIX = -1  # the row of a token that all rows behind it see


@dataclass(frozen=True)
class Packed:
    """Prefix + rows as one sequence.

    Attributes:
        ids: with what fills up the last multiple of 32.
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
    ids, positions, owners, starts = list(prefix), list(range(len(prefix))), [_PREFIX] * len(prefix), []
    for i, row in enumerate(rows):
        starts.append(len(ids))
        ids += row
        first = len(prefix) if i < len(rows) - n_bare else 0
        positions += range(first, first + len(row))
        owners += [i] * len(row)
    n_fill = -len(ids) % MULTIPLE
    positions += [0] * n_fill
    owners += [_FILL] * n_fill
    begins = [*range(len(prefix)), *(start for start, row in zip(starts, rows, strict=True) for _ in row), *[len(ids)] * n_fill]
    spans = _spans(decoder, torch.tensor(owners), torch.tensor(positions), begins, len(prefix), len(rows) - n_bare)
    at = torch.tensor(positions, device=decoder.place.device)
    factors, shape = decoder.weights.rotary_factors(), decoder.shape
    turns = decoder.turns(at, shape.rope_theta, factors)
    near = decoder.turns(at, shape.rope_theta_window, factors) if shape.window else None
    return Packed(ids + [0] * n_fill, starts, Sequenced(turns, near, spans))


def _spans(
    decoder: Decoder, owners: torch.Tensor, positions: torch.Tensor, begins: list[int], n_prefix: int, n_behind: int
) -> list[Span]:
    """Return the spans of a sequence.

    Args:
        owners, positions: (T,) the row of each token and its place behind the prefix; begins: where its row begins.
        n_behind: so many rows see the prefix.
    """
    order = torch.arange(len(owners))
    behind = (owners >= 0) & (owners < n_behind)
    spans = []
    for first in range(0, len(owners), SPAN_TOKENS):
        last = min(first + SPAN_TOKENS, len(owners))
        begin = begins[first] // KEY_MULTIPLE * KEY_MULTIPLE
        seen_from, n_seen = (begin, n_prefix) if begin >= n_prefix else (0, 0)
        keys = torch.cat([order[:n_seen], order[seen_from:last]])
        mine = slice(first, last)
        seen = (owners[mine, None] == owners[keys]) | (behind[mine, None] & (owners[keys] == _PREFIX))
        seen &= order[mine, None] >= keys
        near = None
        if decoder.shape.window:
            near = _bias(seen & (positions[mine, None] - positions[keys] < decoder.shape.window), decoder)
        spans.append(Span(first, last, seen_from, n_seen, _bias(seen, decoder), near))
    return spans


def _bias(seen: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    bias = torch.zeros(seen.shape, dtype=decoder.place.dtype).masked_fill_(~seen, float("-inf"))
    return bias.repeat(decoder.shape.n_head // decoder.shape.n_kv, 1).to(decoder.place.device)
