"""Packing: a whole batch as one sequence.

A night's rows are a few dozen tokens each, and many begin alike: the template's system turn, a task's instruction, a
question's first words. What several rows begin with stands once, as a tree; what each goes on with follows. The products of a
layer then have as many rows as there are different tokens, which is what a CPU needs, and a few more: oneDNN compiles and keeps
kernels for every shape that it meets (1 ms and 0.35 MB each, with AMX 1.5 ms and 0.85 MB), so the sequence is filled up to a
multiple of 32. To attend, rows of about the same length are laid side by side, all of the tree before each, of which a row
sees its own path.

Tokens at which something is predicted stand in front, whatever their row: the others are spared the head and most of the last
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ..data import common_length
from .batches import TrainRow, predicted
from .decoder import Decoder, Sequenced
from .ops import Bucket, Lines

MULTIPLE = 32  # of tokens in a sequence, and of those that are predicted
SLOTS = 16  # a multiple of so many are the slots of a line, and those that the tree has in front of them
SHORT = 64  # rows up to this length share lines
LEAST = 3  # rows that begin alike have that in common; two, where there are no more
_SHARED = -1  # the row of a token of the tree
_FILL = -2  # the row of a token that fills up
_EMPTY = -3  # the row of a slot without a token

Piece = tuple[int, Sequence[int]]  # a row and its tokens in the sequence


class Tree(NamedTuple):
    """What rows begin with in common.

    Attributes:
        first: of each of its tokens the first row that begins with it, and where in that row it stands.
        paths: of each row its tokens of the tree.
    """

    first: list[tuple[int, int]]
    paths: list[list[int]]


def tree(rows: Sequence[Sequence[int]], n_before: Sequence[int]) -> Tree:
    """Return what at least LEAST rows begin with, of the first `n_before` tokens of each."""
    begins = [list(row[:n]) for row, n in zip(rows, n_before, strict=True)]
    in_order = sorted(range(len(rows)), key=begins.__getitem__)  # rows that begin alike are neighbours
    least = min(LEAST, max(2, sum(map(bool, begins))))  # an anchor, of which all is predicted, begins like no row
    n_shared = [0] * len(rows)
    for at in range(len(rows) - least + 1):
        neighbours = in_order[at : at + least]
        n = common_length([begins[neighbours[0]], begins[neighbours[-1]]])
        for i in neighbours:
            n_shared[i] = max(n_shared[i], n)
    nodes: dict[tuple[int, int], int] = {}
    first: list[tuple[int, int]] = []
    paths = []
    for i, n in enumerate(n_shared):
        node, path = -1, []
        for t in range(n):
            node = nodes.setdefault((node, begins[i][t]), len(nodes))
            if node == len(first):
                first.append((i, t))
            path.append(node)
        paths.append(path)
    return Tree(first, paths)


@dataclass(frozen=True)
class Packed:
    """Rows as one sequence.

    Attributes:
        ids: in the order of the sequence, with what fills it up.
        rows: where the tokens of each row stand in it.
        order: where each of them stands among the tokens of all rows, one row after the other; 0 for what fills up.
    """

    ids: list[int]
    rows: list[list[int]]
    order: list[int]
    where: Sequenced


def pack(decoder: Decoder, rows: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int]] = ()) -> Packed:
    """Pack rows of token ids.

    Args:
        wanted: row and token of what stands in front.
    """
    shared, paths = tree(rows, _before(rows, wanted))
    places: list[tuple[int, int] | None] = [*wanted, *shared]
    in_front = set(wanted)
    for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
        places += [(i, t) for t in range(len(path), len(row)) if (i, t) not in in_front]
    places += [None] * (-len(places) % MULTIPLE)

    starts = [0, *accumulate(map(len, rows))]
    tree_at = range(len(wanted), len(wanted) + len(shared))
    where = [[tree_at[node] for node in path] + [0] * (len(row) - len(path)) for row, path in zip(rows, paths, strict=True)]
    for here, place in enumerate(places):
        if place is not None and here not in tree_at:
            where[place[0]][place[1]] = here
    pieces: list[Piece] = [(i, at[len(path) :]) for i, (at, path) in enumerate(zip(where, paths, strict=True))]
    pieces += [(_SHARED, tree_at[first : first + SHORT]) for first in range(0, len(shared), SHORT)]
    pieces.append((_FILL, [here for here, place in enumerate(places) if place is None]))

    positions = torch.tensor([0 if place is None else place[1] for place in places])
    sees = np.zeros((len(places), len(shared) + -len(shared) % SLOTS), bool)
    for at, path in zip(where, paths, strict=True):
        for n, here in enumerate(at[: len(path)], 1):
            sees[here, path[:n]] = True
        sees[np.ix_(at[len(path) :], path)] = True
    lines = _lines(decoder, [piece for piece in pieces if piece[1]], positions, tree_at, torch.from_numpy(sees))
    positions = positions.to(decoder.place.device)
    factors, shape = decoder.weights.rotary_factors(), decoder.shape
    turns = decoder.turns(positions, shape.rope_theta, factors)
    near = decoder.turns(positions, shape.rope_theta_window, factors) if shape.window else None
    order = [0 if place is None else starts[place[0]] + place[1] for place in places]
    ids = [0 if place is None else rows[place[0]][place[1]] for place in places]
    return Packed(ids, where, order, Sequenced(turns, near, lines))


def _before(rows: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many tokens of each row stand before the first of it that is wanted."""
    n_before = [len(row) for row in rows]
    for i, t in wanted:
        n_before[i] = min(n_before[i], t)
    return n_before


def micro_batches(rows: Sequence[TrainRow], max_tokens: int) -> list[list[TrainRow]]:
    """Split a batch so that no part takes more than `max_tokens` tokens as one sequence (a lone row may)."""
    parts: list[list[TrainRow]] = []
    for row in rows:
        if parts and count_tokens([*parts[-1], row]) <= max_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def count_tokens(rows: Sequence[TrainRow]) -> int:
    """Return how many tokens rows take as one sequence, but what fills it up."""
    ids = [row.ids for row in rows]
    shared, paths = tree(ids, _before(ids, predicted(rows)))
    return len(shared) + sum(len(row) - len(path) for row, path in zip(ids, paths, strict=True))


def extent(rows: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int]]) -> tuple[int, int, list[tuple[int, int]]]:
    """Return how many tokens packed rows take, how many of these are shared, and in how many lines of how many slots."""
    shared, paths = tree(rows, _before(rows, wanted))
    pieces: list[Piece] = [(i, range(len(row) - len(path))) for i, (row, path) in enumerate(zip(rows, paths, strict=True))]
    pieces += [(_SHARED, range(min(SHORT, len(shared) - first))) for first in range(0, len(shared), SHORT)]
    lines = [(len(lines), width) for width, lines in _in_lines([piece for piece in pieces if piece[1]])]
    return sum(len(piece[1]) for piece in pieces), len(shared), lines


def _lines(decoder: Decoder, pieces: Sequence[Piece], positions: torch.Tensor, tree_at: range, sees: torch.Tensor) -> Lines:
    """Lay pieces of a sequence side by side.

    Args:
        positions: (T,) of tokens in their rows; tree_at: where the tree stands in the sequence.
        sees: (T, P) what of the tree each token sees.
    """
    device, n_head, n_kv = decoder.place.device, decoder.shape.n_head, decoder.shape.n_kv
    shared = torch.tensor([*tree_at, *[0] * (sees.shape[1] - len(tree_at))], dtype=torch.long)
    head, kv = torch.arange(n_head), torch.arange(n_kv)
    out, d_keys = (torch.empty(len(positions), heads, dtype=torch.long) for heads in (n_head, n_kv))
    buckets, n_out, n_d_keys = [], 0, 0  # rows of the buckets so far
    for width, held in _in_lines(pieces):
        token, owner = _side_by_side(width, held)
        is_taken = token >= 0
        n_keys = len(shared) + width

        line, slot = torch.nonzero(is_taken, as_tuple=True)
        here = token[line, slot]
        out[here] = n_out + _row(line, head, slot, width)
        d_keys[here] = n_d_keys + _row(line, kv, len(shared) + slot, n_keys)
        from_out = torch.full((len(held), n_head, width), len(positions) * n_head)
        from_out[line, :, slot] = here[:, None] * n_head + head

        asks = token.clamp(0)[:, None]
        offers = torch.cat([shared.expand(len(held), 1, -1), asks], 2)
        queries, keys = asks * (n_head + n_kv) + head[:, None], offers * (n_head + n_kv) + n_head + kv[:, None]
        values = offers * (n_head + 2 * n_kv) + n_head + n_kv + kv[:, None]
        queries, keys, values, from_out = (i.flatten().to(device) for i in (queries, keys, values, from_out))
        biases = _biases(decoder, owner, sees[token] & is_taken[..., None], positions[token], positions[shared])
        buckets.append(Bucket(queries, keys, values, from_out, *biases))
        n_out, n_d_keys = n_out + n_head * token.numel(), n_d_keys + n_kv * n_keys * len(held)
    return Lines(out.flatten().to(device), d_keys.flatten().to(device), tree_at, buckets)


def _side_by_side(width: int, lines: Sequence[Sequence[Piece]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which token of the sequence each slot of lines (S, n) has, -1 where none, and of which row it is."""
    token, owner = torch.full((len(lines), width), -1), torch.full((len(lines), width), _EMPTY)
    for line, pieces in enumerate(lines):
        at = 0
        for row, tokens in pieces:
            token[line, at : at + len(tokens)] = torch.tensor(tokens)
            owner[line, at : at + len(tokens)] = row
            at += len(tokens)
    return token, owner


def _row(line: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, width: int) -> torch.Tensor:
    """Return where slots (N,) of lines (N,) stand for each head, (N, heads), among the rows of (S, heads, width)."""
    return (line[:, None] * len(head) + head) * width + slot[:, None]


def _in_lines(pieces: Sequence[Piece]) -> list[tuple[int, list[list[Piece]]]]:
    """Put pieces of about the same length into lines, each into the first with room: the width of lines, and what they hold."""
    by_size: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: -len(piece[1])):
        by_size.setdefault(max(SHORT, 1 << (len(piece[1]) - 1).bit_length()), []).append(piece)
    out = []
    for alike in by_size.values():
        width = -(-len(alike[0][1]) // SLOTS) * SLOTS
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
    decoder: Decoder, owner: torch.Tensor, sees: torch.Tensor, position: torch.Tensor, of_tree: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the slots (S, n) of a bucket see, as `Bucket` has it, everywhere and within a window.

    Args:
        sees: (S, n, P) of the tree; position: (S, n) in their rows, of_tree: (P,).
    """
    shape = decoder.shape
    own = (owner[:, :, None] == owner[:, None]).tril() & (owner != _SHARED)[:, :, None]
    seen = torch.cat([sees, own], 2)

    def bias(seen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(seen.shape, dtype=decoder.place.dtype).masked_fill_(~seen, float("-inf"))
        by_head = out[:, None].expand(-1, shape.n_head, -1, -1)
        return by_head.reshape(len(out) * shape.n_kv, -1, out.shape[2]).to(decoder.place.device)

    if not shape.window:
        return bias(seen), None
    keys = torch.cat([of_tree.expand(len(owner), -1), position], 1)
    return bias(seen), bias(seen & (position[:, :, None] - keys[:, None] < shape.window))
