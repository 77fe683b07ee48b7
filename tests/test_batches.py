"""Batches: every row once, the buffer evenly, no part above its budget, no answer inside what rows share."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecl.train import TrainRow
from edgecl.train.batches import REWORDED, asked_otherwise, night_batches, predicted, usable
from edgecl.train.packing import LEAST, extent, micro_batches, tree

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no error
tokens = st.integers(0, 3)
sizes = st.integers(0, 40)


@st.composite
def rows(draw, min_size=1):
    """Rows that begin alike for a while; at least one token is predicted, never the first."""
    prefix = draw(st.lists(tokens, max_size=6))
    out = []
    for body in draw(st.lists(st.lists(tokens, min_size=2, max_size=12), min_size=min_size, max_size=12)):
        ids = prefix + body
        supervised = [False] + [draw(st.booleans()) for _ in ids[1:-1]] + [True]
        out.append(TrainRow(ids, supervised))
    return out


def numbered(n: int, length: int = 3) -> list[TrainRow]:
    return [TrainRow([i] * length, [False] * (length - 1) + [True]) for i in range(n)]


def first_ids(batches) -> Counter:
    return Counter(row.ids[0] for batch in batches for row in batch)


@patient
@given(n_new=st.integers(1, 60), n_replay=sizes, batch_rows=st.integers(1, 9), replay_rows=st.integers(0, 9))
def test_a_pass_holds_every_new_row_once_and_walks_the_buffer_evenly(n_new, n_replay, batch_rows, replay_rows):
    new, replay = numbered(n_new), [TrainRow([1000 + i, 0], [False, True]) for i in range(n_replay)]
    batches = night_batches([new], replay, batch_rows, replay_rows, np.random.default_rng(0))
    seen = first_ids(batches)
    assert len(batches) == -(-n_new // batch_rows)
    assert all(seen[i] == 1 for i in range(n_new))
    share = min(replay_rows, n_replay)
    rehearsed = [seen[1000 + i] for i in range(n_replay)]
    assert sum(rehearsed) == share * len(batches)
    assert all(sum(row.ids[0] >= 1000 for row in batch) == share for batch in batches)
    assert not rehearsed or max(rehearsed) - min(rehearsed) <= 1


def test_every_row_of_the_buffer_is_rehearsed_equally_often():
    replay = [TrainRow([1000 + i, 0], [False, True]) for i in range(5)]
    # 5 batches of 3 replayed: 5 rows, 3 times each
    batches = night_batches([numbered(40)], replay, 8, 3, np.random.default_rng(1))
    seen = first_ids(batches)
    assert [seen[1000 + i] for i in range(5)] == [3] * 5


def test_long_rows_of_the_buffer_are_fewer_in_a_batch():
    new, replay = (
        [TrainRow([i] * 10, [False] * 9 + [True]) for i in range(16)],
        [TrainRow([99] * 35, [False] * 34 + [True])] * 9,
    )
    assert [len(batch) for batch in night_batches([new], replay, 8, 8, np.random.default_rng(0))] == [8 + 3] * 2


def test_batches_hold_about_as_many_tokens_each():
    lengths = np.random.default_rng(0).integers(10, 60, 300)
    new = [TrainRow([i] * int(n), [False] * (int(n) - 1) + [True]) for i, n in enumerate(lengths)]
    replay = [TrainRow([1000 + i] * (10 + i), [False] * (9 + i) + [True]) for i in range(30)]
    batches = night_batches([new], replay, 8, 3, np.random.default_rng(0))
    sizes = [sum(len(row.ids) for row in batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 20  # at random: about 200
    assert {len(batch) for batch in batches} <= {10, 11}  # 38 rows of 8 or 7, with 3 more


def test_batches_of_a_night_of_one_correction_hold_about_as_many_tokens_each():
    lengths = np.random.default_rng(0).integers(30, 100, 64)
    replay = [TrainRow([i] * int(n), [False] * (int(n) - 1) + [True]) for i, n in enumerate(lengths)]
    batches = night_batches([numbered(1, 60)] * 40, replay, 8, 12, np.random.default_rng(0))
    sizes = [sum(len(row.ids) for row in batch) for batch in batches]
    assert len(batches) == 40 and max(sizes) - min(sizes) <= 20  # each for itself: about 300


def test_a_pass_is_shuffled_by_its_generator():
    new = numbered(64)
    one, again, other = (night_batches([new], [], 8, 0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == again and one != other


@patient
@given(rows(), st.integers(1, 60))
def test_micro_batches_keep_all_rows_within_their_budget(batch, max_tokens):
    parts = micro_batches(batch, max_tokens)
    assert Counter(id(row) for part in parts for row in part) == Counter(id(row) for row in batch)
    for part in parts:
        for anchor in ([], list(range(100, 108))):
            wanted = predicted(part) + [(len(part), t) for t in range(len(anchor))]
            n_tokens, _, _ = extent([*(row.ids for row in part), anchor], wanted)
            assert len(part) == 1 or n_tokens <= max_tokens + len(anchor)


@patient
@given(rows(min_size=2))
def test_micro_batches_of_a_large_and_of_a_tiny_budget(batch):
    assert len(micro_batches(batch, 10**6)) == 1
    assert len(micro_batches(batch, 1)) == len(batch)


def test_rows_that_begin_alike_fill_a_part_with_what_is_different():
    system = list(range(600))
    rows = [TrainRow([*system, 1000 + i, 2000 + i], [False] * 601 + [True]) for i in range(8)]
    assert [len(part) for part in micro_batches(rows, 616)] == [8]
    assert [len(part) for part in micro_batches(rows, 615)] == [7, 1]


def before(batch) -> list[int]:
    """Return how many tokens of each row stand before the one that predicts the first of its answer."""
    return [row.supervised.index(True) - 1 for row in batch]


@patient
@given(rows())
def test_what_rows_share_is_what_enough_of_them_begin_with(batch):
    shared, paths = tree([row.ids for row in batch], before(batch))
    least = min(LEAST, max(2, sum(end > 0 for end in before(batch))))
    beginnings = Counter(tuple(row.ids[:n]) for row, end in zip(batch, before(batch), strict=True) for n in range(1, end + 1))
    wanted = {ids for ids, count in beginnings.items() if count >= least}
    said = [tuple(batch[i].ids[: t + 1]) for i, t in shared]
    assert set(said) == wanted and len(said) == len(wanted), "each once"
    for row, path, end in zip(batch, paths, before(batch), strict=True):
        assert [said[node] for node in path] == [tuple(row.ids[: n + 1]) for n in range(len(path))]
        assert len(path) == end or tuple(row.ids[: len(path) + 1]) not in wanted


@pytest.mark.parametrize(
    ("ids", "supervised", "paths"),
    [
        ([[1, 2, 3, 4]], 2, [[]]),  # nobody to share with
        ([[1, 2, 3, 9], [1, 2, 4, 9]], 3, [[0, 1], [0, 1]]),
        ([[1, 2], [1, 2, 3]], 1, [[], []]),
        ([[5, 1, 1], [6, 1, 1]], 2, [[], []]),
        ([[1, 2, 8, 9], [1, 2, 7, 9], [1, 3, 7, 9], [1, 3, 8, 9]], 3, [[0], [0], [0], [0]]),  # two are too few
        ([[1, 2, 8, 9], [5, 2, 7, 9], [1, 2, 7, 9], [5, 2, 8, 9], [5, 2, 1, 9], [1, 2, 1, 9]], 3,
         [[0, 1], [2, 3], [0, 1], [2, 3], [2, 3], [0, 1]]),
    ],
)  # fmt: skip
def test_what_rows_share_by_hand(ids, supervised, paths):
    assert tree(ids, [supervised - 1] * len(ids)).paths == paths


def test_nothing_is_shared_by_no_rows():
    assert tree([], []) == ([], [])


# --- rows longer than the context -------------------------------------------------------------------------------------


@patient
@given(n_prompt=st.integers(0, 30), n_answer=st.integers(1, 20), n_ctx=st.integers(2, 40))
def test_a_long_row_loses_the_left_of_its_prompt_and_never_a_token_of_its_answer(n_prompt, n_answer, n_ctx):
    row = TrainRow(list(range(n_prompt + n_answer)), [False] * n_prompt + [True] * n_answer)
    cut = usable(row, n_ctx)
    if len(row.ids) <= n_ctx:
        assert cut is row
    elif n_answer + 1 > n_ctx or not n_prompt:
        assert cut is None
    else:
        assert cut.ids == row.ids[-n_ctx:]
        assert [i for i, wanted in zip(cut.ids, cut.supervised, strict=True) if wanted] == row.ids[n_prompt:]
        assert not cut.supervised[0]


def test_a_row_of_two_answers_keeps_its_last_whole():
    row = TrainRow(list(range(12)), [2 <= t < 5 or t >= 9 for t in range(12)])
    assert usable(row, 8).supervised == [False] * 5 + [True] * 3  # ids 4 ... 11; the token 4 has nothing before it
    assert usable(row, 4).ids == [8, 9, 10, 11]
    assert usable(row, 3) is None
    assert usable(TrainRow([1, 2, 3], [False] * 3), 8) is None


# --- other wordings -----------------------------------------------------------------------------------------------------


def test_a_row_comes_in_other_words_as_often_as_it_says_and_in_each_alike():
    plain, others = TrainRow([1, 2], [False, True]), [TrainRow([1, i, 2], [False, False, True]) for i in range(3)]
    row = TrainRow([1, 9, 2], [False, False, True], reworded=[*others, TrainRow(list(range(40)), [False] * 39 + [True])])
    rng = np.random.default_rng(3)
    seen = Counter(tuple(asked_otherwise(row, 32, rng).ids) for _ in range(3000))
    assert set(seen) == {(1, 9, 2), (1, 0, 2), (1, 1, 2), (1, 2, 2)}, "what is longer than the context is left out"
    assert seen[1, 9, 2] / 3000 == pytest.approx(1 - REWORDED, abs=4 * 0.008)
    assert all(seen[1, i, 2] / 3000 == pytest.approx(REWORDED / 3, abs=4 * 0.008) for i in range(3))
    state = rng.bit_generator.state
    assert asked_otherwise(plain, 32, rng) is plain and rng.bit_generator.state == state, (
        "no draw: other nights stay as they are"
    )
