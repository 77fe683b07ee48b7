"""Forward passes of training: a whole batch packed into one sequence, the head only where something is predicted.

A night's rows are a few dozen tokens each and begin alike (the template's system turn). The shared prefix stands once in
front, the rows follow one after another without padding, and a mask lets each row look at the prefix and at itself. The
products of a layer then have as many rows as there are real tokens, which is what a CPU needs; at these lengths the
masked scores cost next to nothing. Gradients are exact: the prefix gets the sum of what its rows send back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .batches import TrainRow

Anchor = tuple[list[int], torch.Tensor]  # token ids (T), the base's last hidden states (T, D)


def hidden_states(
    model: PreTrainedModel, prefix: Sequence[int], rows: Sequence[Sequence[int]], n_bare: int
) -> tuple[torch.Tensor, list[int]]:
    """Return the last hidden states (S, D) of prefix + rows packed into one sequence, and where each row starts.

    Args:
        rows: token ids without the prefix.
        n_bare: the last rows do not follow the prefix and do not see it.
    """
    ids, positions, owners, starts = list(prefix), list(range(len(prefix))), [0] * len(prefix), []
    for i, row in enumerate(rows):
        bare = i >= len(rows) - n_bare
        first = 0 if bare else len(prefix)
        starts.append(len(ids))
        ids += row
        positions += range(first, first + len(row))
        owners += [-(i + 1) if bare else i + 1] * len(row)
    out = model.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=_masks(model, torch.tensor(owners), torch.tensor(positions)),
        use_cache=False,
    )
    states: torch.Tensor = out.last_hidden_state[0]
    return states, starts


def _masks(model: PreTrainedModel, owners: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return scores (1, 1, S, S) to add, or one such mask for each kind of layer where some look back only so far.

    Args:
        owners: (S,), 0 for the prefix, i for row i, -i for a row that does not see the prefix.
    """
    order = torch.arange(len(owners))
    own = owners[:, None] == owners[None, :]
    seen = (order[:, None] >= order[None, :]) & (own | ((owners[None, :] == 0) & (owners[:, None] > 0)))
    full = _bias(seen, model.dtype)
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return full
    near = positions[:, None] - positions[None, :] < model.config.sliding_window
    return {"full_attention": full, "sliding_attention": _bias(seen & near, model.dtype)}


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]


def base_states(model: PreTrainedModel, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the last hidden states (T, D) of each text: its logits are one product away, at a fraction of their size."""
    out = []
    for first in range(0, len(texts), 16):
        part = texts[first : first + 16]
        with torch.no_grad():
            states, starts = hidden_states(model, [], part, len(part))
        out += [states[start : start + len(ids)].clone() for start, ids in zip(starts, part, strict=True)]
    return out


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
    hidden, starts = hidden_states(model, prefix, bodies, int(anchor is not None))  # (S, D)
    wanted = [
        (start + t - 1 - len(prefix), row.ids[t])
        for start, row in zip(starts, rows, strict=False)  # the anchor's start is left over
        for t in range(len(prefix) + 1, len(row.ids))
        if row.supervised[t]
    ]
    where = torch.tensor(wanted)  # (N, 2): position, token
    logits = model.lm_head(hidden[where[:, 0]])  # (N, V)
    loss = F.cross_entropy(logits.float(), where[:, 1], reduction="sum")
    if anchor is None:
        return loss, torch.zeros(())
    with torch.no_grad():
        target = F.log_softmax(model.lm_head(anchor[1]).float(), -1)  # (T, V)
    got = F.log_softmax(model.lm_head(hidden[starts[-1] :]).float(), -1)  # (T, V)
    return loss, F.kl_div(got, target, reduction="sum", log_target=True) / len(anchor[0])
