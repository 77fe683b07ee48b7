"""How fast a model answers: pp512, tg128, time to first token, inter-token latency."""

from __future__ import annotations

import time

import numpy as np

from .session import Engine

N_PROMPT = 512  # tokens, of pp512


def latency(engine: Engine, repeats: int = 3, n_prompt: int = N_PROMPT, n_decode: int = 128) -> dict[str, float]:
    """Time the model on tokens that mean nothing; medians over `repeats` after one warm-up.

    Returns:
        pp512 and tg128 in tokens/s, ttft_ms (a prompt of 64 tokens), itl_p50_ms and itl_p95_ms.
    """
    tokens = [int(x) for x in np.random.default_rng(0).integers(0, engine.vocab.n_vocab, n_prompt)]
    prefill, first, gaps = [], [], []
    for attempt in range(repeats + 1):
        engine.clear()
        start = time.perf_counter()
        engine.feed(tokens)
        prefill.append(time.perf_counter() - start)
        engine.clear()
        start = time.perf_counter()
        engine.feed(tokens[:63])
        position, token = 63, tokens[63]
        times = []
        for _ in range(n_decode):
            (logits,) = engine.forward([(token, position, 0, True)])
            token, position = int(logits.argmax()), position + 1
            times.append(time.perf_counter())
        first.append(times[0] - start)
        if attempt:
            gaps += list(np.diff(times))
    engine.clear()
    return {
        "pp512": n_prompt / float(np.median(prefill[1:])),
        "tg128": 1.0 / float(np.mean(gaps)),
        "ttft_ms": 1e3 * float(np.median(first[1:])),
        "itl_p50_ms": 1e3 * float(np.percentile(gaps, 50)),
        "itl_p95_ms": 1e3 * float(np.percentile(gaps, 95)),
    }
