"""Attention of training: two batched products and a softmax.

torch's flash kernel spends a third of a training step in its backward pass on a CPU when rows are a few dozen tokens long.
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
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (B, T, H, d) for query (B, H, T, d), key and value (B, K, T, d); H is a multiple of K.

    Args:
        attention_mask: (1, 1, T, T), added to the scores; it must hold the causal part.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    q = (query * scaling).reshape(batch * kv_heads, groups * length, width)
    scores = torch.bmm(q, key.reshape(batch * kv_heads, length, width).transpose(1, 2))  # (B*K, G*T, T)
    scores = scores.view(batch, kv_heads, groups, length, length) + attention_mask.unsqueeze(2)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    values = value.reshape(batch * kv_heads, length, width)
    out = torch.bmm(weights.view(batch * kv_heads, groups * length, length), values)
    return out.view(batch, heads, length, width).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
