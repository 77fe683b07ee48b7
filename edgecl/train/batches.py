"""Batches: shuffled rows, replay mixed into every batch, split into parts that bound the memory of a step."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

REWORDED = 0.75  # of the passes of a small night after its first ones have a row in other words


@dataclass(frozen=True)
class TrainRow:
    """One chat to train on.

    Attributes:
        supervised: for each of the ids, whether it is part of an answer.
        likely: for each token of the answers, likely ones with their probabilities, which a teacher expected there; empty:
            the token itself is right.
        reworded: the same answer to the same question in other words.
        name: what an error calls it.
    """

    ids: list[int]
    supervised: list[bool]
    likely: list[list[tuple[int, float]]] = field(default_factory=list)
    reworded: list[TrainRow] = field(default_factory=list)
    name: str = ""

    @property
    def answer(self) -> list[int]:
        """Tokens of answers, those of several one after the other."""
        return [token for token, is_answer in zip(self.ids, self.supervised, strict=True) if is_answer]

    @property
    def n_predicted(self) -> int:
        """Number of tokens of answers."""
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
    return TrainRow(row.ids[n_cut:], [False, *row.supervised[n_cut + 1 :]], name=row.name)


def asked_otherwise(row: TrainRow, n_ctx: int, rng: np.random.Generator) -> TrainRow:
    """Return a row as one pass of a small night has it: as it is, or in other words that fit into `n_ctx` tokens."""
    others = [other for other in row.reworded if len(other.ids) <= n_ctx]
    return others[rng.integers(len(others))] if others and rng.random() < REWORDED else row


def night_batches(
    passes: Sequence[Sequence[TrainRow]],
    replay: Sequence[TrainRow],
    batch_rows: int,
    replay_rows: int,
    rng: np.random.Generator,
) -> list[list[TrainRow]]:
    """Return passes over the new rows, in batches of `batch_rows` with `replay_rows` more from the buffer in each.

    Rows of the buffer that are longer than new ones are fewer in a batch, so that they take about as many tokens. Batches hold
    about as many tokens each, over all passes: few shapes of products, none of which is much larger than the others. The buffer
    is walked in a shuffled order again and again, so that every one of its rows is rehearsed as often as any other.
    """
    batches: list[list[TrainRow]] = []
    for new in passes:
        begun: list[list[TrainRow]] = [[] for _ in range(-(-len(new) // batch_rows))]
        deal([new[i] for i in rng.permutation(len(new))], begun, batch_rows)
        batches += [begun[i] for i in rng.permutation(len(begun))]
    share = 0
    if batches and replay:
        mean_new, mean_replay = (sum(len(row.ids) for row in rows) / len(rows) for rows in (passes[0], replay))
        share = min(replay_rows, len(replay), math.ceil(replay_rows * mean_new / mean_replay))
    walk: list[TrainRow] = []
    while share and len(walk) < share * len(batches):
        walk += [replay[i] for i in rng.permutation(len(replay))]
    deal(walk[: share * len(batches)], [batches[i] for i in rng.permutation(len(batches))], share)
    return batches


def deal(rows: Sequence[TrainRow], batches: Sequence[list[TrainRow]], n_each: int) -> None:
    """Add at most `n_each` rows to each batch: the longest first, each to the batch with the fewest tokens."""
    smallest = [(sum(len(row.ids) for row in batch), i, n_each) for i, batch in enumerate(batches)]
    heapq.heapify(smallest)
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        n_tokens, i, room = heapq.heappop(smallest)
        batches[i].append(row)
        if room > 1:
            heapq.heappush(smallest, (n_tokens + len(row.ids), i, room - 1))


def predicted(rows: Sequence[TrainRow]) -> list[tuple[int, int]]:
    """Return where answers are predicted: the row, and which token of it."""
    return [(i, t - 1) for i, row in enumerate(rows) for t, is_answer in enumerate(row.supervised) if is_answer]
