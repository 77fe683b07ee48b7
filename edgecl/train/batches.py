"""Batches: shuffled rows, replay mixed into every batch, split into parts that bound the memory of a step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TrainRow:
    """One chat to train on: token ids, and for each whether it is predicted."""

    ids: list[int]
    supervised: list[bool]

    @property
    def n_predicted(self) -> int:
        """Number of predicted tokens."""
        return sum(self.supervised)


def usable(row: TrainRow, n_ctx: int) -> TrainRow | None:
    """Return a row cut from the left to `n_ctx` tokens; None where it has no answer, or its last one would be cut."""
    if not any(row.supervised):
        return None
    n_cut = len(row.ids) - n_ctx
    if n_cut <= 0:
        return row
    last = len(row.ids) - row.supervised[::-1].index(True)
    answer = last - row.supervised[:last][::-1].index(False) if False in row.supervised[:last] else 0
    if answer <= n_cut:  # one token of the prompt stays: what is predicted needs something before it
        return None
    return TrainRow(row.ids[n_cut:], [False, *row.supervised[n_cut + 1 :]])


def shared_prefix(rows: Sequence[TrainRow]) -> list[int]:
    """Return the ids that all rows begin with, ending at least one token before anything is predicted."""
    if not rows:
        return []
    low, high = min(row.ids for row in rows), max(row.ids for row in rows)
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    first = min(row.supervised.index(True) for row in rows)
    return low[: max(0, min(n, first - 1))]


def epoch(
    new: Sequence[TrainRow], replay: Sequence[TrainRow], batch_rows: int, replay_rows: int, rng: np.random.Generator
) -> list[list[TrainRow]]:
    """Return one epoch over `new`, in batches of `batch_rows` with `replay_rows` more from the buffer in each.

    Batches hold about as many tokens each: few shapes of products, none of which is much larger than the others. The buffer
    is walked in a shuffled order again and again, so that every one of its rows is rehearsed as often as any other.
    """
    n_batches = -(-len(new) // batch_rows)
    share = min(replay_rows, len(replay))
    walk: list[TrainRow] = []
    while share and len(walk) < share * n_batches:
        walk += [replay[i] for i in rng.permutation(len(replay))]
    batches: list[list[TrainRow]] = [[] for _ in range(n_batches)]
    _deal([new[i] for i in rng.permutation(len(new))], batches, batch_rows)
    _deal(walk[: share * n_batches], batches, share)
    return [batches[i] for i in rng.permutation(n_batches)]


def _deal(rows: Sequence[TrainRow], batches: list[list[TrainRow]], n_each: int) -> None:
    """Add at most `n_each` rows to each batch: the longest first, each to the batch with the fewest tokens."""
    smallest = [(sum(len(row.ids) for row in batch), i, n_each) for i, batch in enumerate(batches)]
    heapq.heapify(smallest)
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        n_tokens, i, room = heapq.heappop(smallest)
        batches[i].append(row)
        if room > 1:
            heapq.heappush(smallest, (n_tokens + len(row.ids), i, room - 1))


def micro_batches(rows: Sequence[TrainRow], n_prefix: int, max_tokens: int) -> list[list[TrainRow]]:
    """Split a batch so that no part holds more than `max_tokens` tokens behind the prefix (a lone row may)."""
    parts: list[list[TrainRow]] = []
    held = 0
    for row in rows:
        n_tokens = len(row.ids) - n_prefix
        if parts and held + n_tokens <= max_tokens:
            parts[-1].append(row)
            held += n_tokens
        else:
            parts.append([row])
            held = n_tokens
    return parts
