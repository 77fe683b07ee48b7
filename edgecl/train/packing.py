"""Packing: a whole batch as one sequence.

A night's rows are a few dozen tokens each and begin alike (the template's system turn). The shared prefix stands once in
front, the rows follow one after another. The products of a layer then have as many rows as there are real tokens, which is
what a CPU needs, and a few more: oneDNN compiles and keeps kernels for every shape that it meets (1 ms and 0.35 MB each), so
the sequence is filled up to a multiple of 16. To attend, rows of about the same length are laid side by side, each behind the
prefix. Gradients are exact: the prefix gets the sum of what its rows send back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decoder import Decoder, Sequenced
from .ops import Bucket, Lines

MULTIPLE = 16  # of tokens in a sequence, and of slots in a line
WANTED_MULTIPLE = 32  # of tokens at which something is predicted
SHORT = 64  # rows up to this length share lines
_PREFIX = -1  # the row of a token that all rows behind it see
_FILL = -2  # the row of a token that fills up
_EMPTY = -3  # the row of a slot without a token


@dataclass(frozen=True)
class Packed:
    """Prefix + rows as one sequence.

    Attributes:
        ids: with what fills up the last multiple.
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
    ids, positions, starts = list(prefix), list(range(len(prefix))), []
    for i, row in enumerate(rows):
        starts.append(len(ids))
        ids += row
        first = len(prefix) if i < len(rows) - n_bare else 0
        positions += range(first, first + len(row))
    n_fill = -len(ids) % MULTIPLE
    pieces = [(i, start, len(row)) for i, (start, row) in enumerate(zip(starts, rows, strict=True))]
    pieces += [(_PREFIX, 0, len(prefix)), (_FILL, len(ids), n_fill)]
    ids += [0] * n_fill
    positions += [0] * n_fill
    lines = _lines(decoder, [piece for piece in pieces if piece[2]], torch.tensor(positions), len(prefix), len(rows) - n_bare)
    at = torch.tensor(positions, device=decoder.place.device)
    factors, shape = decoder.weights.rotary_factors(), decoder.shape
    turns = decoder.turns(at, shape.rope_theta, factors)
    near = decoder.turns(at, shape.rope_theta_window, factors) if shape.window else None
    return Packed(ids, starts, Sequenced(turns, near, lines))


def line_sizes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many lines of how many slots rows of these lengths stand in while they attend."""
    pieces = [(i, 0, length) for i, length in enumerate(lengths) if length]
    return [(len(lines), width) for width, lines in _in_lines(pieces)]


def _lines(
    decoder: Decoder, pieces: Sequence[tuple[int, int, int]], positions: torch.Tensor, n_prefix: int, n_behind: int
) -> Lines:
    """Lay pieces of a sequence side by side.

    Args:
        pieces: owner, first token and length of each row; positions: (T,) of tokens, behind the prefix.
        n_behind: so many rows see the prefix.
    """
    tokens, buckets, first = [], [], 0
    for width, held in _in_lines(pieces):
        token = torch.zeros(len(held), width, dtype=torch.long)
        owner = torch.full((len(held), width), _EMPTY)
        for line, in_line in enumerate(held):
            at = 0
            for row, start, length in in_line:
                token[line, at : at + length] = torch.arange(start, start + length)
                owner[line, at : at + length] = row
                at += length
        bias, near = _biases(decoder, owner, positions[token], n_prefix, n_behind)
        buckets.append(Bucket(first, len(held), width, bias, near))
        tokens.append(token.masked_fill(owner == _EMPTY, -1).flatten())
        first += token.numel()
    token = torch.cat(tokens)
    slot = torch.empty(len(positions), dtype=torch.long)
    slot[token[token >= 0]] = torch.nonzero(token >= 0)[:, 0]
    device = decoder.place.device
    return Lines(token.clamp_(0).to(device), slot.to(device), n_prefix, buckets)


def _in_lines(pieces: Sequence[tuple[int, int, int]]) -> list[tuple[int, list[list[tuple[int, int, int]]]]]:
    """Put pieces of about the same length into lines, each into the first with room: the width of lines, and what they hold."""
    by_size: dict[int, list[tuple[int, int, int]]] = {}
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        by_size.setdefault(max(SHORT, 1 << (piece[2] - 1).bit_length()), []).append(piece)
    out = []
    for alike in by_size.values():
        width = -(-alike[0][2] // MULTIPLE) * MULTIPLE
        lines: list[list[tuple[int, int, int]]] = []
        for piece in alike:
            for line in lines:
                if sum(held[2] for held in line) + piece[2] <= width:
                    line.append(piece)
                    break
            else:
                lines.append([piece])
        out.append((width, lines))
    return out


def _biases(
    decoder: Decoder, owner: torch.Tensor, position: torch.Tensor, n_prefix: int, n_behind: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the slots (S, n) of a bucket see, as `Bucket` has it, everywhere and within a window."""
    shape = decoder.shape
    own = (owner[:, :, None] == owner[:, None]).tril()
    seen = torch.cat([((owner >= 0) & (owner < n_behind))[:, :, None].expand(-1, -1, n_prefix), own], 2)

    def bias(seen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(seen.shape, dtype=decoder.place.dtype).masked_fill_(~seen, float("-inf"))
        by_head = out[:, None].expand(-1, shape.n_head, -1, -1)
        return by_head.reshape(len(out) * shape.n_kv, -1, out.shape[2]).to(decoder.place.device)

    if not shape.window:
        return bias(seen), None
    keys = torch.cat([torch.arange(n_prefix).expand(len(owner), -1), position], 1)
    return bias(seen), bias(seen & (position[:, :, None] - keys[:, None] < shape.window))
