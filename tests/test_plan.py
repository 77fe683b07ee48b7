"""The planner: what is planned fits, more memory is never slower, less time means fewer layers, and it says what would fit."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, random_adapter, random_tokens

from edgecl.errors import EdgeclError, NotNow
from edgecl.profile import Profile, TrainSettings
from edgecl.shape import Shape, read_shape
from edgecl.train import LatentStore, Night, TrainRow, loop, plan, train
from edgecl.train.plan import Plan, first_trained, plan_memory, resident_part
from edgecl.train.weights import Placement
from edgecl_convert import GgufFile

pytestmark = pytest.mark.usefixtures("one_thread")

CPU32 = Placement(torch.device("cpu"), torch.float32)
CPU16 = Placement(torch.device("cpu"), torch.bfloat16)
SMOLLM = Shape("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e-5, 0.125, 1e5)
LLAMA_1B = Shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 0.125, 5e5)
ROW = TrainRow(list(range(30)), [False] * 20 + [True] * 10)
STEPS = [[ROW] * 8] * 12
TRAIN = TrainSettings(depth=1.0)


@pytest.fixture(autouse=True, scope="module")
def process_of_300_mb():
    """Plan as in a fresh process, whatever ran in this one before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "resident_set", lambda: 300_000_000)
        yield


def planned(ram_bytes: float, shape=SMOLLM, place=CPU32, steps=STEPS, **more) -> Plan:
    return plan_memory(shape, place, replace(TRAIN, **more), int(ram_bytes), steps, 32, 300_000_000)


def cost(made: Plan) -> tuple[bool, float, int]:
    """What makes a plan slow, worst first."""
    return made.checkpointing, -made.n_resident, -made.micro_tokens


@settings(deadline=None)
@given(ram=st.floats(0.45e9, 6e9), depth=st.floats(0.1, 1), place=st.sampled_from([CPU16, CPU32]))
def test_what_is_planned_fits_and_more_memory_is_never_slower(ram, depth, place):
    try:
        made = planned(ram, place=place, depth=depth)
    except EdgeclError:
        assert ram < 0.7e9
        return
    assert made.peak_rss_bytes <= ram
    assert made.first_layer == first_trained(SMOLLM, depth)
    assert cost(planned(1.5 * ram, place=place, depth=depth)) <= cost(made)


def test_memory_decides_between_resident_and_packed_weights():
    rich, poor = planned(4e9), planned(0.62e9)
    assert rich.is_resident and not rich.checkpointing and "weights resident" in str(rich)
    assert poor.n_resident < 15 and not poor.resident_head and "packed" in str(poor)
    assert "weights of " in str(planned(1.05e9)) and "layers packed" in str(planned(1.05e9))


def test_trained_layers_stay_decoded_first_then_the_head_then_the_others():
    layer, head = 4 * SMOLLM.layer_weights, 4 * 49152 * 576
    for room, wanted in (
        (layer - 1, (0, False)),
        (7 * layer, (7, False)),
        (10 * layer + head - 1, (10, False)),
        (10 * layer + head, (10, True)),
        (13 * layer + head, (13, True)),
        (99 * layer + head, (30, True)),
    ):
        assert resident_part(SMOLLM, 4, 20, room) == wanted


def test_a_billion_weights_are_trained_in_two_gigabytes_packed_with_layers_computed_twice():
    for place in (CPU16, CPU32):
        made = planned(2e9, LLAMA_1B, place)
        assert made.peak_rss_bytes < 2e9 and not made.is_resident


def test_too_little_memory_says_how_much_would_fit():
    with pytest.raises(EdgeclError, match=r"needs (\d+) MB of memory at least, ram_bytes is 50 MB") as caught:
        planned(50e6)
    needed = int(str(caught.value).split("needs ")[1].split(" MB")[0])
    planned((needed + 2) * 1e6)
    with pytest.raises(EdgeclError):
        planned((needed - 20) * 1e6)


def test_one_long_row_bounds_the_smallest_part():
    long = TrainRow(list(range(1500)), [False] * 1400 + [True] * 100)
    made = planned(4e9, steps=[[ROW] * 7 + [long]])
    assert made.micro_tokens >= 1496
    assert planned(1.3e9, steps=[[ROW] * 7 + [long]]).checkpointing


def test_what_attention_works_with_grows_with_the_square_of_a_row():
    longs = [TrainRow(list(range(n)), [False] * (n - 8) + [True] * 8) for n in (1000, 2000)]
    found = [planned(99e9, LLAMA_1B, steps=[[long]]).peak_rss_bytes for long in longs]
    pairs = 4 * 32 * (2000**2 - 1000**2)
    assert found[1] - found[0] > (LLAMA_1B.n_layer + 1 + 2) * pairs, "what each layer keeps, what they see, what one computes"


def test_after_a_try_that_took_too_much_is_planned_with_less_and_what_is_needed_is_said_for_it():
    whole, less = (plan_memory(SMOLLM, CPU32, TRAIN, int(0.9e9), STEPS, 32, 300_000_000, 0, share) for share in (1.0, 0.85))
    assert less.peak_rss_bytes < 0.85 * 0.9e9 < whole.peak_rss_bytes and less.n_resident < whole.n_resident
    with pytest.raises(EdgeclError, match=r"needs (\d+) MB of memory at least, ram_bytes is 500 MB") as caught:
        plan_memory(SMOLLM, CPU32, TRAIN, int(5e8), STEPS, 32, 300_000_000, 0, 0.85)
    needed = int(str(caught.value).split("needs ")[1].split(" MB")[0])
    plan_memory(SMOLLM, CPU32, TRAIN, (needed + 2) * 10**6, STEPS, 32, 300_000_000, 0, 0.85)


def test_a_run_that_is_gone_on_from_keeps_its_parts_where_they_fit():
    many = [[ROW] * 24] * 12
    made = planned(4e9, steps=many)
    again = plan_memory(SMOLLM, CPU32, TRAIN, int(0.9e9), many, 32, 300_000_000, made.micro_tokens)
    assert again.micro_tokens == made.micro_tokens > planned(0.55e9, steps=many).micro_tokens
    assert again.peak_rss_bytes <= 0.9e9
    assert plan_memory(SMOLLM, CPU32, TRAIN, int(0.55e9), many, 32, 300_000_000, made.micro_tokens) == planned(
        0.55e9, steps=many
    )
    with pytest.raises(EdgeclError, match=r"needs \d+ MB of memory at least"):
        plan_memory(SMOLLM, CPU32, TRAIN, int(0.35e9), many, 32, 300_000_000, made.micro_tokens)


def test_a_plan_says_what_makes_it_slow():
    made = replace(planned(4e9), seconds=90)
    size = f"{made.peak_rss_bytes / 1e6:.0f} MB"
    layers = "30 of 30 layers, the upper 15 from step 5 on"
    assert str(made) == f"{layers}, weights resident, parts of {made.micro_tokens} tokens: 90 s, {size}"
    assert ", head packed, " in str(replace(made, resident_head=False))
    assert ", weights packed, " in str(replace(made, resident_head=False, n_resident=0))
    slow = replace(made, first_layer=20, upper_layer=20, checkpointing=True, few_kernels=True)
    assert str(slow).startswith("10 of 30 layers for lack of time, ")
    assert f"parts of {made.micro_tokens} tokens, layers computed twice, few kernels kept: " in str(slow)
    assert "time" not in str(planned(4e9, depth=0.3))
    assert str(planned(4e9, depth=0.5)).startswith("15 of 30 layers, weights resident, ")
    assert str(planned(4e9, freeze_at=1.0)).startswith("30 of 30 layers, weights resident, ")


def test_layers_that_are_frozen_later_take_their_memory_and_those_below_never_do():
    whole, later, never = (planned(4e9, **more) for more in ({"freeze_at": 1.0}, {}, {"depth": 0.5}))
    assert later.peak_rss_bytes == whole.peak_rss_bytes > never.peak_rss_bytes


# --- time, measured ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with GgufFile(build(tmp_path_factory.mktemp("plan") / "base.gguf", n_layer=10)[0]) as gguf:
        yield gguf


def rows(n: int) -> list[TrainRow]:
    return [TrainRow(random_tokens(20, i), [False] * 15 + [True] * 5) for i in range(n)]


def test_a_night_short_of_time_trains_fewer_layers(base, monkeypatch):
    monkeypatch.setattr(plan, "_seconds", lambda work: work() or 1.0)  # every piece of work takes a second
    settings = TrainSettings(depth=1.0, epochs=1, min_steps=1, anchor_weight=0.0)
    depths = {}
    for minutes in (100, 1.7, 0.001):
        adapter, report = train(base, rows(16), [], settings, Profile(threads=1, minutes=minutes))
        trained = {name.split(".")[1] for name, (_, b) in adapter.pairs.items() if b.any()}
        depths[minutes] = len(trained)
        assert report.plan.startswith(f"{len({n.split('.')[1] for n in adapter.pairs})} of 10 layers")
        assert (" for lack of time" in report.plan) == (minutes < 1)
    assert depths[100] == 10 and depths[0.001] <= 2
    assert math.isclose(read_shape(base).n_layer, 10)


def test_frozen_layers_take_less_time_and_a_night_short_of_it_trains_fewer(base, monkeypatch):
    monkeypatch.setattr(plan, "_seconds", lambda work: work() or 5.0)  # a second for each of the layers
    settings = TrainSettings(freeze_at=0.5, epochs=4, min_steps=1, anchor_weight=0.0)
    _, report = train(base, rows(8), [], settings, Profile(threads=1))
    assert report.predicted_s == 2 * (5 + 10) + 2 * (5 + 5 + 5)  # all rows of the last two go through the frozen layers
    assert report.plan.startswith("10 of 10 layers, the upper 5 from step 3 on, ")
    with LatentStore(base.path.with_suffix(".db"), "base") as store:
        _, report = train(base, rows(8), [], settings, Profile(threads=1), Night(store=store))
        assert report.predicted_s == 2 * (5 + 10) + 2 * (5 + 5 + 0.5 * 5)  # each of them once
        _, report = train(base, rows(8), [], settings, Profile(threads=1, minutes=0.9), Night(store=store))
    assert report.plan.startswith("8 of 10 layers for lack of time, the upper 5 from step 3 on, ")
    _, report = train(base, rows(8), [], settings, Profile(threads=1), Night(start=random_adapter(base)))
    assert report.plan.startswith("10 of 10 layers, weights resident, ")  # what earlier nights taught would be forgotten


def test_a_checkpoint_whose_parts_do_not_fit_any_more_is_left_for_a_new_start(base, tmp_path):
    many = [TrainRow(random_tokens(60, i), [False] * 50 + [True] * 10) for i in range(24)]
    settings = TrainSettings(depth=1.0, epochs=3, min_steps=1, batch_rows=24, anchor_weight=0.0)
    shape, place = read_shape(base), loop.placement(0)

    def parts(ram_bytes: int) -> int:
        try:
            return plan_memory(shape, place, settings, ram_bytes, [many], 0, 300_000_000, 768).micro_tokens
        except EdgeclError:
            return 0

    least = next(ram for ram in range(300_000_000, 900_000_000, 500_000) if parts(ram))
    assert 0 < parts(least) < parts(900_000_000) == 768
    steps = {}
    for ram_bytes in (900_000_000, least):
        path, told = tmp_path / f"{ram_bytes}.safetensors", iter([False, True])
        with pytest.raises(NotNow):
            train(base, many, [], settings, Profile(threads=1), Night(checkpoint=path, stop=lambda told=told: next(told)))
        _, report = train(base, many, [], settings, Profile(threads=1, ram_bytes=ram_bytes), Night(checkpoint=path))
        steps[ram_bytes] = report.resumed_at, report.steps, "its checkpoint's parts of 768 tokens do not fit" in report.plan
    assert steps == {900_000_000: (1, 3, False), least: (0, 3, True)}


def test_the_report_shows_what_was_expected_beside_what_was(base):
    _, report = train(base, rows(16), [], TrainSettings(depth=1.0, epochs=2, min_steps=1), Profile(threads=1), Night())
    assert report.predicted_s > 0 and report.train_s > 0 and report.predicted_rss_bytes > 1e8
    assert f"{report.predicted_rss_bytes / 1e6:.0f} MB" in report.plan


def test_a_row_that_no_context_holds_is_left_out_and_counted(base):
    long = TrainRow(random_tokens(90, 7), [False] * 10 + [True] * 80)
    cut = TrainRow(random_tokens(90, 8), [False] * 85 + [True] * 5)
    silent = TrainRow(random_tokens(9, 9), [False] * 9)
    settings = TrainSettings(depth=1.0, epochs=1, min_steps=1, anchor_weight=0.0)
    _, report = train(base, [*rows(3), long, cut, silent], [], settings, Profile(threads=1, n_ctx=64))
    assert (report.n_left_out, report.n_cut, report.steps) == (2, 1, 1)
    assert report.tokens == 3 * 20 + 64
    with pytest.raises(EdgeclError, match="none of 2 rows has an answer that fits into 64 tokens"):
        train(base, [long, silent], [], settings, Profile(threads=1, n_ctx=64))
