"""The head: the log sum of exponentials over the vocabulary, part by part, with its gradient; over all of it, or a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .batches import TrainRow
from .packing import MULTIPLE
from .weights import Weights

NO_TOKEN = -1  # of a target that is a mean of rows
NTH = 8  # of the other tokens, one in so many is in a sample, and counts so many times


class Sample:
    """A sample of the vocabulary: the tokens of a run's answers, and every NTH of the others, in turn.

    What is in no answer is only to be unlikely, and needs no more than a look now and then. Over NTH turns each token counts as
    often as in the whole vocabulary, so sums are right on average. *Does not cover*: targets that are a mean of rows, a
    teacher's or an anchor's: what they hold and no answer does would be pushed up in turns that do not see it. A head that is
    not resident is decoded whole.

    Attributes:
        turn: which of the others are in it; a run moves it with each step.
    """

    def __init__(self, weights: Weights, rows: Sequence[TrainRow]) -> None:
        """Take the tokens of the answers of rows."""
        answers = sorted({token for row in rows for token in row.answer})
        self.turn = 0
        self._weights = weights
        self._answers = torch.tensor(answers, device=weights.place.device)
        self._rows = weights.head_rows(answers).to(weights.place.dtype)

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield tokens (n,) in rising order, their rows (n, D), and what is added to their logits, or None."""
        for first, rows in self._weights.head():
            others = range(first + (self.turn - first) % NTH, first + len(rows), NTH)
            if others:  # a last part may be shorter
                tokens = torch.arange(others.start, others.stop, NTH, device=rows.device)
                is_answer = torch.isin(tokens, self._answers)
                yield tokens, rows[others.start - first :: NTH], torch.where(is_answer, -math.inf, math.log(NTH))
        yield self._answers, self._rows, None


def log_sum(
    hidden: torch.Tensor, without: torch.Tensor, weights: Weights, sample: Sample | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log sum_v exp(h . w_v) (N,) and its gradient (N, D), float32, over the vocabulary without one token each.

    Args:
        sample: stands for the vocabulary; each of `without` is among its answers.
    """
    n_rows = len(hidden)
    n_fill = -n_rows % MULTIPLE  # few shapes of products, as in `pack`
    hidden, without = F.pad(hidden, (0, 0, 0, n_fill)), F.pad(without, (0, n_fill), value=NO_TOKEN)
    high = hidden.new_full((len(hidden), 1), torch.finfo(torch.float32).min, dtype=torch.float32)
    total, gradient = torch.zeros_like(high), torch.zeros(hidden.shape, device=hidden.device)
    for tokens, rows, added in _whole(weights) if sample is None else sample.parts():
        logits = (hidden @ rows.T).float()
        if added is not None:
            logits += added
        at = torch.searchsorted(tokens, without).clamp_(max=len(tokens) - 1)
        here = tokens[at] == without
        logits[here, at[here]] = -torch.inf
        higher = torch.maximum(high, logits.amax(-1, keepdim=True))
        shrink = (high - higher).exp_()
        shares = logits.sub_(higher).exp_()
        total.mul_(shrink).add_(shares.sum(-1, keepdim=True))
        gradient.mul_(shrink).add_(shares.to(hidden.dtype) @ rows)
        high = higher
    return (high + total.log())[:n_rows, 0], gradient.div_(total)[:n_rows]


def _whole(weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor, None]]:
    for first, rows in weights.head():
        yield torch.arange(first, first + len(rows), device=rows.device), rows, None
