"""Rows that models write themselves: what a night's users might ask, drawn by its asker, and what its generation answers.

Generative replay: what no store has kept can be rehearsed if one model says what was asked and another what is answered. Many
rows are written at once; where one is done, the next begins in its place.

What a night learns must not answer other questions. So yesterday's model also writes rows near tonight's, which begin like
those and soon go elsewhere, and answers them as it did.

Source:
    Shin et al. 2017, "Continual Learning with Deep Generative Replay": a generator and a solver.
    Vilnis et al. 2023, "Arithmetic Sampling": rows that are drawn evenly.
    Hewitt, Manning, Liang 2022, "Truncation Sampling as Language Model Desmoothing": which tokens are never drawn.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .session import Engine, F32Array

F64Array = NDArray[np.float64]

MAX_ASKED, MAX_ANSWER = 48, 32  # tokens; a longer question is given up, a longer answer is cut
MAX_NEAR_ANSWER = 8  # of a row near tonight's: what an answer begins with decides whose it is
UNLIKELY = 0.01  # at most: a token of a smaller share is not drawn, nor, where many may follow, one of a much smaller one
GOLDEN = (5**0.5 - 1) / 2
FRESH = 1e-6  # of a place in [0, 1) is new with each token: what a float says of it is used up after a dozen
N_LIKELY = 8
TOKENS_A_ROW = 32  # where rows are longer, fewer are written: time is what a night has little of
ASKING = 1 / 2  # of these tokens, and of the time, are for questions, at most


@dataclass
class Written:
    """A row that a model wrote: token ids without the template's.

    Attributes:
        asked: drawn at random, but evenly: rows of one call are as different as the model's distribution allows.
        answer: greedy, with its end-of-turn token where it came to one.
        likely: for each token of the answer, the N_LIKELY likeliest tokens there with their share of the probability.
    """

    asked: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    likely: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass
class _Draft:
    """A row in the making: what it holds so far, where it is in the cache, what is to be fed next, where its question lies."""

    row: Written
    position: int
    feed: list[int]
    place: float | None = None
    is_done: bool = False
    is_given_up: bool = False


_Take = Callable[[_Draft, F32Array], None]  # lets a draft go on by one token, as the logits (V,) after its last one say


def write_rows(
    engine: Engine,
    before: Sequence[int],
    after: Sequence[int],
    n: int,
    seed: int,
    near: Sequence[Sequence[int]] = (),
    then: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seconds: float = math.inf,
) -> list[Written]:
    """Return at most n rows that the engine's model writes: fewer where they are long, or what it asks comes to no end.

    What is asked more than once is answered once, and is in the list as often as it was asked.

    Args:
        before, after: the template's ids around what a user says in a first turn; the first of `after` ends the turn.
        seed: decides what is asked; the same seed, model and thread count write the same rows.
        near: ids of questions; each row begins with a token to half of one of them, in turn, and is none of them.
        then: called when everything is asked and nothing answered: another adapter may answer than asks.
        seconds: no row is begun later; half of the time is for asking.

    Raises:
        EngineError: llama.cpp failed.
    """
    own, max_answer = {tuple(question) for question in near}, MAX_NEAR_ANSWER if near else MAX_ANSWER
    n_slots = min(engine.n_seq, (engine.n_ctx - len(before)) // (MAX_ASKED + len(after) + max_answer))
    if n_slots < 1 or not before or not after:
        return []
    rng, is_end = np.random.default_rng(seed), engine.vocab.is_end
    places = _evenly(rng.random())

    def ask(draft: _Draft, logits: F32Array) -> None:
        place, asked = next(places) if draft.place is None else draft.place, draft.row.asked
        token, place = drawn(likely_enough(softmax(logits)), place)
        draft.place = (1 - FRESH) * place + FRESH * rng.random()
        if token == after[0]:
            draft.is_done, draft.is_given_up = True, not asked or tuple(asked) in own
        else:
            asked.append(token)
            draft.feed, draft.is_given_up = [token], is_end(token) or len(asked) == MAX_ASKED

    def answer(draft: _Draft, logits: F32Array) -> None:
        token, row = int(logits.argmax()), draft.row
        row.answer.append(token)
        row.likely.append(_likely(logits))
        draft.feed, draft.is_done = [token], is_end(token) or len(row.answer) == max_answer

    began, through = time.monotonic(), _Through(engine, before, n_slots)
    begun = map(Written, itertools.islice(_beginnings(near, rng), 2 * n))
    n_tokens, until = int(ASKING * TOKENS_A_ROW * n), began + ASKING * seconds
    asked, n_taken = through.take(begun, [], n, n_tokens, until, ask, lambda done: progress(done // 2, n))
    then()
    questions, n_left = {tuple(row.asked): row for row in asked}, TOKENS_A_ROW * n - n_taken
    rows, _ = through.take(
        iter(questions.values()), after, n, n_left, began + seconds, answer,
        lambda done: progress((len(asked) + done) // 2, n),
    )  # fmt: skip
    answered = {tuple(row.asked): row for row in rows}
    return [answered[question] for row in asked if (question := tuple(row.asked)) in answered]


def _beginnings(near: Sequence[Sequence[int]], rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield what the next question begins with: a token to half of one that it is near to, each as often as any other."""
    turns: list[int] = []
    while True:
        turns = turns or rng.permutation(len(near)).tolist()
        question = list(near[turns.pop()]) if turns else []
        yield question[: rng.integers(1, max(min(len(question), MAX_ASKED - 1) // 2, 1) + 1)]


@dataclass
class _Through:
    """Rows on their way through a model, in the slots of its cache, all behind the same tokens."""

    engine: Engine
    before: Sequence[int]
    n_slots: int

    def take(
        self,
        rows: Iterator[Written],
        after: Sequence[int],
        n: int,
        n_tokens: int,
        until: float,
        go_on: _Take,
        said: Callable[[int], None],
    ) -> tuple[list[Written], int]:
        """Return the first n rows that come to an end, and how many tokens they took; none begins after `n_tokens`.

        Args:
            after: what a row's question is followed by.
            until: none begins after this time of the monotonic clock either.
        """
        engine, drafts, out, n_taken = self.engine, dict[int, _Draft](), list[Written](), 0
        engine.clear()
        engine.feed(self.before[:-1], 0, engine.n_seq)
        while True:
            is_late = time.monotonic() > until
            for slot in range(self.n_slots):
                is_wanted = slot not in drafts and len(out) + len(drafts) < n and n_taken < n_tokens and not is_late
                if is_wanted and (row := next(rows, None)) is not None:
                    engine.copy_prefix(engine.n_seq, slot, len(self.before) - 1)
                    drafts[slot] = _Draft(row, len(self.before) - 1, [self.before[-1], *row.asked, *after])
            if not drafts:
                return out, n_taken
            self._advance(drafts, go_on)
            n_taken += len(drafts)
            for slot in [slot for slot, draft in drafts.items() if draft.is_done or draft.is_given_up]:
                draft = drafts.pop(slot)
                engine.forget_from(slot, 0)
                if not draft.is_given_up:
                    out.append(draft.row)
            said(len(out))

    def _advance(self, drafts: dict[int, _Draft], go_on: _Take) -> None:
        """Feed every draft's next tokens and let it go on."""
        items = []
        for slot, draft in drafts.items():
            last = len(draft.feed) - 1
            items += [(token, draft.position + i, slot, i == last) for i, token in enumerate(draft.feed)]
            draft.position += len(draft.feed)
        waiting = iter(drafts.values())
        for first in range(0, len(items), self.engine.n_batch):
            for logits in self.engine.forward(items[first : first + self.engine.n_batch]):
                go_on(next(waiting), logits)


def _evenly(start: float) -> Iterator[float]:
    """Yield places in [0, 1) of which any number in a row lie evenly."""
    return ((start + i * GOLDEN) % 1 for i in itertools.count())


def softmax(logits: F32Array, temperature: float = 1.0) -> F64Array:
    """Return each token's share (V,) of the probability that logits (V,) give at a temperature."""
    mass = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return np.asarray(mass / mass.sum())


def likely_enough(shares: F64Array) -> F64Array:
    """Return shares (V,) without those of unlikely tokens: small ones, the smaller the less sure it is what follows."""
    sure = np.exp(np.sum(shares * np.log(np.maximum(shares, 1e-30))))  # 1 where one token may follow, 1 / n where n may
    least = min(UNLIKELY, UNLIKELY**0.5 * sure, shares.max())
    return np.where(shares < least, 0.0, shares)


def drawn(shares: F64Array, place: float) -> tuple[int, float]:
    """Return the token in whose part of [0, 1) a place lies, and the place within that part; shares (V,) need not sum to 1."""
    ends = np.cumsum(shares)
    at = min(place * ends[-1], np.nextafter(ends[-1], 0.0))
    token = int(np.searchsorted(ends, at, side="right"))
    within = (at - (ends[token] - shares[token])) / shares[token]
    return token, min(max(float(within), 0.0), 1.0)


def _likely(logits: F32Array) -> list[tuple[int, float]]:
    """Return the likeliest tokens with their probabilities, which are made to sum to 1."""
    top = np.argpartition(logits, -N_LIKELY)[-N_LIKELY:]
    return [(int(token), float(share)) for token, share in zip(top, softmax(logits[top]), strict=True)]
