"""What a night is judged by: greedy answers and answer loss.

Exact and cheap at once. All rows of a group go through llama.cpp together, behind a prefix that is computed once; one
forward pass over prompt + wanted answer gives the answer loss, and tells which rows greedy decoding would answer word
for word (every wanted token is the arg max). Only the other rows are then really decoded, from the first token at which
they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..data import common_length
from .session import Engine, F32Array

EXTRA_TOKENS = 12  # of an answer that must be the wanted one: enough to see that it is not
FREE_TOKENS = 128  # of one that its number or its tests judge: a program or a way to a number may be longer than the wanted


@dataclass(frozen=True)
class Row:
    """One thing to score.

    Attributes:
        prompt: token ids, template included, up to where the assistant begins.
        answer: token ids of the wanted answer, its end-of-turn token included.
        extra_tokens: another answer is cut when it is this much longer than the wanted one.
    """

    prompt: list[int]
    answer: list[int]
    extra_tokens: int = EXTRA_TOKENS


@dataclass(frozen=True)
class RowScore:
    """How a model did on one row.

    Attributes:
        text: the greedy answer, its indentation included.
        loss_nats: mean negative log-likelihood of the wanted answer's tokens.
        n_tokens: how many tokens the wanted answer has.
    """

    text: str
    loss_nats: float
    n_tokens: int


def fitted(row: Row, n_ctx: int, is_free: bool = False) -> Row:
    """Return a row that a context of n_ctx tokens holds: cut on the left of its prompt, as in training, then on the right.

    Args:
        is_free: an answer in other words may be right, and is given room for them where the prompt leaves it.
    """
    n_answer = min(len(row.answer), n_ctx - EXTRA_TOKENS - 1)
    prompt = row.prompt[n_answer + EXTRA_TOKENS - n_ctx :]
    n_extra = FREE_TOKENS if is_free else EXTRA_TOKENS
    return Row(prompt, row.answer[:n_answer], min(n_extra, n_ctx - len(prompt) - n_answer))


def score(engine: Engine, rows: Sequence[Row]) -> Iterator[RowScore]:
    """Yield the greedy answer and answer loss of every row, in order; the engine is busy until the last one.

    Raises:
        EngineError: a row does not fit into the context.
    """
    prompts = [row.prompt for row in rows]
    shared = max(0, min(common_length(prompts), min(map(len, prompts), default=0) - 1))
    engine.clear()
    engine.feed(rows[0].prompt[:shared] if rows else [], 0, engine.n_seq)
    group: list[Row] = []
    n_cells = shared
    for row in rows:
        cells = len(row.prompt) - shared + len(row.answer) + row.extra_tokens
        if group and (len(group) == engine.n_seq or n_cells + cells > engine.n_ctx):
            yield from _score_group(engine, group, shared)
            group, n_cells = [], shared
        group.append(row)
        n_cells += cells
    if group:
        yield from _score_group(engine, group, shared)


def _score_group(engine: Engine, group: list[Row], shared: int) -> list[RowScore]:
    items = []  # all after the shared prefix; the last answer token predicts nothing we need
    for sequence, row in enumerate(group):
        engine.copy_prefix(engine.n_seq, sequence, shared)
        tokens = row.prompt[shared:] + row.answer[:-1]
        first_wanted = len(row.prompt) - shared - 1
        items += [(t, shared + i, sequence, i >= first_wanted) for i, t in enumerate(tokens)]
    losses: list[list[float]] = [[] for _ in group]
    best: list[list[int]] = [[] for _ in group]
    for first in range(0, len(items), engine.n_batch):
        chunk = items[first : first + engine.n_batch]
        wanted = [item[2] for item in chunk if item[3]]
        for sequence, logits in zip(wanted, engine.forward(chunk), strict=True):
            target = group[sequence].answer[len(losses[sequence])]
            losses[sequence].append(_negative_log_likelihood(logits, target))
            best[sequence].append(int(logits.argmax()))
    answers = _finish_wrong(engine, group, best)
    for sequence in range(len(group)):
        engine.forget_from(sequence, 0)
    return [
        RowScore(engine.vocab.text_of(answer, is_indented=True), float(np.mean(loss)), len(loss))
        for answer, loss in zip(answers, losses, strict=True)
    ]


def _finish_wrong(engine: Engine, group: list[Row], best: list[list[int]]) -> list[list[int]]:
    """Return every row's greedy answer, decoding on from the first token where it leaves the wanted one."""
    answers = []
    active = []
    for sequence, (row, choice) in enumerate(zip(group, best, strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(row.answer, choice, strict=True)) if a != b), len(choice))
        answers.append(choice[: same + 1])
        if same < len(choice):
            engine.forget_from(sequence, len(row.prompt) + same)
            active.append(sequence)
    most = [len(row.answer) + row.extra_tokens for row in group]
    while active := [s for s in active if len(answers[s]) < most[s] and not engine.vocab.is_end(answers[s][-1])]:
        items = [(answers[s][-1], len(group[s].prompt) + len(answers[s]) - 1, s, True) for s in active]
        for sequence, logits in zip(active, engine.forward(items), strict=True):
            answers[sequence].append(int(logits.argmax()))
    return answers


def _negative_log_likelihood(logits: F32Array, target: int) -> float:
    top = float(logits.max())
    return top + float(np.log(np.exp(logits - top).sum(dtype=np.float64))) - float(logits[target])
