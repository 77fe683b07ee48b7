"""General ability: how a model reads a text that no night ever taught it.

Two figures of it. Nats per token say whether English became harder. The Kullback-Leibler divergence from the base says how far
the model went from it, which nats per token can hide: what one token loses another may gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .session import Engine

WINDOW, N_WINDOWS = 256, 6
N_LIKELIEST = 4096  # tokens of the base that are told apart, the rest counts as one: 50 MB, and 1% below the whole divergence


@dataclass(frozen=True)
class Likeliest:
    """What a model expects after each of n tokens.

    Attributes:
        ids: (n, K) the likeliest tokens; log_p: (n, K) the natural logarithms of their probabilities.
    """

    ids: NDArray[np.int32]
    log_p: NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """How a model reads a text.

    Attributes:
        nats: mean negative log-likelihood of a token.
        kld: mean divergence from the base, in nats per token.
    """

    nats: float
    kld: float


def likeliest_in(engine: Engine, text: str) -> list[Likeliest]:
    """Return what a model expects in each of the first windows of `text`."""
    out = []
    for _, log_p in _windows(engine, text):
        k = min(N_LIKELIEST, log_p.shape[1])
        ids = np.argpartition(log_p, -k, axis=1)[:, -k:].astype(np.int32)
        out.append(Likeliest(ids, np.take_along_axis(log_p, ids, 1)))
    return out


def read_prose(engine: Engine, text: str, base: Sequence[Likeliest]) -> Reading:
    """Return how a model reads the first windows of `text`, of which `base` says what the base expects in them.

    Source:
        KL(base || model), with what the base finds unlikely taken together: at most that over the whole vocabulary (data
        processing inequality; Cover & Thomas 2006, section 2.8).
    """
    nats, kld = [], []
    for (targets, log_q), expected in zip(_windows(engine, text), base, strict=True):
        nats.append(-np.take_along_axis(log_q, targets[:, None], 1).mean())
        kld.append(_divergence(expected.log_p, np.take_along_axis(log_q, expected.ids, 1)))
    return Reading(float(np.mean(nats)), float(np.mean(kld)))


def _windows(engine: Engine, text: str) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield each window's tokens after its first (n,), and the log-probabilities (n, V) that a model gives in their places.

    A window begins as a chat does: behind the token that some models want first, without which they read much worse.
    """
    tokens = engine.vocab.encode(text)[: WINDOW * N_WINDOWS]
    for first in range(0, len(tokens) - 1, WINDOW):
        window = tokens[first : first + WINDOW]
        logits = engine.logits(engine.vocab.with_bos(window[:-1]))[1 - len(window) :]
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
        yield np.array(window[1:]), logits


def _divergence(log_p: NDArray[np.float32], log_q: NDArray[np.float32]) -> float:
    """Return the mean of KL(p || q) over rows of (n, K) log-probabilities, all other tokens taken together."""
    p, q = np.exp(log_p, dtype=np.float64), np.exp(log_q, dtype=np.float64)
    rest_p, rest_q = (np.maximum(1 - x.sum(1), 1e-12) for x in (p, q))
    return float(((p * (log_p - log_q)).sum(1) + rest_p * np.log(rest_p / rest_q)).mean())
