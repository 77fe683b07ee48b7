"""Continual-learning metrics against numbers worked out by hand, and the paired interval against a simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.errors import DataError
from edgecl.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    paired_interval,
    plasticity_retention,
    stream_intervals,
    survival,
)

NAN = math.nan
# After night 3 the first task is at 0.6 (0.9 after its night, 0.95 after night 2), the second at 0.8 (0.7 after its night).
SCORES = np.array([[0.9, 0.2, NAN], [0.95, 0.7, 0.1], [0.6, 0.8, 0.5]])
START = np.array([0.05, 0.1, 0.15])
SQUARE = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n).map(np.array)
)


def test_metrics_by_hand() -> None:
    assert average_accuracy(SCORES) == pytest.approx((0.6 + 0.8 + 0.5) / 3)
    assert backward_transfer(SCORES) == pytest.approx(((0.6 - 0.9) + (0.8 - 0.7)) / 2)
    assert forgetting(SCORES) == pytest.approx(((0.95 - 0.6) + (0.7 - 0.8)) / 2)
    assert forward_transfer(SCORES, START) == pytest.approx(((0.2 - 0.1) + (0.1 - 0.15)) / 2)


def test_the_plasticity_retention_curve_by_hand() -> None:
    wanted = [(0.9, 1.0), ((0.9 + 0.7) / 2, 0.95 / 0.9), ((0.9 + 0.7 + 0.5) / 3, (0.6 + 0.8) / (0.9 + 0.7))]
    assert plasticity_retention(SCORES) == pytest.approx(np.array(wanted))
    assert plasticity_retention(np.array([[0.0, NAN], [0.4, 0.2]])).tolist() == [[0.0, 1.0], [0.1, 1.0]], "nothing to lose"


def test_a_single_task_neither_transfers_nor_forgets() -> None:
    one = np.array([[0.7]])
    assert (average_accuracy(one), backward_transfer(one), forgetting(one), forward_transfer(one, np.array([0.1]))) == (
        0.7,
        0,
        0,
        0,
    )


def test_what_a_metric_does_not_read_may_be_unknown() -> None:
    lower = np.array([[0.9, NAN, NAN], [0.8, 0.7, NAN], [0.6, 0.8, 0.5]])
    assert math.isfinite(average_accuracy(lower) + backward_transfer(lower) + forgetting(lower))
    with pytest.raises(DataError, match="just before its night"):
        forward_transfer(lower, START)


@pytest.mark.parametrize("shape", [(0, 0), (2, 3), (3,), (2, 2, 2), ()])
def test_scores_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    for metric in (average_accuracy, backward_transfer, forgetting, plasticity_retention, lambda s: forward_transfer(s, START)):
        with pytest.raises(DataError, match=r"must be a square matrix, got shape"):
            metric(np.zeros(shape))


@pytest.mark.parametrize("cell", [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)])
def test_a_score_that_was_not_measured_is_refused(cell: tuple[int, int]) -> None:
    broken = SCORES.copy()
    broken[cell] = NAN
    for metric in (average_accuracy, backward_transfer, forgetting, lambda s: forward_transfer(s, START)):
        with pytest.raises(DataError, match="NaN"):
            metric(broken)


def test_forward_transfer_wants_the_base_on_every_task() -> None:
    with pytest.raises(DataError, match="and the base's"):
        forward_transfer(SCORES, START[:2])


@given(SQUARE)
def test_forgetting_is_never_less_than_what_was_lost(scores: np.ndarray) -> None:
    assert forgetting(scores) >= -backward_transfer(scores) - 1e-12  # the best earlier score is at least the first one
    assert -1 <= backward_transfer(scores) <= 1


@given(SQUARE, st.floats(-0.5, 0.5))
def test_a_constant_shift_moves_acc_alone(scores: np.ndarray, shift: float) -> None:
    assert average_accuracy(scores + shift) == pytest.approx(average_accuracy(scores) + shift)
    assert backward_transfer(scores + shift) == pytest.approx(backward_transfer(scores), abs=1e-9)
    assert forgetting(scores + shift) == pytest.approx(forgetting(scores), abs=1e-9)


# --- paired intervals -------------------------------------------------------------------------------------------------


def test_the_interval_is_of_the_paired_difference_and_repeats() -> None:
    before = np.array([3.0, 1.0, 2.0, 5.0])
    assert paired_interval(before, before - 0.5) == pytest.approx((-0.5, -0.5, -0.5))
    after = before + np.array([0.1, -0.2, 0.3, 0.4])
    mean, low, high = paired_interval(before, after)
    assert mean == pytest.approx(0.15) and -0.2 <= low < mean < high <= 0.4
    assert paired_interval(before, after) == (mean, low, high)
    assert paired_interval(before, after, seed=1)[1:] != (low, high) or len(before) < 5
    narrow = paired_interval(before, after, confidence=0.5)
    assert low <= narrow[1] < narrow[2] <= high


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_interval_holds_the_truth_as_often_as_it_says(shift: float) -> None:
    """Row losses vary by 2 nats, their change by 0.5: 40 rows, 300 nights, 95%; four standard errors are 5%."""
    rng = np.random.default_rng(5)
    held = above = 0
    for _ in range(300):
        before = rng.normal(3, 2, 40)
        _, low, high = paired_interval(before, before + rng.normal(shift, 0.5, 40))
        held += low <= shift <= high
        above += low > 0
    assert 0.90 <= held / 300 <= 0.99
    assert above / 300 < 0.06 if shift == 0 else above / 300 > 0.85


@pytest.mark.parametrize(
    ("before", "after"), [([], []), ([1.0, 2.0], [1.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([[1.0]], [[1.0]]), (1.0, 1.0)]
)
def test_rows_that_do_not_pair_are_refused(before: object, after: object) -> None:
    with pytest.raises(DataError, match="the same rows twice"):
        paired_interval(np.array(before), np.array(after))


# --- intervals of a stream --------------------------------------------------------------------------------------------


def test_intervals_of_a_stream_hold_what_was_measured_and_its_bounds() -> None:
    learned, final = (
        [np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 1, 1, 1])],
        [np.array([1.0, 0, 1, 0]), np.array([1.0, 0, 1, 1, 1])],
    )
    nights = [learned[:1], final]
    found = stream_intervals(nights)
    scores = np.array([[0.75, np.nan], [0.5, 0.8]])
    assert found["acc"][0] < average_accuracy(scores) < found["acc"][1]
    assert found["bwt"][0] < backward_transfer(scores) <= found["bwt"][1] == 0  # no row of the first task got better
    plasticity, retention = plasticity_retention(scores)[-1]
    assert found["plasticity"][0] < plasticity < found["plasticity"][1]
    assert found["retention"][0] < retention <= found["retention"][1] == 1
    assert found["forgetting"] == tuple(-x for x in found["bwt"][::-1]), "of one night the best is the first"
    assert found == stream_intervals(nights)
    sure = [np.ones(3), np.zeros(2)]
    assert stream_intervals([sure, sure]) == {
        "acc": (0.5, 0.5),
        "bwt": (0.0, 0.0),
        "forgetting": (0.0, 0.0),
        "plasticity": (0.5, 0.5),
        "retention": (1.0, 1.0),
    }
    alone = stream_intervals([sure[:1]], sure[:1])
    nothing = dict.fromkeys(("bwt", "fwt", "forgetting"), (0.0, 0.0))
    assert alone == {"acc": (1.0, 1.0), **nothing, "plasticity": (1.0, 1.0), "retention": (1.0, 1.0)}


def test_intervals_of_forward_transfer_and_forgetting_hold_what_was_measured() -> None:
    rng = np.random.default_rng(3)
    share = np.array([[0.9, 0.3, 0.0], [0.95, 0.8, 0.2], [0.6, 0.7, 0.9]])
    nights = [[(rng.random(80) < p).astype(float) for p in share[i, : i + 2]] for i in range(3)]
    base = [(rng.random(80) < 0.1).astype(float) for _ in range(3)]
    scores = np.full((3, 3), np.nan)
    for i, night in enumerate(nights):
        scores[i, : len(night)] = [rows.mean() for rows in night]
    found = stream_intervals(nights, base)
    measured = {"fwt": forward_transfer(scores, np.array([rows.mean() for rows in base])), "forgetting": forgetting(scores)}
    for name, value in measured.items():
        low, high = found[name]
        assert low < value < high and high - low < 0.25
    assert "fwt" not in stream_intervals(nights)
    paired = stream_intervals(nights, [base[0], nights[0][1], nights[1][2]])  # the base answers as the model just before
    assert paired["fwt"] == (0.0, 0.0), "the same rows are drawn of both"
    for wrong in (base[:2], [*base[:2], base[2][1:]]):
        with pytest.raises(DataError, match="same rows of every task"):
            stream_intervals(nights, wrong)
    with pytest.raises(DataError, match="same rows of every task"):
        stream_intervals([[rows[0]] for rows in nights])


def test_the_interval_of_acc_holds_the_truth_as_often_as_it_says() -> None:
    """Two tasks of 60 rows, right with 0.9 and 0.6, 300 streams, 95%; four standard errors are 5%."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        rows = [(rng.random(60) < p).astype(float) for p in (0.9, 0.6)]
        low, high = stream_intervals([rows, rows])["acc"]
        held += low <= 0.75 <= high
    assert 0.90 <= held / 300 <= 0.99


@pytest.mark.parametrize("learned", [[], [np.ones(2)], [np.ones(3), np.ones(0)], [np.ones(3), np.ones(2)]])
def test_rows_that_are_not_the_same_twice_have_no_intervals(learned: list[np.ndarray]) -> None:
    with pytest.raises(DataError, match="same rows of every task"):
        stream_intervals([learned, [np.ones(3), np.ones(0)]])


# --- survival ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merged", "kept"), [(0.25, 1.0), (5.0, 0.0), (2.625, 0.5), (0.0125, 1.05), (9.75, -1.0)]
)  # fmt: skip
def test_survival_is_the_share_of_the_gain_that_the_file_keeps(merged: float, kept: float) -> None:
    assert survival(before=5.0, adapter=0.25, merged=merged) == pytest.approx(kept, abs=1e-9)


def test_where_nothing_was_gained_nothing_can_be_lost() -> None:
    assert survival(1.0, 1.0, 9.0) == survival(1.0, 2.0, 9.0) == 1.0
