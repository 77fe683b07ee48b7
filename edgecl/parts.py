"""What a night is measured on: which rows of which task, and what each of them must show.

A task that comes with rows to hold out should get better at them. Once an earlier night did, there may be little left to gain:
more of the same task must be learned itself, and its held-out rows must not get worse. Corrections teach nothing else: they
are to be known themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from .data import Example
from .gate import FEW, TaskResult
from .rows import Scored, Stored

MANY = 64  # rows tell whether a night learned what it was given
OF_FEW = "tasks of few rows"

Pairs = list[tuple[Example, Example]]
Outcomes = list[tuple[bool, float]]


@dataclass(frozen=True)
class Part:
    """Rows of a task that a night is measured on; kind and learning as in `TaskResult`."""

    task: str
    kind: str
    learning: bool
    rows: list[Example]


def measured_on(
    new: Sequence[Stored], heldout: Sequence[Stored], replay: Sequence[Stored], known: Collection[str], is_small: bool
) -> list[Part]:
    """Return what a night is measured on.

    What a task had before, its held-out rows or else those it rehearses, must not get worse.

    Args:
        new: what the night learns, or has learned.
        known: tasks that an earlier night was measured to get better at, on held-out rows.
        is_small: a night of corrections.
    """
    own, held, kept = (_by_task(rows) for rows in (new, heldout, replay))
    parts = []
    for task in {**held, **own, **kept}:
        came_along = task in own and task in held and held[task][-1].id > own[task][0].id
        is_taught = came_along and not is_small and task not in known
        if task in own and not is_taught:
            parts.append(_part("learned", True, sorted(own[task], key=lambda row: row.example.hash)[:MANY]))
        if task in held:
            parts.append(_part("heldout", is_taught, held[task]))
        elif task in kept:
            parts.append(_part("replay", False, kept[task]))
    return parts


def _by_task(rows: Sequence[Stored]) -> dict[str, list[Stored]]:
    """Return rows by task, those of each in the order of their ids."""
    out: dict[str, list[Stored]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        out.setdefault(row.example.task, []).append(row)
    return out


def _part(kind: str, learning: bool, rows: Sequence[Stored]) -> Part:
    return Part(rows[0].example.task, kind, learning, [row.example for row in rows])


def examples_of(parts: Sequence[Part]) -> list[Example]:
    """Return the rows of all parts."""
    return [row for part in parts for row in part.rows]


def swapped(rows: Sequence[Example]) -> Pairs:
    """Return rows, each beside its question with the next other answer among them; none where all answers are the same."""
    out = []
    for i, row in enumerate(rows):
        other = next((r.answer for r in (*rows[i + 1 :], *rows[:i]) if r.answer != row.answer), None)
        if other is not None:
            messages = (*row.messages[:-1], (row.messages[-1][0], other))
            out.append((row, replace(row, messages=messages, final=None, program=None)))
    return out


def compared(
    parts: Sequence[Part], swaps: Sequence[Pairs], before: dict[str, Scored], after: dict[str, Scored]
) -> list[TaskResult]:
    """Return each part before and after the night; parts too small to be judged alone come once more, all together.

    Args:
        swaps: of each part, what `swapped` made of its rows, or nothing.
        before, after: scores by the hash of a row.
    """

    def outcomes(rows: Sequence[Example], scores: dict[str, Scored]) -> Outcomes:
        return [(scores[row.hash].correct, scores[row.hash].loss_nats) for row in rows]

    out = []
    for part, pairs in zip(parts, swaps, strict=True):
        swap = [(after[own.hash].loss_nats, after[other.hash].loss_nats) for own, other in pairs]
        then, since = outcomes(part.rows, before), outcomes(part.rows, after)
        out.append(TaskResult.paired(part.task, part.kind, part.learning, then, since, swap))
    few = [part for part in parts if not part.learning and len(part.rows) < FEW]
    rows = examples_of(few)
    if len(rows) >= FEW:
        out.append(TaskResult.paired(OF_FEW, few[0].kind, False, outcomes(rows, before), outcomes(rows, after)))
    return out
