"""Questions in other words, by the real model: what is kept means the same, and is sorted by how surely it does."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgecl.engine import Engine, reword
from edgecl.engine.rewording import ASKED, HEAD, MAX_LOSS_NATS, N_OTHERS, OTHERWISE
from edgecl.places import find_model
from edgecl_convert import GgufFile, merge

QUESTIONS = ["How often does the lemon tree get water?", "What time does the ferry to Varga leave?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model as a night runs it to write: in INT8, which llama.cpp has kernels for many rows of."""
    path = tmp_path_factory.mktemp("model") / "copy.gguf"
    with GgufFile(find_model("smollm2")) as base:
        merge(base, None, path, "Q8_0")
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, n_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def found(engine: Engine) -> list[list[str]]:
    return reword(engine, QUESTIONS, seed=1)


def test_other_words_are_of_the_same_thing(found: list[list[str]]) -> None:
    for question, others, subject in zip(QUESTIONS, found, ("lemon tree", "ferry"), strict=True):
        assert 2 <= len(others) <= N_OTHERS == 8
        assert len({other.casefold() for other in [question, *others]}) == 1 + len(others)
        assert sum(subject in other for other in others) >= 0.7 * len(others)
        assert all(other == other.strip() and "\n" not in other for other in others)


def test_the_surest_come_first(engine: Engine, found: list[list[str]]) -> None:
    encode = engine.vocab.encode
    for question, others in zip(QUESTIONS, found, strict=True):
        losses, wanted = [], encode(f" {question}\n")
        for other in others:
            prompt = encode(HEAD) + encode(f"{ASKED}{other}{OTHERWISE}")
            logits = engine.logits(prompt + wanted[:-1]).astype(np.float64)[len(prompt) - 1 :]
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            losses.append(-log_p[np.arange(len(wanted)), wanted].mean())
        assert np.diff(losses).min() > -0.1 and losses[-1] < MAX_LOSS_NATS + 0.1, losses  # llama.cpp's kernels differ by shape


def test_seed_decides(engine: Engine, found: list[list[str]]) -> None:
    assert reword(engine, QUESTIONS, seed=1) == found != reword(engine, QUESTIONS, seed=2)


def test_what_is_no_question_of_one_line_has_none(model: Path, engine: Engine, found: list[list[str]]) -> None:
    seen: list[tuple[int, int]] = []
    odd = ["", "two\nlines?", "Why? " * 60]
    assert reword(engine, odd, 1) == [[], [], []] and reword(engine, [], 1) == []
    assert reword(engine, QUESTIONS, 1, seconds=0.0) == [[], []]
    assert reword(engine, ["", *QUESTIONS], 1, lambda *at: seen.append(at)) == [[], *found]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with Engine(model, n_ctx=256, n_threads=1) as small:
        assert reword(small, QUESTIONS, 1) == [[], []]


def test_a_smaller_context_draws_fewer(model: Path) -> None:
    with Engine(model, n_ctx=512, n_batch=64, n_threads=1) as small:
        found = [reword(small, QUESTIONS[:1], seed)[0] for seed in (1, 2, 3)]
    assert sum(map(bool, found)) >= 2, (
        "of the few that are drawn none may be good enough, which is up to the CPU's rounding too"
    )
    assert all("tree" in other for others in found for other in others[:2])


def test_numbers_stay_and_no_wording_is_another_of_tonights_questions(engine: Engine) -> None:
    question = "Who lives in number 14?"
    (others,) = reword(engine, [question], 2)
    assert others and all("14" in other for other in others)
    again = reword(engine, [question, others[0].upper()], 2)
    assert others[0] not in again[0] and set(others[1:]) <= set(again[0])
