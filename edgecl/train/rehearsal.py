"""Rehearsal: what of the kept and written rows is repeated beside the new ones, and how often.

For most of a night every row is met as often as any other. By then it shows what the night is losing, and that is seldom a
bit of everything: an answer whose questions are much like tonight's goes where tonight's go, with all of its rows. So in the
rest of the steps rows come back in proportion to what their answer has lost lately.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .batches import TrainRow, deal

EVENLY = 0.6  # of the steps, rows are met as often as any other
LATELY = 0.25  # of the steps: what was lost in so many before is still lost
MOST = 4.0  # times as often as a row would be met evenly, or times, if that is more
ALWAYS = 0.5  # of what a mean row has lost is added to all: what was lost since would not be seen
RECIPE = (EVENLY, LATELY, MOST, ALWAYS)  # part of what a run depends on


class Rehearsal:
    """The rows of a run that are rehearsed, and what they were losing when they were last met.

    Attributes:
        met: the last step that each row was met in, -1 if none; lost: its divergence from its teacher then, in nats a token.
    """

    def __init__(self, rows: Sequence[TrainRow]) -> None:
        """Take rows, each of which is an object of its own."""
        self.rows = rows
        self._index = {id(row): i for i, row in enumerate(rows)}
        self._entropy = [_entropy(row) for row in rows]
        self.met: list[int] = [-1] * len(rows)
        self.lost: list[float] = [0.0] * len(rows)

    def note(self, step: int, rows: Sequence[TrainRow], losses: Sequence[float]) -> None:
        """Remember the answer losses of a step's rows, in nats."""
        for row, loss in zip(rows, losses, strict=True):
            i = self._index.get(id(row))
            if i is not None:
                self.met[i], self.lost[i] = step, max(loss - self._entropy[i], 0.0)

    def deal_again(self, batches: list[list[TrainRow]], step: int, seed: int) -> None:
        """Let the batches from a step on rehearse most what was lost most, as many rows as before."""
        rest = batches[step:]
        places = [sum(id(row) in self._index for row in batch) for batch in rest]
        if not sum(places):
            return
        rng = np.random.default_rng(seed)
        times = self._times(sum(places), step - LATELY * len(batches), rng)
        walk = [row for row, n in zip(self.rows, times, strict=True) for _ in range(n)]
        for batch in rest:
            batch[:] = [row for row in batch if id(row) not in self._index]
        deal([walk[i] for i in rng.permutation(len(walk))], [rest[i] for i in rng.permutation(len(rest))], max(places))

    def _times(self, n: int, since: float, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return how often each row comes back in n places, by what its answer has lost since a step."""
        lately: dict[tuple[int, ...], list[float]] = defaultdict(list)
        answers = [tuple(row.answer) for row in self.rows]
        met, own = np.array(self.met), np.array(self.lost)
        for answer, step, nats in zip(answers, self.met, self.lost, strict=True):
            if step >= since:
                lately[answer].append(nats)
        own[met < 0] = own[met >= 0].mean() if (met >= 0).any() else 0.0
        lost = np.array(
            [np.mean(lately[answer]) if answer in lately else nats for answer, nats in zip(answers, own, strict=True)]
        )
        share = lost + ALWAYS * lost.mean() if lost.any() else np.ones(len(lost))
        return shared_out(n, share, math.ceil(MOST * max(1.0, n / len(lost))), rng)


def shared_out(n: int, share: NDArray[np.float64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each of N rows comes in n places: in proportion to its share (N,), but at most `most` times."""
    times, is_free = np.zeros(len(share)), np.ones(len(share), bool)
    while True:
        wanted = share * (n - times[~is_free].sum()) / share[is_free].sum()
        is_over = is_free & (wanted > most)
        if not is_over.any():
            break
        times[is_over], is_free = most, is_free & ~is_over
    times[is_free] = wanted[is_free]
    whole = np.floor(times + 1e-9).astype(np.int64)
    chance = np.maximum(times - whole, 0.0)
    left = n - int(whole.sum())
    if left:
        whole[rng.choice(len(share), left, replace=False, p=chance / chance.sum())] += 1
    return whole


def _entropy(row: TrainRow) -> float:
    """Return the mean entropy of what a teacher expected, in nats a token: the least loss that a row can have."""
    each = [-sum(share * math.log(share) for _, share in choices if share > 0) for choices in row.likely]
    return sum(each) / len(each) if each else 0.0
