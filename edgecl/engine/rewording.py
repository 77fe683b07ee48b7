"""Questions in other words: what a correction is trained on beside its own wording.

A small model learns a sentence, not what is meant: asked otherwise it does not know the answer. But it can say itself how else
one may ask, shown a few examples. Of what it draws, those are kept from which it would best come back to the question.

Source:
    Back-translation as a measure of sense, without a second language; few-shot prompting (Brown et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .scoring import negative_log_likelihood
from .session import Engine
from .writing import MAX_ASKED, drawn

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
    engine: Engine, questions: Sequence[str], seed: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[list[str]]:
    """Return for each question at most N_OTHERS that mean the same, the surest first.

    Args:
        questions: of one line; empty ones, others, and those of more than MAX_ASKED tokens have none.
        seed: decides what is drawn; the same seed, model and thread count find the same.

    Raises:
        EngineError: llama.cpp failed.
    """
    rng = np.random.default_rng(seed)
    head = engine.vocab.encode(HEAD)
    engine.clear()
    engine.feed(head, 0, engine.n_seq)
    out: list[list[str]] = []
    for question in questions:
        wanted = engine.vocab.encode(f" {question}\n")
        fits = len(head) + (engine.n_seq + 2) * MAX_ASKED <= engine.n_ctx and engine.n_batch >= 2 * MAX_ASKED + 16
        found: dict[str, float] = {}
        if fits and question and "\n" not in question and len(wanted) <= MAX_ASKED:
            for other in dict.fromkeys(_draw(engine, len(head), _asking(engine, question), rng)):
                if other.casefold() != question.casefold():
                    found[other] = _loss(engine, len(head), _asking(engine, other), wanted)
        sure = sorted((other for other in found if found[other] < MAX_LOSS_NATS), key=found.__getitem__)
        out.append(sure[:N_OTHERS])
        progress(len(out), len(questions))
    return out


def _asking(engine: Engine, question: str) -> list[int]:
    return engine.vocab.encode(f"{ASKED}{question}{OTHERWISE}")


def _draw(engine: Engine, n_head: int, prompt: Sequence[int], rng: np.random.Generator) -> list[str]:
    """Return what the model says behind `prompt` up to the end of the line, drawn once in each sequence."""
    first = n_head + len(prompt) - 1
    engine.copy_prefix(engine.n_seq, 0, n_head)
    engine.feed(prompt[:-1], n_head, 0)
    for sequence in range(1, engine.n_seq):
        engine.copy_prefix(0, sequence, first)
    tokens, lines = dict.fromkeys(range(engine.n_seq), prompt[-1]), [b""] * engine.n_seq
    for position in range(first, first + MAX_ASKED):
        logits = engine.forward([(token, position, sequence, True) for sequence, token in tokens.items()])
        for sequence, x in zip(list(tokens), logits, strict=True):
            tokens[sequence] = drawn(x, TEMPERATURE, rng)
            lines[sequence] += engine.vocab.piece(tokens[sequence])
            if b"\n" in lines[sequence] or engine.vocab.is_end(tokens[sequence]):
                del tokens[sequence]
        if not tokens:
            break
    for sequence in range(engine.n_seq):
        engine.forget_from(sequence, 0)
    texts = (line.split(b"\n")[0].decode("utf-8", "replace").strip() for line in lines if b"\n" in line)
    return [text for text in texts if text]


def _loss(engine: Engine, n_head: int, prompt: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the mean nats of the tokens `wanted` behind `prompt`."""
    engine.copy_prefix(engine.n_seq, 0, n_head)
    tokens = [*prompt, *wanted[:-1]]
    logits = engine.forward([(token, n_head + i, 0, i >= len(prompt) - 1) for i, token in enumerate(tokens)])
    loss = np.mean([negative_log_likelihood(x, token) for x, token in zip(logits, wanted, strict=True)])
    engine.forget_from(0, 0)
    return float(loss)
