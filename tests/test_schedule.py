"""Schedules: they warm up, stay below their peak, end where they should, and the oscillating one settles."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.profile import SCHEDULES, TrainSettings
from edgecl.train.schedule import FINAL, learning_rate

PEAK = 2e-3
N = 200


def rates(**settings):
    made = TrainSettings(learning_rate=PEAK, **settings)
    return np.array([learning_rate(made, step, N) for step in range(N)]) / PEAK


@given(
    schedule=st.sampled_from(SCHEDULES), n_steps=st.integers(1, 60), warmup=st.floats(0, 0.9), bump=st.floats(0, 2),
    cycles=st.integers(1, 9), settled=st.floats(0, 0.9),
)  # fmt: skip
def test_every_rate_is_above_zero_and_at_most_the_peak_and_its_bump(schedule, n_steps, warmup, bump, cycles, settled):
    made = TrainSettings(learning_rate=PEAK, schedule=schedule, warmup=warmup, bump=bump, cycles=cycles, settled=settled)
    highest = PEAK * (1 + bump if schedule == "oscillating" else 1)
    assert all(0 < learning_rate(made, step, n_steps) <= highest * (1 + 1e-9) for step in range(n_steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_a_line_to_the_peak(schedule):
    found = rates(schedule=schedule, warmup=0.1)
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])


def test_constant_stays_and_linear_and_cosine_fall_to_a_tenth():
    assert set(rates(schedule="constant", warmup=0.0)[1:]) == {1.0}
    for schedule, middle in (("linear", 0.55), ("cosine", 0.55)):
        found = rates(schedule=schedule, warmup=0.0)
        assert (np.diff(found[1:]) < 0).all() and FINAL < found[-1] < FINAL + 0.01
        assert found[N // 2] == pytest.approx(middle, abs=0.01)
    line, curve = (rates(schedule=name, warmup=0.0)[N // 4] for name in ("linear", "cosine"))
    assert curve > line + 0.05


def test_oscillating_bumps_above_its_base_and_settles_after_each_bump():
    base = rates(schedule="cosine", warmup=0.0)
    found = rates(schedule="oscillating", warmup=0.0, cycles=4, bump=0.5, settled=0.5)
    share = found / base
    for cycle in range(4):
        bump, settled = share[cycle * 50 + 2 : cycle * 50 + 24], share[cycle * 50 + 26 : cycle * 50 + 49]
        assert bump.max() == pytest.approx(1.5, abs=0.02) and bump.min() > 1.0
        assert settled == pytest.approx(FINAL)
    assert found[-1] < 0.02
    flat = replace(TrainSettings(), schedule="oscillating", warmup=0.0, bump=0.0, settled=0.0, learning_rate=1.0)
    assert [learning_rate(flat, step, N) for step in range(1, N)] == pytest.approx(list(base[1:]))
