"""Packing: a whole batch as one sequence.

A night's rows are a few dozen tokens each and begin alike (the template's system turn). The shared prefix stands once in
front, the rows follow one after another. The products of a layer then have as many rows as there are real tokens, which is
what a CPU needs, and a few more: oneDNN compiles and keeps kernels for every shape that it meets (1 ms and 0.35 MB each), so
the sequence is filled up to a multiple of 16. To attend, rows of about the same length are laid side by side, each behind the
prefix.

Tokens at which something is predicted stand in front, whatever their row, because the backward pass goes through these alone:
a fifth of all where answers are short. What enters a layer at any other token is a constant to it (as in TokenTune, Simoulin
et al. 2024), but the layer's factors still learn from the key and the value that it makes of it. Only where the decoder is
exact does the backward pass go through all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decoder import Decoder, Sequenced
from .ops import Bucket, Lines, Span

MULTIPLE = 16  # of tokens in a sequence, and of slots in a line
WANTED_MULTIPLE = 16  # of tokens at which something is predicted
SHORT = 64  # rows up to this length share lines
_PREFIX = -1  # the row of a token that all rows behind it see
_FILL = -2  # the row of a token that fills up
_EMPTY = -3  # the row of a slot without a token

Piece = tuple[int, Sequence[int]]  # a row and its tokens in the sequence


@dataclass(frozen=True)
class Packed:
    """Prefix + rows as one sequence.

    Attributes:
        ids: in the order of the sequence, with what fills it up.
        order: where each of them stands in prefix + rows; 0 for what fills up.
        n_wanted: so many in front are those at which something is predicted, with what fills them up.
    """

    ids: list[int]
    order: list[int]
    n_wanted: int
    where: Sequenced


def pack(
    decoder: Decoder,
    prefix: Sequence[int],
    rows: Sequence[Sequence[int]],
    n_bare: int = 0,
    wanted: Sequence[tuple[int, int]] = (),
) -> Packed:
    """Pack rows behind their prefix.

    Args:
        rows: token ids without the prefix.
        n_bare: the last rows do not follow the prefix and do not see it.
        wanted: row and token of what stands in front; without any the sequence is prefix + rows.
    """
    ids, positions, owners = list(prefix), list(range(len(prefix))), [_PREFIX] * len(prefix)
    starts = []
    for i, row in enumerate(rows):
        starts.append(len(ids))
        ids += row
        first = len(prefix) if i < len(rows) - n_bare else 0
        positions += range(first, first + len(row))
        owners += [i] * len(row)
    fill = len(ids)
    ids, positions, owners = [*ids, 0], [*positions, 0], [*owners, _FILL]

    order = [starts[row] + token for row, token in wanted]
    in_front = set(order)
    order += [fill] * (-len(order) % WANTED_MULTIPLE)
    n_wanted = len(order)
    order += [i for i in range(fill) if i not in in_front]
    order += [fill] * (-len(order) % MULTIPLE)
    by_owner: dict[int, list[tuple[int, int]]] = {}
    for here, i in enumerate(order):
        by_owner.setdefault(owners[i], []).append((i, here))
    pieces = [(owner, [here for _, here in sorted(places)]) for owner, places in by_owner.items()]

    at = torch.tensor([positions[i] for i in order])
    n_through = len(order) if decoder.exact or not wanted else n_wanted
    lines = _lines(decoder, pieces, at, slice(n_wanted, n_wanted + len(prefix)), len(rows) - n_bare, n_through)
    at = at.to(decoder.place.device)
    factors, shape = decoder.weights.rotary_factors(), decoder.shape
    turns = decoder.turns(at, shape.rope_theta, factors)
    near = decoder.turns(at, shape.rope_theta_window, factors) if shape.window else None
    places = [0 if i == fill else i for i in order]
    return Packed([ids[i] for i in order], places, n_wanted, Sequenced(turns, near, lines))


def line_sizes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many lines of how many slots rows of these lengths stand in while they attend."""
    pieces = [(i, range(length)) for i, length in enumerate(lengths) if length]
    return [(len(lines), width) for width, lines in _in_lines(pieces)]


def _lines(
    decoder: Decoder, pieces: Sequence[Piece], positions: torch.Tensor, prefix: slice, n_behind: int, n_through: int
) -> Lines:
    """Lay pieces of a sequence side by side.

    Args:
        positions: (T,) of tokens, behind the prefix; prefix: where that stands in the sequence.
        n_behind: so many rows see the prefix; n_through: so many tokens does the backward pass go through.
    """
    buckets, first, first_back = [], 0, 0
    slot, back_slot = torch.empty(len(positions), dtype=torch.long), torch.empty(n_through, dtype=torch.long)
    tokens = []
    for width, held in _in_lines(pieces):
        token = torch.full((len(held), width), -1)
        owner = torch.full((len(held), width), _EMPTY)
        for line, in_line in enumerate(held):
            at = 0
            for row, of_row in in_line:
                token[line, at : at + len(of_row)] = torch.tensor(of_row)
                owner[line, at : at + len(of_row)] = row
                at += len(of_row)
        is_back = (token >= 0) & (token < n_through)
        back = _back(is_back)
        slot[token[token >= 0]] = first + torch.nonzero(token.flatten() >= 0)[:, 0]
        taken = is_back.gather(1, back)
        back_slot[token.gather(1, back)[taken]] = first_back + torch.nonzero(taken.flatten())[:, 0]
        bias, near = _biases(decoder, owner, positions[token.clamp(0)], prefix.stop - prefix.start, n_behind)
        is_whole = back.shape[1] == width
        by_head = torch.arange(len(held) * decoder.shape.n_head).view(len(held), -1, 1) * width + back[:, None]
        queries = None if is_whole else by_head.flatten().to(decoder.place.device)
        buckets.append(Bucket(Span(first, len(held), width), Span(first_back, len(held), back.shape[1]), queries, bias, near))
        tokens.append(token.flatten())
        first, first_back = first + token.numel(), first_back + back.numel()
    device = decoder.place.device
    return Lines(torch.cat(tokens).clamp_(0).to(device), slot.to(device), back_slot.to(device), prefix, buckets)


def _back(is_back: torch.Tensor) -> torch.Tensor:
    """Return for each line (S, n) the slots that the backward pass goes through, (S, m), and some more to a multiple."""
    width = is_back.shape[1]
    n_back = -(-int(is_back.sum(1).max()) // MULTIPLE) * MULTIPLE
    if n_back >= width:
        return torch.arange(width).expand(len(is_back), -1)
    return torch.argsort(~is_back, dim=1, stable=True)[:, :n_back]


def _in_lines(pieces: Sequence[Piece]) -> list[tuple[int, list[list[Piece]]]]:
    """Put pieces of about the same length into lines, each into the first with room: the width of lines, and what they hold."""
    by_size: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: -len(piece[1])):
        by_size.setdefault(max(SHORT, 1 << (len(piece[1]) - 1).bit_length()), []).append(piece)
    out = []
    for alike in by_size.values():
        width = -(-len(alike[0][1]) // MULTIPLE) * MULTIPLE
        lines: list[list[Piece]] = []
        for piece in alike:
            for line in lines:
                if sum(len(held[1]) for held in line) + len(piece[1]) <= width:
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
