"""Forward passes of training: a shared prefix once, the rows behind it, the head only where something is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from .attention import causal_bias
from .batches import TrainRow, pad

Anchor = tuple[list[int], torch.Tensor]  # token ids (T), the base's last hidden states (T, D)


def hidden_states(model: PreTrainedModel, prefix: Sequence[int], rows: Sequence[Sequence[int]], n_bare: int) -> torch.Tensor:
    """Return the last hidden states (B, T, D) of rows that follow a shared prefix.

    Args:
        rows: token ids without the prefix, padded on the right here; causality keeps padding out of sight.
        n_bare: the last rows do not follow the prefix. They sit at the same positions, which rotary embeddings,
            being relative, do not notice.
    """
    ids = pad(rows)
    cache = DynamicCache()
    if prefix:
        _run(model, torch.tensor([list(prefix)]), 0, causal_bias_of(model, 0, len(prefix), 1, 0), cache)
        for layer in cast("list[Any]", cache.layers):
            layer.keys = layer.keys.expand(len(rows), -1, -1, -1)
            layer.values = layer.values.expand(len(rows), -1, -1, -1)
    bias = causal_bias_of(model, len(prefix), ids.shape[1], len(rows), n_bare)
    return _run(model, ids, len(prefix), bias, cache if prefix else None)


def causal_bias_of(
    model: PreTrainedModel, n_prefix: int, length: int, n_rows: int, n_bare: int
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the model's masks: one, or one for each kind of layer where some look back only so far."""
    config, dtype = model.config, model.dtype
    full = causal_bias(n_prefix, length, n_rows, n_bare, dtype)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return full
    sliding = causal_bias(n_prefix, length, n_rows, n_bare, dtype, config.sliding_window)
    return {"full_attention": full, "sliding_attention": sliding}


def _run(
    model: PreTrainedModel,
    ids: torch.Tensor,
    start: int,
    mask: torch.Tensor | dict[str, torch.Tensor],
    cache: DynamicCache | None,
) -> torch.Tensor:
    positions = torch.arange(start, start + ids.shape[1])[None]
    out = model.model(
        input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
    )
    states: torch.Tensor = out.last_hidden_state
    return states


def base_states(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the last hidden states (T, D) of a text: its logits are one product away, at a fraction of their size."""
    with torch.no_grad():
        return hidden_states(model, [], [ids], 0)[0]


def losses(
    model: PreTrainedModel, prefix: Sequence[int], rows: Sequence[TrainRow], anchor: Anchor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, in nats, the answer loss summed over the predicted tokens, and KL(base, model) per token of the anchor.

    Args:
        prefix: what all rows begin with.
        anchor: rides along as one more row, without the prefix.
    """
    bodies: list[Sequence[int]] = [row.ids[len(prefix) :] for row in rows]
    if anchor is not None:
        bodies.append(anchor[0])
    hidden = hidden_states(model, prefix, bodies, int(anchor is not None))  # (B, T, D)
    wanted = [
        (i, t - 1 - len(prefix), row.ids[t])
        for i, row in enumerate(rows)
        for t in range(len(prefix) + 1, len(row.ids))
        if row.supervised[t]
    ]
    where = torch.tensor(wanted)  # (S, 3): row, position, token
    logits = model.lm_head(hidden[where[:, 0], where[:, 1]])  # (S, V)
    loss = F.cross_entropy(logits.float(), where[:, 2], reduction="sum")
    if anchor is None:
        return loss, torch.zeros(())
    with torch.no_grad():
        target = F.log_softmax(model.lm_head(anchor[1]).float(), -1)  # (T, V)
    got = F.log_softmax(model.lm_head(hidden[-1, : len(anchor[0])]).float(), -1)  # (T, V)
    return loss, F.kl_div(got, target, reduction="sum", log_target=True) / len(anchor[0])
