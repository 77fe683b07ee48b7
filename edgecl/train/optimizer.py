"""AdamW on one flat parameter, by torch's fused kernel.

`torch.optim` runs the same kernel, but the first optimizer made imports torch's compiler: 70 MB and most of a second.
"""

from __future__ import annotations

import torch
from torch import nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class AdamW:
    """The optimizer's state: moments of the size of the parameter, float32, and the number of steps taken."""

    def __init__(self, flat: nn.Parameter, weight_decay: float, max_grad_norm: float) -> None:
        """Begin with moments of zero."""
        self.flat, self.weight_decay, self.max_grad_norm = flat, weight_decay, max_grad_norm
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat), torch.zeros_like(flat)
        self.n_steps = torch.zeros((), device=flat.device)

    def clip(self) -> float:
        """Shorten the gradient to at most `max_grad_norm`, 0 for no limit; return the norm that it had."""
        grad = self.flat.grad
        assert grad is not None
        norm = float(grad.norm())
        if 0 < self.max_grad_norm < norm:
            grad.mul_(self.max_grad_norm / norm)
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float, trained: slice) -> None:
        """Take one step with a part of the numbers, and begin a new gradient in the same place: products add to views of it."""
        grad = self.flat.grad
        assert grad is not None
        self.n_steps += 1
        flat, grads, exp_avg, exp_avg_sq = ([part[trained]] for part in (self.flat, grad, self.exp_avg, self.exp_avg_sq))
        torch._fused_adamw_(
            flat, grads, exp_avg, exp_avg_sq, [], [self.n_steps],
            lr=learning_rate, beta1=BETA1, beta2=BETA2, weight_decay=self.weight_decay, eps=EPS, amsgrad=False, maximize=False,
        )  # fmt: skip
        grad.zero_()
