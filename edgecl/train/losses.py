"""The losses, only where something is predicted.

A target is a row t of the head, or a mean of its rows: the loss log sum_v exp(h . w_v) - h . t is then the cross entropy of
an answer token, or, up to the entropy, that against a whole distribution p of the base, with t = sum_v p_v w_v. So the base's
distribution is kept as D numbers a token instead of one for each word, and one walk over the head gives loss and gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .batches import TrainRow, predicted
from .decoder import Decoder
from .forward import hidden_states
from .head import NO_TOKEN, Sample, log_sum
from .latents import VERSION, Latents, LatentStore
from .lora import Lora
from .packing import micro_batches
from .weights import Weights

ANCHORS_AT_ONCE = 4


@dataclass(frozen=True)
class Anchor:
    """A piece of general text, and what the base predicts there.

    Attributes:
        expected: (T, D) float32, the mean row of the head under the base's distribution after each token.
        entropy: of these distributions, in nats, the mean.
    """

    ids: list[int]
    expected: torch.Tensor
    entropy: float


def anchors(decoder: Decoder, texts: Sequence[list[int]], store: LatentStore | None = None) -> list[Anchor]:
    """Return what the base predicts on texts: what `store` has of it, else computed and kept there."""
    facts = ("anchor", VERSION, store.base_sha256 if store else "", str(decoder.place.dtype))
    keys = [hashlib.blake2b(repr((facts, list(ids))).encode(), digest_size=16).digest() for ids in texts]
    found = {key: states for key in keys if store and (states := store.get(key)) is not None}
    missing = [(key, ids) for key, ids in zip(keys, texts, strict=True) if key not in found]
    for first in range(0, len(missing), ANCHORS_AT_ONCE):
        part = missing[first : first + ANCHORS_AT_ONCE]
        entries = _expected(decoder, [ids for _, ids in part])
        fresh = [(key, entry) for (key, _), entry in zip(part, entries, strict=True)]
        found |= fresh
        if store:
            store.put(fresh)
    out = []
    for key, ids in zip(keys, texts, strict=True):
        numbers = torch.frombuffer(bytearray(found[key]), dtype=torch.float32).to(decoder.place.device)
        out.append(Anchor(ids, numbers[1:].view(len(ids), -1), float(numbers[0])))
    return out


@torch.no_grad()
def _expected(decoder: Decoder, texts: Sequence[list[int]]) -> list[bytes]:
    """Return, for each text, the mean entropy and then the expected row of the head after each token, as float32."""
    sizes = [len(ids) for ids in texts]
    wanted = [(i, t) for i, n in enumerate(sizes) for t in range(n)]
    hidden = hidden_states(decoder, None, texts, wanted)
    total, expected = log_sum(hidden, torch.full((len(hidden),), NO_TOKEN, device=hidden.device), decoder.weights)
    entropy = total - (hidden * expected).sum(-1)
    parts = zip(entropy.split(sizes), expected.split(sizes), strict=True)
    return [torch.cat([h.mean()[None], rows.flatten()]).cpu().numpy().tobytes() for h, rows in parts]


class Losses(NamedTuple):
    """Losses in nats.

    Attributes:
        answers: (B,) of each row, the mean over the tokens of its answers: a long answer counts as much as a short one, in
            training as in measuring.
        drift: the anchor's KL divergence per token.
    """

    answers: torch.Tensor
    drift: torch.Tensor


def losses(
    decoder: Decoder,
    lora: Lora | None,
    rows: Sequence[TrainRow],
    anchor: Anchor | None,
    latents: Latents | None = None,
    sample: Sample | None = None,
) -> Losses:
    """Return the losses of rows and of an anchor.

    Args:
        anchor: rides along as one more row; None: its loss is 0.
        latents: where the states come from that enter the first trained layer; None: from all layers below it.
        sample: stands for the vocabulary; None: all of it.
    """
    weights = decoder.weights
    ids, wanted = [row.ids for row in rows], predicted(rows)
    tokens, targets = _answers(weights, rows)
    n_answers = len(tokens)
    n_anchor = 0
    if anchor is not None:
        n_anchor = len(anchor.ids)
        ids.append(anchor.ids)
        wanted += [(len(rows), t) for t in range(n_anchor)]
        tokens += [NO_TOKEN] * n_anchor
        targets.append(anchor.expected)
    hidden = hidden_states(decoder, lora, ids, wanted, latents)
    each: torch.Tensor = _Losses.apply(hidden, torch.cat(targets), torch.tensor(tokens, device=hidden.device), weights, sample)
    of_answers, of_anchor = each.split([n_answers, n_anchor])
    drift = of_anchor.mean() - anchor.entropy if anchor is not None else each.new_zeros(())
    means = [part.mean() for part in of_answers.split([row.n_predicted for row in rows])]
    return Losses(torch.stack(means), drift)


def backward(
    decoder: Decoder,
    lora: Lora,
    rows: list[TrainRow],
    anchor: Anchor | None,
    anchor_weight: float,
    micro_tokens: int,
    latents: Latents | None = None,
    sample: Sample | None = None,
) -> list[float]:
    """Add the gradient of a batch, in parts of at most `micro_tokens`; return the answer loss of each row in nats."""
    each: list[float] = []
    for part in micro_batches(rows, micro_tokens):
        answers, drift = losses(decoder, lora, part, anchor, latents, sample)
        (answers.sum() / len(rows) + anchor_weight * drift).backward()
        each += answers.tolist()
        anchor = None  # once a batch
    return each


@torch.no_grad()
def answer_loss(decoder: Decoder, lora: Lora | None, rows: Sequence[TrainRow], micro_tokens: int) -> float:
    """Return the mean answer loss of rows, of each the mean over its tokens, in nats."""
    parts = micro_batches(rows, micro_tokens)
    total = sum(losses(decoder, lora, part, None).answers.sum().item() for part in parts)
    return total / len(rows)


def _answers(weights: Weights, rows: Sequence[TrainRow]) -> tuple[list[int], list[torch.Tensor]]:
    """Return the tokens of all answers and, by row, the head's rows (n, D) of them, or their mean where more were likely."""
    tokens, targets = [], []
    for row in rows:
        ids = row.answer
        if row.likely:
            ids = [NO_TOKEN] * len(ids)
            shares = torch.tensor([[share for _, share in choices] for choices in row.likely])  # (n, K)
            choices = weights.head_rows([token for choices in row.likely for token, _ in choices])
            targets.append(torch.einsum("nk,nkd->nd", shares.to(choices), choices.view(*shares.shape, -1)))
        else:
            targets.append(weights.head_rows(ids))
        tokens += ids
    return tokens, targets


class _Losses(torch.autograd.Function):
    """Loss of each target; the gradient comes with it, because the head is walked once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        tokens: torch.Tensor,
        weights: Weights,
        sample: Sample | None,
    ) -> torch.Tensor:
        """Return the losses (N,) float32 of hidden states (N, D) for targets (N, D), which are the rows of tokens (N,)."""
        others, expected = log_sum(hidden, tokens, weights, sample)
        reached = (hidden * targets).sum(-1)  # (N,) float32
        is_row = tokens != NO_TOKEN
        total = torch.where(is_row, torch.logaddexp(others, reached), others)
        loss = total - reached
        # a row's own share is left out of `expected`: where it is nearly all, the difference of both would be rounding
        share = torch.where(is_row, -torch.expm1(-loss), 1.0)[:, None]
        ctx.save_for_backward(expected.mul_((others - total).exp_()[:, None]).sub_(targets * share))
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return (gradient * d_loss[:, None]).to(ctx.dtype), None, None, None, None
