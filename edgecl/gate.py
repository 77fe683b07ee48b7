"""Accept or refuse a night, by what was measured on the file that would be served.

A handful of rows is a coin toss, so a task counts as worse only when its accuracy fell by more than the tolerance, and that
fall, or the rise of its paired answer loss, is beyond chance, which fewer than FEW rows cannot show. The loss sees more in few
rows; but where a number or tests judge an answer, its loss, which is of the wanted one's words, may stay where it was.

What was learned tonight must show a gain; general ability (nats per token of unrelated prose, against the untouched base) has a
tolerance of its own.

A night of wrong answers shows a gain too: the model learns what answers look like. So but for corrections, which are to be
known by heart, the right answer must also be likelier than the answer of another row, beyond chance. Of fewer than FEW rows
the mean decides both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import SettingError
from .metrics import paired_interval

FEW = 6  # rows: of five that only chance moves, all rise more often than once in forty
ROUNDING = 1e-9  # 0.8 - 0.7 is more than 0.1


@dataclass(frozen=True)
class GateSettings:
    """Tolerances.

    Attributes:
        max_drop: accuracy that an earlier task may lose in one night; what several nights take adds up.
        min_recall: share of a small night's own rows that must be answered right the next morning.
        max_prose_nats: nats per token of unrelated prose that the model may lose to the untouched base, over all nights.
        min_survival: share of the adapter's gain that the merged file must keep, to within 0.01 nats, or a wider one serves.
    """

    max_drop: float = 0.10
    min_recall: float = 0.75
    max_prose_nats: float = 0.20
    min_survival: float = 0.90

    def __post_init__(self) -> None:
        """Refuse what nothing can be compared with.

        Raises:
            SettingError: a share is not from 0 to 1, or the tolerance of prose is NaN.
        """
        for key in ("max_drop", "min_recall", "min_survival"):
            if not 0 <= getattr(self, key) <= 1:
                raise SettingError(f"gate.{key} must be from 0 to 1, got {getattr(self, key)}")
        if math.isnan(self.max_prose_nats):
            raise SettingError(f"gate.max_prose_nats must be a number, got {self.max_prose_nats}")


@dataclass(frozen=True)
class TaskResult:
    """One task before and after the night, on the same rows.

    Attributes:
        kind: "heldout" rows were never trained on; "learned" and "replay" rows were.
        learning: whether the night should have made these rows better; of others, it must not have made them worse.
        loss_change: mean paired change of answer loss in nats, with its 95% interval in loss_low, loss_high.
        swap_cost: how much higher the loss is, after the night, when a question gets another row's answer, in nats; swap_low:
            the low end of its 95% interval. None where that was not measured.
        right_low, right_high: 95% interval of the paired change of accuracy. None in results of earlier versions.
    """

    task: str
    kind: str
    learning: bool
    n_rows: int
    accuracy_before: float
    accuracy_after: float
    loss_before: float
    loss_after: float
    loss_change: float
    loss_low: float
    loss_high: float
    swap_cost: float | None = None
    swap_low: float | None = None
    right_low: float | None = None
    right_high: float | None = None

    @classmethod
    def paired(
        cls,
        task: str,
        kind: str,
        learning: bool,
        before: Sequence[tuple[bool, float]],
        after: Sequence[tuple[bool, float]],
        swapped: Sequence[tuple[float, float]] = (),
    ) -> TaskResult:
        """Compare (correct, loss in nats) of the same rows before and after.

        Args:
            swapped: loss of a row's own answer and of another row's answer to the same question, after the night.
        """
        right_before, loss_before = np.array(before, np.float64).T
        right_after, loss_after = np.array(after, np.float64).T
        change, low, high = paired_interval(loss_before, loss_after)
        _, right_low, right_high = paired_interval(right_before, right_after)
        swap_cost, swap_low = paired_interval(*np.array(swapped, np.float64).T)[:2] if swapped else (None, None)
        return cls(
            task, kind, learning, len(before), float(right_before.mean()), float(right_after.mean()),
            float(loss_before.mean()), float(loss_after.mean()), change, low, high, swap_cost, swap_low, right_low, right_high,
        )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the gate says; `reasons` is empty when it accepts."""

    accepted: bool
    reasons: list[str] = field(default_factory=list)


def judge(
    results: Sequence[TaskResult], prose_base: float, prose_after: float, settings: GateSettings, is_small: bool = True
) -> Verdict:
    """Return whether a night is published.

    Args:
        results: every task that has rows to measure on.
        prose_base: nats per token of unrelated prose under the untouched base; prose_after: under tonight's file.
        is_small: a night of corrections, which are to be known by heart.
    """
    reasons = []
    for result in results:
        reason = _no_gain(result, settings, is_small) if result.learning else _drop(result, settings)
        if reason:
            reasons.append(reason)
    lost = prose_after - prose_base
    if not lost <= settings.max_prose_nats:  # so written that NaN refuses
        reasons.append(
            f"general ability fell by {lost:.2f} nats per token against the base, "
            f"{settings.max_prose_nats:.2f} are allowed (gate.max_prose_nats)"
        )
    return Verdict(not reasons, reasons)


def _no_gain(result: TaskResult, settings: GateSettings, is_small: bool) -> str:
    if result.kind == "learned" and is_small:
        if not result.accuracy_after >= settings.min_recall:
            return (
                f"{result.task}: {result.accuracy_after:.0%} of tonight's rows are answered right, "
                f"{settings.min_recall:.0%} are asked for (gate.min_recall)"
            )
        return ""
    is_few = result.n_rows < FEW
    rows = f"{result.n_rows} {'held-out' if result.kind == 'heldout' else 'learned'} rows"
    if not ((result.loss_change if is_few else result.loss_high) < 0 or result.accuracy_after == 1.0):
        return f"{result.task}: no gain on {rows} (answer loss {result.loss_before:.2f} -> {result.loss_after:.2f})"
    least = result.swap_cost if is_few else result.swap_low
    if least is not None and least <= 0:
        return (
            f"{result.task}: on {rows} the answer to another question is as likely as the right one "
            f"({result.swap_cost:+.2f} nats); look whether its answers belong to its questions"
        )
    return ""


def _drop(result: TaskResult, settings: GateSettings) -> str:
    fell = result.accuracy_before - result.accuracy_after
    is_certain = result.right_high is not None and result.right_high < 0
    is_certain = is_certain or not result.loss_low <= 0  # a loss that is NaN counts as risen
    if fell > settings.max_drop + ROUNDING and result.n_rows >= FEW and is_certain:
        return (
            f"{result.task}: accuracy fell from {result.accuracy_before:.0%} to {result.accuracy_after:.0%} "
            f"on {result.n_rows} rows, {settings.max_drop:.0%} is allowed (gate.max_drop)"
        )
    return ""
