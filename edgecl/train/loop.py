"""The training loop: a night's rows into a LoRA adapter, read top to bottom.

bfloat16 base where the CPU multiplies it in hardware, float32 elsewhere; the head runs only where an answer is predicted;
AdamW on float32 adapter weights. Same rows, seed and thread count: same adapter, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from edgecl_convert import Adapter, GgufFile

from ..errors import EdgeclError
from ..profile import TrainSettings
from .batches import TrainRow, epoch, micro_batches, shared_prefix
from .decoder import Decoder
from .latents import Latents, LatentStore
from .lora import Lora
from .losses import Anchor, anchors, losses
from .weights import placement

Progress = Callable[[int, int, float], None]  # (steps done, steps, loss in nats)


@dataclass
class TrainReport:
    """What a night's training did; times in seconds, losses in nats.

    Attributes:
        tokens: unpadded tokens of all rows trained on, counted as if each row were run alone: a prefix that rows share is
            computed once a batch and counted for each.
    """

    steps: int = 0
    tokens: int = 0
    train_s: float = 0.0
    load_s: float = 0.0
    tokens_per_s: float = 0.0
    dtype: str = ""
    stopped_early: bool = False
    losses: list[float] = field(default_factory=list)


def train(
    gguf: GgufFile,
    new: Sequence[TrainRow],
    replay: Sequence[TrainRow],
    settings: TrainSettings,
    start: Adapter | None = None,
    anchor: Sequence[list[int]] = (),
    progress: Progress | None = None,
    store: LatentStore | None = None,
) -> tuple[Adapter, TrainReport]:
    """Train an adapter for the base `gguf` on new rows, with replay rows in every batch.

    Args:
        start: the adapter to go on from.
        anchor: token ids of pieces of general text, on which the model is held to the base; one a step.
        store: where states that enter the first trained layer are kept; None: they are computed each time.

    Raises:
        EdgeclError: the loss is not a number.
        UnsupportedError, AdapterError: the base or `start` cannot be used.
    """
    began = time.perf_counter()
    if settings.n_threads:
        torch.set_num_threads(settings.n_threads)
    torch.manual_seed(settings.seed)
    place = placement()
    decoder = Decoder(gguf, place)
    steps_an_epoch = math.ceil(len(new) / settings.batch_rows)
    n_epochs = max(settings.epochs, math.ceil(settings.min_steps / steps_an_epoch))
    n_steps = n_epochs * steps_an_epoch
    first_layer = decoder.shape.n_layer - max(1, round(settings.depth * decoder.shape.n_layer))
    lora = Lora(gguf, decoder.shape, settings.r, settings.lora_alpha, settings.seed, place, first_layer)
    if start is not None:
        lora.warm_start(start)
    latents = Latents(decoder, lora, store) if store is not None and first_layer else None
    texts = list(anchor)[:n_steps] if settings.anchor_weight else []
    pieces = anchors(decoder, texts, None if lora.digest_below() else latents)
    prefix = shared_prefix([*new, *replay])
    optimizer = torch.optim.AdamW([lora.flat], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    rng = np.random.default_rng(settings.seed)
    report = TrainReport(dtype=str(place.dtype).removeprefix("torch."), load_s=time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(n_epochs):
        for rows in epoch(new, replay, settings.batch_rows, settings.replay_rows, rng):
            if time.perf_counter() - began > 60 * settings.minutes:
                report.stopped_early = True
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(report.steps, n_steps)
            held = pieces[report.steps % len(pieces)] if pieces else None
            value = backward(decoder, lora, prefix, rows, held, settings, latents)
            nn.utils.clip_grad_norm_([lora.flat], settings.max_grad_norm)
            if not math.isfinite(value):
                raise EdgeclError(f"training loss is {value} at step {report.steps}; lower train.learning_rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # its views are where gradients go
            lora.refresh()
            report.steps += 1
            report.tokens += sum(len(row.ids) for row in rows)
            report.losses.append(round(value, 5))
            if progress:
                progress(report.steps, n_steps, value)
    report.train_s = time.perf_counter() - began
    report.tokens_per_s = report.tokens / max(report.train_s, 1e-9)
    return lora.adapter(), report


def backward(
    decoder: Decoder,
    lora: Lora,
    prefix: list[int],
    rows: list[TrainRow],
    anchor: Anchor | None,
    settings: TrainSettings,
    latents: Latents | None = None,
) -> float:
    """Add the gradient of a batch, part by part; return its mean answer loss in nats."""
    n_predicted = sum(row.n_predicted for row in rows)
    total = 0.0
    for part in micro_batches(rows, len(prefix), settings.micro_tokens):
        loss, drift = losses(decoder, lora, prefix, part, anchor, latents)
        (loss / n_predicted + settings.anchor_weight * drift).backward()
        total += loss.item()
        anchor = None  # once a batch
    return total / n_predicted


def schedule(step: int, n_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: warm-up over 5%, then cosine down to a tenth."""
    warmup = max(1, round(0.05 * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
