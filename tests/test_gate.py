"""The gate: what is refused, why, and that noise alone or a number that is none is never taken for good news."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.errors import SettingError
from edgecl.gate import FEW, GateSettings, TaskResult, judge

OLD = TaskResult("maths", "heldout", False, 40, 0.9, 0.9, 0.5, 0.5, 0.0, -0.1, 0.1)
NEW = TaskResult("news", "heldout", True, 30, 0.0, 0.8, 6.0, 0.4, -5.6, -6.0, -5.2)
SMALL = TaskResult("default", "learned", True, 5, 0.0, 1.0, 6.0, 0.1, -5.9, -7.0, -5.0)
NAN = math.nan


def reasons(*results: TaskResult, prose: float = 0.1, **settings: float) -> list[str]:
    verdict = judge(results, 4.0, 4.0 + prose, GateSettings(**settings))
    assert verdict.accepted == (not verdict.reasons)
    return verdict.reasons


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (OLD, None),
        (NEW, None),
        (SMALL, None),
        # an earlier task is worse only if accuracy fell beyond the tolerance, and it fell or the loss rose beyond chance
        (
            replace(OLD, accuracy_after=0.6, loss_low=0.2, loss_high=0.9),
            "maths: accuracy fell from 90% to 60% on 40 rows, 10% is",
        ),
        (replace(OLD, accuracy_after=0.6), None),
        (replace(OLD, accuracy_after=0.6, right_low=-0.6, right_high=0.0), None),
        (replace(OLD, accuracy_after=0.82, loss_low=0.2, loss_high=0.9, right_low=-0.2, right_high=-0.01), None),
        (replace(OLD, accuracy_before=0.8, accuracy_after=0.7, loss_low=0.2), None),  # 10 points are not more than 10
        (replace(OLD, accuracy_after=0.5, loss_low=-0.9, loss_high=-0.1), None),
        (
            replace(OLD, accuracy_after=0.5, loss_low=-0.9, loss_high=-0.1, right_low=-0.6, right_high=-0.2),
            "maths: accuracy fell from 90% to 50% on 40 rows, 10% is",
        ),
        (replace(OLD, n_rows=FEW - 1, accuracy_after=0.0, right_low=-1.0, right_high=-0.5), None),
        (replace(OLD, kind="replay", accuracy_after=0.0, loss_low=1.0), "maths: accuracy fell from 90% to 0%"),
        (replace(OLD, accuracy_after=0.6, loss_low=NAN, loss_high=NAN), "maths: accuracy fell"),
        (replace(OLD, n_rows=FEW, accuracy_after=0.6, loss_low=0.2), "maths: accuracy fell from 90% to 60% on 6 rows"),
        (replace(OLD, n_rows=FEW - 1, accuracy_after=0.0, loss_low=0.2), None),
        # tonight's task has held-out rows: its loss fell beyond chance, or it had nothing left to gain
        (replace(NEW, loss_low=-0.4, loss_high=0.1), "news: no gain on 30 held-out rows (answer loss 6.00 -> 0.40)"),
        (replace(NEW, loss_low=-0.4, loss_high=0.0), "news: no gain"),
        (replace(NEW, loss_low=-0.4, loss_high=0.1, accuracy_after=1.0), None),
        (replace(NEW, loss_low=NAN, loss_high=NAN), "news: no gain"),
        (replace(NEW, n_rows=FEW - 1, loss_high=0.1), None),
        (replace(NEW, n_rows=FEW - 1, loss_change=0.0), "news: no gain on 5"),
        # and its answers belong to their questions, where that was measured
        (replace(NEW, swap_cost=3.0, swap_low=2.0), None),
        (
            replace(NEW, swap_cost=0.05, swap_low=-0.1),
            "news: on 30 held-out rows the answer to another question is as likely as the right one (+0.05 nats)",
        ),
        (replace(NEW, swap_cost=0.05, swap_low=-0.1, accuracy_after=1.0), "news: on 30 held-out rows the answer to another"),
        (replace(NEW, n_rows=FEW - 1, swap_cost=0.05, swap_low=-0.1), None),
        (replace(NEW, n_rows=FEW - 1, swap_cost=-0.05, swap_low=-0.1), "news: on 5 held-out rows the answer to another"),
        # a small night is measured on its own rows
        (replace(SMALL, accuracy_after=0.6), "default: 60% of tonight's rows are answered right, 75% are asked for"),
        (replace(SMALL, accuracy_after=0.75), None),
        (replace(SMALL, accuracy_after=NAN), "default: nan% of tonight's rows"),
        (replace(SMALL, loss_low=-1.0, loss_high=3.0), None),
    ],
)
def test_what_is_refused_and_why(result: TaskResult, reason: str | None) -> None:
    said = reasons(result)
    assert len(said) == (reason is not None)
    assert reason is None or said[0].startswith(reason)


def test_rows_of_a_large_night_need_not_be_known_by_heart() -> None:
    rows = replace(SMALL, n_rows=40, accuracy_after=0.2)
    assert reasons(rows)[0].startswith("default: 20% of tonight's rows")
    assert judge([rows], 4.0, 4.0, GateSettings(), is_small=False).accepted
    (reason,) = judge([replace(rows, loss_high=0.1)], 4.0, 4.0, GateSettings(), is_small=False).reasons
    assert reason.startswith("default: no gain on 40 learned rows")


@pytest.mark.parametrize(
    ("prose", "refused"), [(-1.0, False), (0.0, False), (0.19, False), (0.21, True), (NAN, True), (math.inf, True)]
)
def test_general_ability_has_a_tolerance_of_its_own(prose: float, refused: bool) -> None:
    said = reasons(SMALL, prose=prose)
    assert bool(said) == refused
    assert not refused or said[0].startswith(
        f"general ability fell by {prose:.2f} nats per token against the base, 0.20 are allowed"
    )


def test_every_reason_is_named_at_once_with_the_setting_that_decides() -> None:
    bad_old = replace(OLD, accuracy_after=0.1, loss_low=1.0)
    said = reasons(bad_old, replace(NEW, loss_high=0.5), replace(SMALL, accuracy_after=0.0), prose=2.0)
    assert ["gate.max_drop" in s or "held-out" in s or "gate.min_recall" in s or "gate.max_prose_nats" in s for s in said] == [
        True
    ] * 4


def test_tolerances_are_what_the_settings_say() -> None:
    fell = replace(OLD, accuracy_after=0.6, loss_low=0.2, loss_high=0.9)
    assert not reasons(fell, max_drop=0.31)
    assert reasons(replace(fell, accuracy_after=0.85), max_drop=0.01)
    assert not reasons(replace(SMALL, accuracy_after=0.2), min_recall=0.2)
    assert not reasons(SMALL, prose=0.9, max_prose_nats=1.0)
    for name in vars(GateSettings()):
        with pytest.raises(SettingError, match=rf"gate\.{name} must be (from 0 to 1|a number), got nan"):
            GateSettings(**{name: NAN})


def test_a_night_without_measured_tasks_is_judged_by_prose_alone() -> None:
    assert not reasons()
    assert reasons(prose=1.0)


# --- results from paired rows -----------------------------------------------------------------------------------------


def test_results_are_paired_row_by_row() -> None:
    before = [(True, 1.0), (False, 3.0), (True, 2.0), (False, 4.0)]
    after = [(True, 0.5), (True, 2.5), (False, 1.5), (True, 3.5)]
    result = TaskResult.paired("t", "heldout", True, before, after)
    assert (result.n_rows, result.accuracy_before, result.accuracy_after) == (4, 0.5, 0.75)
    assert (result.loss_before, result.loss_after) == (2.5, 2.0)
    assert (result.loss_change, result.loss_low, result.loss_high) == pytest.approx((-0.5, -0.5, -0.5))
    assert (result.right_low, result.right_high) == pytest.approx((-0.5, 1.0))  # two for the better, one for the worse


def test_the_cost_of_another_rows_answer_is_paired_too() -> None:
    rows = [(True, 0.5), (True, 1.0)]
    result = TaskResult.paired("t", "heldout", True, rows, rows, [(0.5, 2.5), (1.0, 3.0)])
    assert (result.swap_cost, result.swap_low) == pytest.approx((2.0, 2.0))
    assert TaskResult.paired("t", "heldout", True, rows, rows).swap_low is None, "and JSON has null for that, but no NaN"


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 20)), min_size=1, max_size=30))
def test_a_night_that_changed_nothing_never_counts_as_a_drop_nor_as_a_gain(rows: list[tuple[bool, float]]) -> None:
    same = TaskResult.paired("t", "heldout", False, rows, rows)
    assert not reasons(same, max_drop=0.0)
    assert bool(reasons(replace(same, learning=True))) == (same.accuracy_after < 1.0)


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=FEW - 1))
def test_a_handful_of_rows_that_all_got_worse_is_no_drop(rises: list[float]) -> None:
    before, after = [(True, 0.5) for _ in rises], [(False, 0.5 + rise) for rise in rises]
    assert not reasons(TaskResult.paired("t", "replay", False, before, after))


def test_noise_on_few_rows_is_not_a_drop_and_a_real_loss_is() -> None:
    before = [(True, 0.5)] * 10
    unlucky = [(False, 0.9), (False, 0.2), (True, 0.1), (False, 0.8), *[(True, 0.5)] * 6]
    assert not reasons(TaskResult.paired("t", "heldout", False, before, unlucky))
    assert reasons(TaskResult.paired("t", "heldout", False, before, [(False, 2.5)] * 8 + [(True, 0.6)] * 2))


def test_a_collapse_that_the_loss_of_the_wanted_words_does_not_show_is_a_drop() -> None:
    before, after = [(True, 0.5)] * 32, [(False, 0.4)] * 16 + [(True, 0.5)] * 16
    (reason,) = reasons(TaskResult.paired("sums", "heldout", False, before, after))
    assert reason.startswith("sums: accuracy fell from 100% to 50% on 32 rows")
    assert not reasons(TaskResult.paired("sums", "heldout", False, before[:FEW], after[14:20])), "two of six may be chance"
