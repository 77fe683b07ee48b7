"""Questions in other words: what a correction is trained on beside its own wording.

A small model learns a sentence, not what is meant: asked otherwise it does not know the answer. But it can say itself how else
one may ask, shown a few examples. Of what it draws, those are kept from which it would best come back to the question.

Source:
    Back-translation as a measure of sense, without a second language; few-shot prompting (Brown et al. 2020).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from .scoring import Row, score
from .session import Engine
from .writing import MAX_ASKED, drawn, softmax

SHOTS = (
    ("Where is the dog's leash?", "In which place can I find the leash of the dog?"),
    ("Who paid for the concert tickets?", "Which person bought the tickets for the concert?"),
    ("Write the command that stops the web server.", "How do I stop the web server from the shell?"),
    ("When does the library close on Fridays?", "At what time on Fridays is the library closed?"),
    ("What is the name of our accountant?", "How is our accountant called?"),
    ("How many eggs go into the cake?", "What number of eggs does the cake need?"),
)
ASKED, OTHERWISE = "Question: ", "\nIn other words:"
HEAD = "Each line has a question, and the same question in other words.\n\n" + "".join(
    f"{ASKED}{one}{OTHERWISE} {other}\n\n" for one, other in SHOTS
)
TEMPERATURE, N_OTHERS = 0.8, 8
MAX_LOSS_NATS = 1.8  # per token of the question, given other words for it: above, they mostly mean something else


def reword(
    engine: Engine,
    questions: Sequence[str],
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seconds: float = math.inf,
) -> list[list[str]]:
    """Return for each question at most N_OTHERS that mean the same, the surest first.

    Args:
        questions: of one line; empty ones, others, those of more than MAX_ASKED tokens, and all where the context is too small
            for the examples have none.
        seed: decides what is drawn; the same seed, model and thread count find the same.
        seconds: questions that are not begun by then have none.

    Raises:
        EngineError: llama.cpp failed.
    """
    until, rng, encode = time.monotonic() + seconds, np.random.default_rng(seed), engine.vocab.encode
    head = engine.vocab.with_bos(encode(HEAD))
    asking, wanted = ([encode(text) for text in texts] for texts in (map(_asking, questions), (f" {q}\n" for q in questions)))
    n_seq = min(engine.n_seq, (engine.n_ctx - len(head)) // MAX_ASKED - 2)
    fit = [bool(q) and "\n" not in q and len(ids) <= MAX_ASKED for q, ids in zip(questions, asking, strict=True)]
    if n_seq < 1 or not any(fit):
        return [[] for _ in questions]
    own = {question.casefold() for question in questions}
    engine.clear()
    engine.feed(head, 0, engine.n_seq)
    others: list[list[str]] = []
    for question, prompt, fits in zip(questions, asking, fit, strict=True):
        drawn_ones = _draw(engine, n_seq, len(head), prompt, rng) if fits and time.monotonic() < until else []
        alike = dict.fromkeys(other for other in drawn_ones if _numbers(other) == _numbers(question))
        others.append([other for other in alike if other.casefold() not in own])
        progress(len(others), len(questions))
    back = [Row(head + encode(_asking(other)), wanted[i], 0) for i, found in enumerate(others) for other in found]
    losses = [scored.loss_nats for scored in score(engine, back)]
    out = []
    for found in others:
        mine, losses = losses[: len(found)], losses[len(found) :]
        sure = sorted((loss, other) for loss, other in zip(mine, found, strict=True) if loss < MAX_LOSS_NATS)
        out.append([other for _, other in sure[:N_OTHERS]])
    return out


def _asking(question: str) -> str:
    return f"{ASKED}{question}{OTHERWISE}"


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


def _draw(engine: Engine, n_seq: int, n_head: int, prompt: Sequence[int], rng: np.random.Generator) -> list[str]:
    """Return what the model says behind `prompt` up to the end of the line, drawn once in each of n_seq sequences."""
    first = n_head + len(prompt) - 1
    engine.copy_prefix(engine.n_seq, 0, n_head)
    engine.feed(prompt[:-1], n_head, 0)
    for sequence in range(1, n_seq):
        engine.copy_prefix(0, sequence, first)
    tokens, lines = dict.fromkeys(range(n_seq), prompt[-1]), [b""] * n_seq
    for position in range(first, first + MAX_ASKED):
        logits = engine.forward([(token, position, sequence, True) for sequence, token in tokens.items()])
        for sequence, x in zip(list(tokens), logits, strict=True):
            tokens[sequence] = drawn(softmax(x, TEMPERATURE), rng.random())[0]
            lines[sequence] += engine.vocab.piece(tokens[sequence])
            if b"\n" in lines[sequence] or engine.vocab.is_end(tokens[sequence]):
                del tokens[sequence]
        if not tokens:
            break
    for sequence in range(n_seq):
        engine.forget_from(sequence, 0)
    texts = (line.split(b"\n")[0].decode("utf-8", "replace").strip() for line in lines if b"\n" in line)
    return [text for text in texts if text]
