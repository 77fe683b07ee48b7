"""What is kept for rehearsal: never more than the stated share, spread over the answers, the same for the same seed."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.errors import SettingError
from edgecl.replay import choose, quota

ROWS = st.integers(0, 5000)
ANSWERS = st.lists(st.sampled_from("abcdefgh"), max_size=60)


@pytest.mark.parametrize(
    ("n_rows", "share", "expected"),
    [(300, 0.02, 6), (299, 0.02, 5), (50, 0.02, 1), (49, 0.02, 1), (1, 0.02, 1), (0, 0.02, 0), (300, 0, 0), (300, 1, 300),
     (100, 0.29, 29), (1000, 0.7, 700), (10, 0.1, 1), (3, 1e-9, 1)],
)  # fmt: skip
def test_quota_by_hand(n_rows: int, share: float, expected: int) -> None:
    assert quota(n_rows, share) == expected
    assert quota(n_rows, np.float64(share)) == expected


@given(ROWS, st.floats(0, 1))
def test_quota_is_never_above_the_share_but_for_one_row(n_rows: int, share: float) -> None:
    n = quota(n_rows, share)
    assert 0 <= n <= n_rows
    assert n <= 1 or n <= Fraction(str(share)) * n_rows
    assert n > Fraction(str(share)) * n_rows - 1  # nor is a row given away
    assert (n > 0) == (n_rows > 0 and share > 0)


@given(ROWS, st.integers(0, 100))
def test_quota_of_whole_percents_is_exact(n_rows: int, percent: int) -> None:
    """0.29 * 100 is 28.999... as a float, and 29 rows are allowed."""
    exact = n_rows * percent // 100
    assert quota(n_rows, percent / 100) == (max(1, exact) if percent and n_rows else 0)


@pytest.mark.parametrize("share", [-0.01, 1.01, 2, math.nan, math.inf, -math.inf])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(SettingError, match=r"replay share must be from 0 to 1, got .* \(replay\.share, or --replay\)"):
        quota(10, share)


@given(ANSWERS, st.integers(0, 70), st.integers(0, 2**32))
def test_what_is_chosen_is_a_sorted_balanced_subset(answers: list[str], n: int, seed: int) -> None:
    chosen = choose(answers, n, seed)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(len(answers)))
    assert len(chosen) == min(n, len(answers))
    assert choose(answers, n, seed) == chosen
    have, kept = Counter(answers), Counter(answers[i] for i in chosen)
    for answer in have:  # one of each before two of any
        assert kept[answer] >= min(have[answer], max(kept.values(), default=0) - 1)


@given(ANSWERS, st.integers(0, 59), st.integers(0, 2**32))
def test_a_smaller_choice_is_part_of_a_larger_one(answers: list[str], n: int, seed: int) -> None:
    assert set(choose(answers, n, seed)) <= set(choose(answers, n + 1, seed))


def test_rare_answers_are_kept_and_the_seed_decides_the_rest() -> None:
    answers = ["yes"] * 95 + ["no"] * 4 + ["maybe"]
    kept = Counter(answers[i] for i in choose(answers, 9, seed=0))
    assert kept == {"yes": 4, "no": 4, "maybe": 1}
    assert len({tuple(choose(answers, 9, seed)) for seed in range(20)}) > 10


def test_every_row_has_the_same_chance() -> None:
    hits = Counter(i for seed in range(2000) for i in choose(["a"] * 5 + ["b"] * 5, 4, seed))
    assert all(700 < hits[i] < 900 for i in range(10))  # 800 expected, sd 22
