"""Learning-rate schedules: each is a function of the share of training that is done."""

from __future__ import annotations

import math

from ..profile import TrainSettings

FINAL = 0.1  # of the peak, where a decaying schedule ends


def learning_rate(settings: TrainSettings, step: int, n_steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up over `warmup` of the steps, then `settings.schedule`.

    constant stays at the peak; linear and cosine decay to a tenth of it. oscillating is a cosine with `cycles` bumps: each
    cycle begins with a bump that rises `bump` times the decayed rate above it, and ends with a `settled` share where the
    rate is a tenth of the decayed one. Weights that settle several times at a low rate lie where rounding to INT4 costs less
    (the schedule of "When Flat Minima Fail"); the last cycle ends settled, so what is merged is settled,
    unless a cycle has fewer steps than 1 / `settled`.
    """
    n_warm = max(1, round(settings.warmup * n_steps))
    if step < n_warm:
        return settings.learning_rate * (step + 1) / n_warm
    done = (step - n_warm) / max(1, n_steps - n_warm)
    return settings.learning_rate * _SHAPES[settings.schedule](settings, done)


def _constant(settings: TrainSettings, done: float) -> float:
    return 1.0


def _linear(settings: TrainSettings, done: float) -> float:
    return 1 - (1 - FINAL) * done


def _cosine(settings: TrainSettings, done: float) -> float:
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2


def _oscillating(settings: TrainSettings, done: float) -> float:
    base = _cosine(settings, done)
    in_cycle = done * settings.cycles % 1
    risen = 1 - settings.settled  # the share of a cycle that is not settled
    if in_cycle >= risen:
        return base * FINAL
    return base * (1 + settings.bump * math.sin(math.pi * in_cycle / risen))


_SHAPES = {"constant": _constant, "linear": _linear, "cosine": _cosine, "oscillating": _oscillating}
