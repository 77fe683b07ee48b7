"""The operations of a decoder layer with their gradients written out.

What a general library spends on a small model on a CPU is not products but everything around them: one product for each
projection, low-rank factors cast anew, gradients of frozen weights prepared for, intermediate results kept. Here a group of
projections is one product, its LoRA gradients go straight into one buffer, and each operation keeps only what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .lora import LoraGroup
from .weights import Weights

Context = Any  # torch's, one class for each Function


class Project(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T for all projections of a group at once; W is frozen, A and B get gradients."""

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        trained: torch.Tensor,
        weights: Weights,
        layer: int,
        group: str,
        lora: LoraGroup | None,
        gelu: bool | None = None,
    ) -> torch.Tensor:
        """Map (T, in) to (T, out).

        Args:
            trained: the adapter's parameter: the output then belongs to the graph even where x does not.
            lora: the group's factors, None where it has none.
            gelu: x is gate and up (T, 2 in), and `gated` comes first; computed again in the backward pass, which spares its
                memory: a quarter of what a layer keeps.
        """
        kept = x
        if gelu is not None:
            x = gated(x, gelu)
        y = F.linear(x, weights.group(layer, group), weights.biases[layer, group])
        low = None
        if lora is not None:
            low = x @ lora.a.T  # (T, k r)
            y.addmm_(low, lora.b.T, alpha=lora.scaling)
        ctx.save_for_backward(kept, low)
        ctx.gelu = gelu
        ctx.weights, ctx.layer, ctx.group, ctx.lora = weights, layer, group, lora
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Add the gradients of A and B to their buffers; return that of x."""
        x, low = ctx.saved_tensors
        gate_up = x
        if ctx.gelu is not None:
            x = gated(gate_up, ctx.gelu)
        lora: LoraGroup | None = ctx.lora
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weights.group(ctx.layer, ctx.group)
        if lora is not None:
            dlow = dy @ lora.b
            if dx is not None:
                dx.addmm_(dlow, lora.a, alpha=lora.scaling)
            lora.add_gradients(dlow.T @ x, dy.T @ low)
        if dx is not None and ctx.gelu is not None:
            dx = _gated_backward(gate_up, dx, ctx.gelu)
        return dx, None, None, None, None, None, None


class RmsNorm(torch.autograd.Function):
    """y = x / rms(x) * factors over the last dimension, computed in float32; the factors are frozen."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, factors: torch.Tensor, eps: float) -> torch.Tensor:
        """Norm (..., D)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factors, inverse)
        return (x * inverse).mul_(factors).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of x."""
        x, factors, inverse = ctx.saved_tensors
        unit = x * inverse  # float32
        g = dy * factors  # (..., D) float32
        projected = (g * unit).mean(-1, keepdim=True)
        return g.addcmul_(unit, projected, value=-1).mul_(inverse).to(x.dtype), None, None


def gated(gate_up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    """Map gate and up, which stand side by side in (T, 2 F), to f(gate) * up (T, F); f is SiLU, or the GELU of gemma."""
    gate, up = gate_up.chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)).mul_(up)


def _gated_backward(gate_up: torch.Tensor, dy: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    """Return the gradient of `gated` from that of its output."""
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    d_gate, d_up = out.chunk(2, -1)
    through = dy * up
    if is_gelu:
        torch.mul(F.gelu(gate, approximate="tanh"), dy, out=d_up)
        d_gate.copy_(torch.ops.aten.gelu_backward(through, gate, approximate="tanh"))
    else:
        torch.mul(F.silu(gate), dy, out=d_up)
        torch.ops.aten.silu_backward(through, gate, grad_input=d_gate)
    return out


class Rotate(torch.autograd.Function):
    """Rotary positions: (T, H, d) in, (H, T, d) out, so that attention's products need no copy."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn pairs (i, i + d/2) by the angles whose cosines and sines are (T, d/2)."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x.transpose(0, 1), cos, sin, x.new_empty(x.shape[1], x.shape[0], x.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Turn back."""
        cos, sin = ctx.saved_tensors
        out = dy.new_empty(dy.shape[1], dy.shape[0], dy.shape[2])
        _rotate(dy, cos, -sin, out.transpose(0, 1))
        return out, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin)
    return out


class Span(NamedTuple):
    """Neighbouring tokens first ... last - 1, and what they look at: tokens seen_from ... last - 1, and a prefix.

    Attributes:
        n_prefix: tokens of the prefix, where `seen_from` is behind it, else 0.
        bias: (H / K * n, seen), 0 where a token is seen and -inf where not; near: the same within a window, or None.
    """

    first: int
    last: int
    seen_from: int
    n_prefix: int
    bias: torch.Tensor
    near: torch.Tensor | None


class Attend(torch.autograd.Function):
    """Softmax attention span by span: two batched products and a softmax each.

    torch's flash kernel spends a third of a training step in its backward pass on a CPU when rows are a few dozen tokens
    long, and one product over a whole batch computes mostly scores that are masked.
    """

    @staticmethod
    def forward(
        ctx: Context,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: Sequence[Span],
        is_near: bool,
        scale: float,
    ) -> torch.Tensor:
        """Return (T, H d) for q (H, T, d), k and v (K, T, d); H is a multiple of K."""
        heads, length, width = q.shape
        n_kv = len(k)
        out = q.new_empty(length, heads, width)
        shares = []
        for span in spans:
            rows, keys, values = _queries(q, span, n_kv), _seen(k, span), _seen(v, span)
            bias = span.near if is_near and span.near is not None else span.bias
            scores = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=scale)
            share = torch.softmax(scores, -1)
            mixed = torch.bmm(share, values).view(heads, span.last - span.first, width)
            out[span.first : span.last] = mixed.transpose(0, 1)
            shares.append(share)
        ctx.save_for_backward(q, k, v, *shares)
        ctx.spans, ctx.scale = spans, scale
        return out.view(length, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, *shares = ctx.saved_tensors
        (heads, length, width), n_kv = q.shape, len(k)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dy = dy.view(length, heads, width).transpose(0, 1)  # (H, T, d)
        for span, share in zip(ctx.spans, shares, strict=True):
            rows, keys, values, d_out = _queries(q, span, n_kv), _seen(k, span), _seen(v, span), _queries(dy, span, n_kv)
            d_share = torch.bmm(d_out, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype)
            _add_seen(dv, torch.bmm(share.transpose(1, 2), d_out), span)
            _add_seen(dk, torch.bmm(d_scores.transpose(1, 2), rows).mul_(ctx.scale), span)
            part = torch.bmm(d_scores, keys).mul_(ctx.scale)
            dq[:, span.first : span.last] = part.view(heads, span.last - span.first, width)
        return dq, dk, dv, None, None, None


def _queries(q: torch.Tensor, span: Span, n_kv: int) -> torch.Tensor:
    """Return a span's rows of (H, T, d) as (K, H / K * n, d)."""
    return q[:, span.first : span.last].reshape(n_kv, -1, q.shape[-1])


def _seen(k: torch.Tensor, span: Span) -> torch.Tensor:
    """Return the rows (K, seen, d) that a span sees."""
    own = k[:, span.seen_from : span.last]
    return torch.cat([k[:, : span.n_prefix], own], 1) if span.n_prefix else own


def _add_seen(dk: torch.Tensor, part: torch.Tensor, span: Span) -> None:
    dk[:, : span.n_prefix] += part[:, : span.n_prefix]
    dk[:, span.seen_from : span.last] += part[:, span.n_prefix :]
