"""What a night is measured on: held-out rows, its own, those of earlier tasks, and few rows of many tasks together."""

from __future__ import annotations

import itertools

import pytest

from edgecl.data import Example
from edgecl.gate import FEW
from edgecl.parts import MANY, OF_FEW, Part, compared, measured_on, swapped
from edgecl.rows import Scored, Stored
from edgecl.writers import SMALL


def test_many_rows_are_measured_on_held_out_ones_and_a_few_on_themselves() -> None:
    ids = itertools.count(1)

    def rows(**counts: int) -> list[Stored]:
        return [Stored(i := next(ids), "", Example((("user", f"{i}"),), task)) for task, n in counts.items() for _ in range(n)]

    older, new, along = rows(b=5, d=2), rows(a=SMALL, b=2, c=2), rows(a=4)
    replay = rows(a=7, b=1, c=2, d=3, e=1)

    def measured(*new: Stored) -> list[tuple[str, str, bool, int]]:
        parts = measured_on(new, [*along, *older], replay, (), len(new) <= SMALL)
        assert {row for part in parts for row in part.rows} <= {row.example for row in (*new, *older, *along, *replay)}
        return [(part.task, part.kind, part.learning, len(part.rows)) for part in parts]

    earlier = [("b", "heldout", False, 5), ("d", "heldout", False, 2)]
    corrected = [("c", "learned", True, 2), ("c", "replay", False, 2), ("e", "replay", False, 1)]
    of_b = ("b", "learned", True, 2)
    assert sorted(measured(*new)) == sorted([("a", "heldout", True, 4), of_b, *earlier, *corrected])
    small = [("a", "learned", True, SMALL - 4), ("a", "heldout", False, 4)]
    assert sorted(measured(*new[4:])) == sorted([*small, of_b, *earlier, *corrected])
    assert sorted(measured()) == sorted([("a", "heldout", False, 4), *earlier, corrected[1], corrected[2]])


def test_a_question_gets_the_answer_of_the_next_row_that_has_another() -> None:
    rows = [Example((("user", q), ("assistant", a)), final=a) for q, a in (("1", "x"), ("2", "x"), ("3", "y"))]
    pairs = swapped(rows)
    assert [own for own, _ in pairs] == rows
    assert [(other.messages[0][1], other.answer, other.final) for _, other in pairs] == [
        ("1", "y", None),
        ("2", "y", None),
        ("3", "x", None),
    ]
    assert swapped(rows[:2]) == []


def test_more_of_a_task_that_a_night_got_better_at_is_learned_itself_and_must_not_get_worse() -> None:
    rows = [Stored(i, "", Example((("user", f"{i}"), ("assistant", "a")), "a")) for i in range(5 * MANY)]
    new, held = rows[: 4 * MANY - 1], rows[4 * MANY :]
    first, more = (measured_on(new, held, [], known, False) for known in ((), {"a"}))
    assert [(part.kind, part.learning, len(part.rows)) for part in first] == [("heldout", True, MANY)]
    assert [(part.kind, part.learning, len(part.rows)) for part in more] == [("learned", True, MANY), ("heldout", False, MANY)]


def test_tasks_of_few_rows_are_judged_together() -> None:
    parts = [
        Part(task, "replay", learning, [Example((("user", f"{task}{i}"),), task) for i in range(n)])
        for task, learning, n in (("a", False, FEW - 2), ("b", False, FEW - 2), ("c", False, FEW), ("d", True, 2))
    ]
    rows = [row for part in parts for row in part.rows]
    before = {row.hash: Scored(row.hash, row.task, True, 0.1, 1) for row in rows}
    after = {row.hash: Scored(row.hash, row.task, row.task != "a", 3.0 if row.task == "a" else 0.1, 1) for row in rows}
    *each, together = compared(parts, [[]] * 4, before, after)
    assert [(result.task, result.n_rows) for result in each] == [("a", 4), ("b", 4), ("c", 6), ("d", 2)]
    assert (together.task, together.n_rows, together.learning) == (OF_FEW, 8, False)
    assert (together.accuracy_before, together.accuracy_after) == (1.0, 0.5) and together.loss_change == pytest.approx(1.45)
    assert len(compared(parts[1:], [[]] * 3, before, after)) == 3, "four rows are too few even together"
