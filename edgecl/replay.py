"""Which rows of a night are kept for rehearsal.

The store is tiny by design: a night may leave at most a stated share of its rows, so they are spread over the answers that
occurred, one of each before two of any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .errors import SettingError


def quota(n_rows: int, share: float) -> int:
    """Return how many of a night's rows may stay: `share` of them, rounded down, but one at least when share > 0.

    Raises:
        SettingError: share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"replay share must be from 0 to 1, got {share} (replay.share, or --replay)")
    exact = Fraction(str(share)) * n_rows
    return max(1, math.floor(exact)) if share > 0 and n_rows else 0


def choose(answers: Sequence[str], n: int, seed: int) -> list[int]:
    """Return the indices of `n` rows to keep, balanced over distinct answers.

    Args:
        answers: one per row; rows with equal answers are of one class.
        seed: decides which row of a class, and which classes come first.
    """
    order = np.random.default_rng(seed).permutation(len(answers))
    seen: dict[str, int] = {}
    ranked = []
    for place, index in enumerate(order):
        turn = seen.get(answers[index], 0)
        seen[answers[index]] = turn + 1
        ranked.append((turn, place, int(index)))
    return sorted(index for _, _, index in sorted(ranked)[:n])
