"""Rows that a model writes itself: questions drawn from its distribution, greedy answers, however many are made at once."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import END, START, Tiny, random_adapter, random_tokens, torch_model, write_model

from edgecl.engine import GGML_TYPE_F32, Engine, write_rows
from edgecl.engine.writing import (
    MAX_ANSWER,
    MAX_ASKED,
    MAX_NEAR_ANSWER,
    N_LIKELY,
    TOKENS_A_ROW,
    _beginnings,
    drawn,
    likely_enough,
    softmax,
)
from edgecl_convert import GgufFile, write_gguf_adapter

BEFORE = [START, *random_tokens(8, seed=60)]
AFTER = [END, *random_tokens(3, seed=61)]


def open_engine(path, **options) -> Engine:
    return Engine(path, **{"n_ctx": 1024, "n_threads": 1, "kv_type": GGML_TYPE_F32} | options)


def write_talker(path, scale: float, end: float):
    """Write a model with another head: all of its rows scaled, that of <|im_end|> once more."""
    tiny = Tiny()
    model = torch_model(tiny)
    with torch.no_grad():
        model.lm_head.weight *= scale
        model.lm_head.weight[END] *= end
    return write_model(path, model, tiny)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that ends its turns after some tokens."""
    return write_talker(tmp_path_factory.mktemp("writing") / "talker.gguf", 0.5, 8)


@pytest.mark.parametrize("n_seq", [1, 5, 16])
def test_answers_are_those_of_plain_greedy_decoding(talker, n_seq):
    with open_engine(talker, n_seq=n_seq) as engine:
        rows = write_rows(engine, BEFORE, AFTER, 12, 1)
        assert len(rows) == 12
        for row in rows:
            assert 0 < len(row.asked) < MAX_ASKED and END not in row.asked
            prompt = BEFORE + row.asked + AFTER
            plain = list(engine.generate(prompt, MAX_ANSWER))
            assert row.answer == (plain if len(plain) == MAX_ANSWER else [*plain, END])
            logits = engine.logits(prompt + row.answer[:-1]).astype(np.float64)[len(prompt) - 1 :]
            for choices, token, x in zip(row.likely, row.answer, logits, strict=True):
                top = np.argsort(x)[-N_LIKELY:]
                shares = np.exp(x[top] - x.max()) / np.exp(x[top] - x.max()).sum()
                assert dict(choices) == pytest.approx(dict(zip(top.tolist(), shares, strict=True)), abs=1e-3)
                assert max(choices, key=lambda choice: choice[1])[0] == token
    assert any(END in row.answer for row in rows)
    assert len({tuple(row.asked) for row in rows}) > 6


def test_seed_decides(talker):
    with open_engine(talker) as engine:
        one, again, other = (write_rows(engine, BEFORE, AFTER, 6, seed) for seed in (1, 1, 2))
    assert one == again != other


def test_questions_are_drawn_evenly_from_the_models_distribution(tmp_path):
    with open_engine(write_talker(tmp_path / "brief.gguf", 1, 8)) as engine:
        rows = write_rows(engine, BEFORE, AFTER, 300, seed=3)
        assert len({id(row) for row in rows}) == len({tuple(row.asked) for row in rows}) < len(rows) == 300, "answered once"
        firsts = Counter(row.asked[0] for row in rows)
        shares = likely_enough(softmax(engine.logits(BEFORE)[-1]))
        shares[END] = 0  # an empty question is given up, and another takes its place
        first = int(shares.argmax())
        seconds = Counter(row.asked[1] if len(row.asked) > 1 else END for row in rows if row.asked[0] == first)
        following = likely_enough(softmax(engine.logits([*BEFORE, first])[-1]))
    for seen, expected in ((firsts, shares), (seconds, following)):
        expected = expected / expected.sum() * seen.total()
        assert {token for token in range(len(expected)) if not expected[token]}.isdisjoint(seen)
        errors = [abs(seen[token] - expected[token]) for token in np.argsort(expected)[-5:]]
        assert seen.total() > 40 and max(errors) <= 2, errors  # at random, off by the root of the number: 5 and more


@given(
    logits=arrays(np.float32, 9, elements=st.floats(-60, 60, width=32)),
    place=st.floats(0, 1) | st.sampled_from([0.0, math.nextafter(1, 0), 1.0]),
)
def test_what_is_drawn_is_likely_enough_and_its_place_within_it(logits, place):
    shares = likely_enough(softmax(logits))
    token, within = drawn(shares, place)
    assert shares[token] > 0 and 0 <= within <= 1
    assert shares[int(logits.argmax())] > 0
    before = shares[:token].sum() / shares.sum()
    assert before + within * shares[token] / shares.sum() == pytest.approx(place, abs=1e-9)


def test_where_one_token_is_sure_others_are_not_drawn_and_where_many_may_follow_they_are():
    sure, open_ended = np.full(1000, 1e-5), np.full(1000, 1e-3)
    sure[3] = 1 - 999e-5
    assert np.flatnonzero(likely_enough(sure)).tolist() == [3]
    assert np.count_nonzero(likely_enough(open_ended)) == 1000


def test_who_answers_may_be_another_than_who_asks(talker, tmp_path):
    adapter = tmp_path / "adapter.gguf"
    with GgufFile(talker) as base:
        write_gguf_adapter(adapter, random_adapter(base, size=1.0))
    with open_engine(talker, n_batch=16) as engine:  # less than all questions together
        rows = write_rows(engine, BEFORE, AFTER, 12, 1, then=lambda: engine.set_adapter(adapter))
        plain = [list(engine.generate(BEFORE + row.asked + AFTER, MAX_ANSWER)) for row in rows]
        engine.set_adapter(None)
        alone = write_rows(engine, BEFORE, AFTER, 12, 1)
    asked = [sorted(row.asked for row in written) for written in (rows, alone)]
    assert asked[0] == asked[1] and len(rows) == 12
    assert [[token for token in row.answer if token != END] for row in rows] == plain
    assert sorted(row.answer for row in rows) != sorted(row.answer for row in alone)


def test_long_rows_are_fewer(tmp_path):
    with open_engine(write_talker(tmp_path / "long.gguf", 0.5, 4), n_seq=4) as engine:
        rows = write_rows(engine, BEFORE, AFTER, 40, seed=5)
    n_tokens = sum(len(row.asked) + len(row.answer) for row in rows)
    assert 0 < len(rows) < 40 and n_tokens < 40 * TOKENS_A_ROW + 4 * (MAX_ASKED + MAX_ANSWER)


def test_questions_without_an_end_are_given_up(tmp_path):
    with open_engine(write_talker(tmp_path / "talks on.gguf", 5, 0)) as engine:
        done = []
        assert write_rows(engine, BEFORE, AFTER, 3, 1, progress=lambda *where: done.append(where)) == []
    assert done[-1] == (0, 3)


def test_what_cannot_be_written_is_not(talker):
    with open_engine(talker, n_ctx=64) as engine:  # smaller than a row may be
        assert write_rows(engine, BEFORE, AFTER, 3, seed=1) == []
    with open_engine(talker) as engine:
        assert write_rows(engine, [], AFTER, 3, seed=1) == write_rows(engine, BEFORE, [], 3, seed=1) == []
        assert write_rows(engine, BEFORE, AFTER, 0, seed=1) == []


def test_rows_near_others_begin_like_them_and_are_none_of_them(tmp_path):
    kept = [random_tokens(n, seed=90 + n) for n in (1, 2, 9)]
    with open_engine(write_talker(tmp_path / "talks longer.gguf", 0.5, 6)) as engine:
        rows = write_rows(engine, BEFORE, AFTER, 200, 6, kept)
        free = write_rows(engine, BEFORE, AFTER, 200, 6)
        short = sorted({tuple(row.asked) for row in free if len(row.asked) == 1})
        near = write_rows(engine, BEFORE, AFTER, 200, 6, [list(question) for question in short])
    written = [tuple(row.asked) for row in rows]
    assert len(rows) > 150 and {question[0] for question in written} == {question[0] for question in kept}
    assert {len(row.answer) for row in rows if END not in row.answer} == {MAX_NEAR_ANSWER}
    assert max(len(row.answer) for row in rows) == MAX_NEAR_ANSWER
    assert len(short) > 3 and 100 < len(near) < 200, "some ended at once"
    assert not {tuple(row.asked) for row in near} & set(short)


def test_what_a_near_question_begins_with_is_half_of_another_at_most():
    kept = [random_tokens(n, seed=90 + n) for n in (1, 2, 9)]
    beginnings = itertools.islice(_beginnings(kept, np.random.default_rng(1)), 300)
    lengths = {question[0]: set() for question in kept}
    for begun in beginnings:
        assert begun in [question[: len(begun)] for question in kept]
        lengths[begun[0]].add(len(begun))
    assert list(lengths.values()) == [{1}, {1}, {1, 2, 3, 4}]


def test_no_row_begins_after_its_time(talker):
    with open_engine(talker) as engine:
        assert write_rows(engine, BEFORE, AFTER, 12, 1, seconds=0.0) == []
        began = time.monotonic()
        rows = write_rows(engine, BEFORE, AFTER, 100_000, 1, seconds=2.0)
        assert 0 < len(rows) < 50_000 and time.monotonic() - began < 10
        assert all(row.answer for row in rows)
