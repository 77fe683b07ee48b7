"""Rows that a model writes itself: what it might be asked, drawn from its own distribution, and what it answers.

Generative replay: a model that has learned to predict questions as well as answers can rehearse what no store has kept. Where
some were kept, questions begin like those and are drawn from there on: they are near what was really asked, and about all of
it alike. Many rows are written at once; where one is done, the next begins in its place.

What a night learns must not answer other questions. So yesterday's model also writes rows near tonight's, which begin like
those and soon go elsewhere, and answers them as it did.

Source:
    Sun, Ho & Lee 2020, "LAMOL: LAnguage MOdeling for Lifelong Language Learning".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .session import Engine, F32Array

MAX_ASKED, MAX_ANSWER = 48, 32  # tokens; a longer question is given up, a longer answer is cut
MAX_NEAR_ANSWER = 8  # of a row near tonight's: what an answer begins with decides whose it is
TEMPERATURE = 0.9
N_LIKELY = 8
TOKENS_A_ROW = 20  # where rows are longer, fewer are written: time is what a night has little of


@dataclass
class Written:
    """A row that a model wrote: token ids without the template's.

    Attributes:
        asked: drawn at random.
        answer: greedy, with its end-of-turn token where it came to one.
        likely: for each token of the answer, the N_LIKELY likeliest tokens there with their share of the probability.
    """

    asked: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    likely: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass
class _Draft:
    """A row in the making: what it holds so far, where it is in the cache, what is to be fed next, where its answer is cut."""

    row: Written
    position: int
    feed: list[int]
    max_answer: int
    is_answering: bool = False
    is_done: bool = False
    is_given_up: bool = False


def write_rows(
    engine: Engine,
    before: Sequence[int],
    after: Sequence[int],
    n: int,
    seed: int,
    kept: Sequence[Sequence[int]] = (),
    is_near: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Written]:
    """Return at most n rows that the engine's model writes: fewer where they are long, or what it asks comes to no end.

    Args:
        before, after: the template's ids around what a user says in a first turn; the first of `after` ends the turn.
        seed: decides what is asked; the same seed, model and thread count write the same rows.
        kept: ids of questions that were really asked; each row begins like one of them, in turn. Where one is empty, or there
            are none, all of a question is drawn.
        is_near: whether rows begin with a token to half of a kept question, instead of half or more, and none is one of them;
            without a question there are none.

    Raises:
        EngineError: llama.cpp failed.
    """
    if is_near:
        kept = [question for question in kept if question]
    max_answer = MAX_NEAR_ANSWER if is_near else MAX_ANSWER
    n_slots = min(engine.n_seq, (engine.n_ctx - len(before)) // (MAX_ASKED + len(after) + max_answer))
    if n_slots < 1 or not before or not after or (is_near and not kept):
        return []
    rng = np.random.default_rng(seed)
    engine.clear()
    engine.feed(before[:-1], 0, engine.n_seq)
    beginnings, own = _beginnings(kept, is_near, rng), {tuple(question) for question in kept} if is_near else set()
    drafts: dict[int, _Draft] = {}
    out: list[Written] = []
    n_begun = n_tokens = 0
    while True:
        for slot in range(n_slots):
            is_wanted = len(out) + len(drafts) < n and n_begun < 2 * n and n_tokens < TOKENS_A_ROW * n
            if is_wanted and slot not in drafts:
                engine.copy_prefix(engine.n_seq, slot, len(before) - 1)
                begun = next(beginnings)
                drafts[slot] = _Draft(Written(begun), len(before) - 1, [before[-1], *begun], max_answer)
                n_begun += 1
        if not drafts:
            return out
        _advance(engine, drafts, after, rng)
        n_tokens += len(drafts)
        for slot in [slot for slot, draft in drafts.items() if draft.is_done or draft.is_given_up]:
            draft = drafts.pop(slot)
            engine.forget_from(slot, 0)
            if draft.is_done and tuple(draft.row.asked) not in own:
                out.append(draft.row)
        progress(len(out), n)


def _beginnings(kept: Sequence[Sequence[int]], is_near: bool, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield what the next question begins with: half of a kept one or more (near it: or less), each as often as any other."""
    turns: list[int] = []
    while True:
        turns = turns or rng.permutation(len(kept)).tolist()
        question = list(kept[turns.pop()][: MAX_ASKED - 1]) if turns else []
        half = len(question) // 2
        least, most = (1, max(half, 1) + 1) if is_near else (half, len(question))
        yield question[: rng.integers(least, most)] if question else []


def _advance(engine: Engine, drafts: dict[int, _Draft], after: Sequence[int], rng: np.random.Generator) -> None:
    """Feed every draft's next tokens and let it take what the model says then."""
    items = []
    for slot, draft in drafts.items():
        last = len(draft.feed) - 1
        items += [(token, draft.position + i, slot, i == last) for i, token in enumerate(draft.feed)]
        draft.position += len(draft.feed)
    waiting = iter(drafts.values())
    for first in range(0, len(items), engine.n_batch):
        for logits in engine.forward(items[first : first + engine.n_batch]):
            _take(next(waiting), logits, engine.vocab.is_end, after, rng)


def _take(
    draft: _Draft, logits: F32Array, is_end: Callable[[int], bool], after: Sequence[int], rng: np.random.Generator
) -> None:
    """Go on with a draft by one token: the greedy one of an answer, a drawn one of a question."""
    row = draft.row
    if draft.is_answering:
        token = int(logits.argmax())
        row.answer.append(token)
        row.likely.append(_likely(logits))
        draft.is_done = is_end(token) or len(row.answer) == draft.max_answer
        draft.feed = [token]
        return
    token = drawn(logits, TEMPERATURE, rng)
    if token == after[0]:
        draft.is_answering, draft.feed, draft.is_given_up = True, list(after), not row.asked
    else:
        row.asked.append(token)
        draft.feed, draft.is_given_up = [token], is_end(token) or len(row.asked) == MAX_ASKED


def drawn(logits: F32Array, temperature: float, rng: np.random.Generator) -> int:
    """Return a token drawn from the distribution that logits (V,) give at a temperature."""
    mass = np.cumsum(np.exp((logits - logits.max()) / temperature), dtype=np.float64)
    return int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))


def _likely(logits: F32Array) -> list[tuple[int, float]]:
    """Return the likeliest tokens with their probabilities, which are made to sum to 1."""
    top = np.argpartition(logits, -N_LIKELY)[-N_LIKELY:]
    shares = np.exp(logits[top].astype(np.float64) - logits[top].max())
    return [(int(token), float(share)) for token, share in zip(top, shares / shares.sum(), strict=True)]
