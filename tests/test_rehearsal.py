"""Rehearsal: what a night is losing comes back most, nothing is left out for ever, and as many places are filled as before."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.train.batches import TrainRow, night_batches
from edgecl.train.rehearsal import EVENLY, LATELY, MOST, Rehearsal, shared_out

N_ANSWERS, OF_EACH = 20, 10


def row(number: int, answer: int, n_tokens: int = 6) -> TrainRow:
    """A row whose first id is its number and whose last is its answer."""
    return TrainRow([number, *[7] * (n_tokens - 2), answer], [False] * (n_tokens - 1) + [True])


@pytest.fixture
def rehearsed() -> list[TrainRow]:
    return [row(i, i % N_ANSWERS) for i in range(N_ANSWERS * OF_EACH)]


def night(rehearsed: list[TrainRow], n_new: int = 100) -> list[list[TrainRow]]:
    new = [row(1000 + i, 50) for i in range(n_new)]
    return night_batches([new] * 4, rehearsed, 8, 10, np.random.default_rng(0))


def met(batches: list[list[TrainRow]]) -> Counter[int]:
    """Return how often each row number is met."""
    return Counter(one.ids[0] for batch in batches for one in batch)


def follow(rehearsal: Rehearsal, batches: list[list[TrainRow]], lost: dict[int, float]) -> int:
    """Note the losses of answers up to where rows are met evenly; return that step."""
    step = round(EVENLY * len(batches))
    for i in range(step):
        rehearsal.note(i, batches[i], [lost.get(one.ids[-1], 0.01) for one in batches[i]])
    return step


def test_an_answer_that_is_lost_comes_back_with_all_of_its_rows(rehearsed: list[TrainRow]) -> None:
    batches, rehearsal = night(rehearsed), Rehearsal(rehearsed)
    before = [[one.ids[0] for one in batch] for batch in batches]
    step = follow(rehearsal, batches, {3: 2.0})
    rehearsal.deal_again(batches, step, seed=0)
    assert [[one.ids[0] for one in batch] for batch in batches[:step]] == before[:step], "what is done is done"
    assert [len(batch) for batch in batches] == [len(batch) for batch in before]
    new = [[number for number in batch if number >= 1000] for batch in before]
    assert [[one.ids[0] for one in batch if one.ids[0] >= 1000] for batch in batches] == new
    times = met(batches[step:])
    most = math.ceil(MOST * 10 * len(batches[step:]) / len(rehearsed))
    assert [times[i] for i in range(len(rehearsed)) if i % N_ANSWERS == 3] == [most] * OF_EACH
    others = [times[i] for i in range(len(rehearsed)) if i % N_ANSWERS != 3]
    assert max(others) <= 2 and sum(others) > len(others) / 2


def test_nothing_lost_means_evenly(rehearsed: list[TrainRow]) -> None:
    batches, rehearsal = night(rehearsed), Rehearsal(rehearsed)
    step = follow(rehearsal, batches, dict.fromkeys(range(60), 0.0))
    rehearsal.deal_again(batches, step, seed=0)
    times = met(batches[step:])
    each = [times[i] for i in range(len(rehearsed))]
    assert max(each) <= 2 and sum(each) == 10 * len(batches[step:])


def test_what_a_teacher_was_unsure_of_is_not_lost() -> None:
    unsure = TrainRow([1, 2, 3], [False, False, True], [[(3, 0.5), (4, 0.5)]])
    rehearsal = Rehearsal([unsure, row(2, 3)])
    rehearsal.note(0, [unsure, row(9, 9)], [math.log(2) + 0.25, 5.0])
    assert rehearsal.lost == pytest.approx([0.25, 0.0]) and rehearsal.met == [0, -1]
    rehearsal.note(1, [unsure], [0.1])
    assert rehearsal.lost[0] == 0.0


def test_what_was_lost_long_ago_or_never_met_counts_as_its_answer_does_now(rehearsed: list[TrainRow]) -> None:
    batches, rehearsal = night(rehearsed), Rehearsal(rehearsed)
    step = follow(rehearsal, batches, {})
    old = step - LATELY * len(batches) - 1
    for i, one in enumerate(rehearsed):
        if one.ids[-1] == 5:
            rehearsal.met[i], rehearsal.lost[i] = (int(old), 9.0) if i > 5 else (step - 1, 0.01)
        if one.ids[-1] == 6:
            rehearsal.met[i], rehearsal.lost[i] = (-1, 0.0) if i > 6 else (step - 1, 9.0)
    rehearsal.deal_again(batches, step, seed=0)
    times = met(batches[step:])
    assert max(times[i] for i in range(len(rehearsed)) if i % N_ANSWERS == 5) <= 2
    assert min(times[i] for i in range(len(rehearsed)) if i % N_ANSWERS == 6) >= MOST


def test_a_run_without_rehearsed_rows_is_left_as_it_is() -> None:
    batches = night([])
    before = [list(batch) for batch in batches]
    rehearsal = Rehearsal([])
    rehearsal.deal_again(batches, follow(rehearsal, batches, {}), seed=0)
    assert batches == before


@given(st.integers(0, 300), st.lists(st.floats(1e-6, 5), min_size=1, max_size=40), st.integers(0, 9))
def test_places_are_shared_out_in_proportion_and_none_gets_more_than_it_may(n: int, shares: list[float], seed: int) -> None:
    share = np.array(shares)
    most = math.ceil(MOST * max(1.0, n / len(share)))
    times = shared_out(n, share, most, np.random.default_rng(seed))
    assert times.sum() == n and times.max(initial=0) <= most and times.min() >= 0
    free = times < most
    wanted = share[free] * times[free].sum() / share[free].sum() if free.any() else share[free]
    assert np.abs(times[free] - wanted).max(initial=0.0) <= max(2.0, 0.02 * n)
