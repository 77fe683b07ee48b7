"""Causal attention for many short rows behind one shared prefix.

A night's rows are a few dozen tokens each and begin alike (the template's system turn), so the prefix runs once for a whole
batch and its keys and values are shared by every row, gradients included. torch's flash kernel spends a third of such a
step in its backward pass on a CPU; two batched products and a softmax do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "edgecl"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (B, T, H, d) for query (B, H, T, d) and key, value (B, K, S, d); H is a multiple of K.

    Args:
        attention_mask: (B or 1, 1, T, S), added to the scores; it must hold the causal part.
    """
    batch, heads, length, width = query.shape
    kv_heads, span = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    q = (query * scaling).reshape(batch * kv_heads, groups * length, width)
    scores = torch.bmm(q, key.reshape(batch * kv_heads, span, width).transpose(1, 2))  # (B*K, G*T, S)
    scores = scores.view(batch, kv_heads, groups, length, span)
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(2)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    out = torch.bmm(weights.view(batch * kv_heads, groups * length, span), value.reshape(batch * kv_heads, span, width))
    return out.view(batch, heads, length, width).transpose(1, 2), None


AttentionInterface.register(NAME, attend)


def causal_bias(
    n_prefix: int, length: int, n_rows: int, n_bare: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """Return (B or 1, 1, T, S) scores to add: 0 where a row of T tokens may look at prefix + itself, -inf elsewhere.

    Args:
        n_bare: the last rows of the batch do not see the prefix.
        window: how far back a token may look, None for all of it.
    """
    back = torch.arange(length)[:, None] + n_prefix - torch.arange(n_prefix + length)[None, :]  # (T, S)
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    seen = seen[None, None].repeat(n_rows if n_bare else 1, 1, 1, 1)
    if n_bare:
        seen[-n_bare:, :, :, :n_prefix] = False
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
