"""The operations of a decoder layer with their gradients written out.

What a general library spends on a small model on a CPU is not products but everything around them: one product for each
projection, low-rank factors cast anew, gradients of frozen weights prepared for, intermediate results kept. Here a group of
projections is one product, its LoRA gradients go straight into one buffer, and each operation keeps only what it needs.

The backward pass goes through the first G tokens of a sequence (`packing` puts them there): an operation keeps what it needs
for these, and returns gradients for these and zeros for the others.
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
        gelu: bool | None,
        n_through: int,
        n_heard: int,
    ) -> torch.Tensor:
        """Map (T, in) to (T, out).

        Args:
            trained: the adapter's parameter: the output then belongs to the graph even where x does not.
            lora: the group's factors, None where it has none.
            gelu: x is gate and up (T, 2 in), and `gated` comes first; computed again in the backward pass, which spares its
                memory: a quarter of what a layer keeps.
            n_through: G; n_heard: of so many is there a gradient of y.
        """
        kept = _first(x, n_heard)
        if gelu is not None:
            x = gated(x, gelu)
        y = F.linear(x, weights.group(layer, group), weights.biases[layer, group])
        low = None
        if lora is not None:
            low = x @ lora.a.T  # (T, k r)
            y.addmm_(low, lora.b.T, alpha=lora.scaling)
            low = _first(low, n_heard)
        ctx.save_for_backward(kept, low)
        ctx.gelu, ctx.n_tokens, ctx.n_through = gelu, len(x), n_through
        ctx.weights, ctx.layer, ctx.group, ctx.lora = weights, layer, group, lora
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Add the gradients of A and B to their buffers; return that of x."""
        kept, low = ctx.saved_tensors
        n, dy = ctx.n_through, dy[: len(kept)]
        lora: LoraGroup | None = ctx.lora
        dlow = None
        if lora is not None:
            x, dlow = kept if ctx.gelu is None else gated(kept, ctx.gelu), dy @ lora.b
            lora.add_gradients(dlow.T @ x, low.T @ dy)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy[:n] @ ctx.weights.group(ctx.layer, ctx.group)
            if lora is not None and dlow is not None:
                dx.addmm_(dlow[:n], lora.a, alpha=lora.scaling)
            if ctx.gelu is not None:
                dx = _gated_backward(kept[:n], dx, ctx.gelu)
            dx = _with_zeros(dx, ctx.n_tokens)
        return dx, None, None, None, None, None, None, None, None


class RmsNorm(torch.autograd.Function):
    """y = x / rms(x) * factors over the last dimension, computed in float32; the factors are frozen."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, factors: torch.Tensor, eps: float, n_through: int) -> torch.Tensor:
        """Norm (T, ..., D); n_through: G."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(_first(x, n_through), factors, _first(inverse, n_through))
        ctx.n_tokens = len(x)
        return (x * inverse).mul_(factors).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of x."""
        x, factors, inverse = ctx.saved_tensors
        dy = dy[: len(x)]
        unit = x * inverse  # float32
        g = dy * factors  # (..., D) float32
        projected = (g * unit).mean(-1, keepdim=True)
        dx = g.addcmul_(unit, projected, value=-1).mul_(inverse).to(x.dtype)
        return _with_zeros(dx, ctx.n_tokens), None, None, None


def _first(x: torch.Tensor, n: int) -> torch.Tensor:
    """Return the first n rows of x (T, ...), so that the others can be forgotten."""
    return x if n == len(x) else x[:n].clone()


def _with_zeros(dx: torch.Tensor, n: int) -> torch.Tensor:
    """Return (n, ...): the gradients of the first tokens, and zeros."""
    if len(dx) == n:
        return dx
    out = dx.new_zeros(n, *dx.shape[1:])
    out[: len(dx)] = dx
    return out


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


class Span(NamedTuple):
    """Lines S of slots n that stand one after the other, from a first slot on."""

    first: int
    n_lines: int
    width: int


class Bucket(NamedTuple):
    """Rows of about the same length, side by side: lines of slots, in each of which whole rows stand.

    Attributes:
        slots: of all tokens; back: of those that the backward pass goes through, m in a line.
        queries: (S H m,) where these stand among the (S K, H / K n) of all; None: they are the same.
        bias: (S K, H / K n, P + n), 0 where a slot sees a token of the tree or a slot, and -inf where not.
        near: the same within a window, or None.
    """

    slots: Span
    back: Span
    queries: torch.Tensor | None
    bias: torch.Tensor
    near: torch.Tensor | None


class Lines(NamedTuple):
    """How the T tokens of a packed sequence stand in N slots while they attend.

    Attributes:
        token: (N,) the token of each slot, any where it is empty; slot: (T,) the slot of each token.
        back_slot: (G,) the slot of each of the first G, through which the backward pass goes, among those of `Bucket.back`.
        shared: (P,) the tokens which stand in front of every line, besides slots of their own; any where there are fewer.
    """

    token: torch.Tensor
    slot: torch.Tensor
    back_slot: torch.Tensor
    shared: torch.Tensor
    buckets: Sequence[Bucket]


class Attend(torch.autograd.Function):
    """Rotary positions and softmax attention, with all lines of a bucket in one batched product.

    torch's flash kernel spends a third of a training step in its backward pass on a CPU when rows are a few dozen tokens
    long, one product over a whole batch computes mostly scores that are masked, and one a row is mostly overhead.
    """

    @staticmethod
    def forward(
        ctx: Context,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        lines: Lines,
        n_kv: int,
        is_near: bool,
        scale: float,
    ) -> torch.Tensor:
        """Return (T, H d) for queries, keys and values (T, H + 2 K, d); H is a multiple of K.

        Args:
            cos, sin: (T, 1, d / 2), of the angles by which the pairs (i, i + d / 2) of queries and keys are turned.
        """
        d, n_qk = qkv.shape[2], qkv.shape[1] - n_kv
        n_head = n_qk - n_kv
        turned = torch.empty_like(qkv)
        _rotate(qkv[:, :n_qk], cos, sin, turned[:, :n_qk])
        turned[:, n_qk:] = qkv[:, n_qk:]
        shared, slots = (turned.index_select(0, tokens) for tokens in (lines.shared, lines.token))
        out = qkv.new_empty(len(slots), n_head, d)
        kept: list[torch.Tensor] = []
        for bucket in lines.buckets:
            parts = slots[:, :n_head], slots[:, n_head:n_qk], slots[:, n_qk:]
            q, k, v = (_by_head(part, bucket.slots, n_kv) for part in parts)
            if len(shared):
                k, v = _behind(shared[:, n_head:n_qk], k), _behind(shared[:, n_qk:], v)
            bias = bucket.near if is_near and bucket.near is not None else bucket.bias
            share = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale), -1)
            _to_slots(torch.bmm(share, v), bucket.slots, out)
            if bucket.queries is not None:
                q, share = (_some(rows, bucket.queries) for rows in (q, share))
            kept += [q, k, v, share]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.lines, ctx.n_kv, ctx.scale = lines, n_kv, scale
        return out.index_select(0, lines.slot).view(len(qkv), n_head * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of qkv: of the first G queries, and of all keys and values."""
        cos, sin, *kept = ctx.saved_tensors
        lines, n_kv, d = ctx.lines, ctx.n_kv, kept[0].shape[-1]
        n_through, n_shared = len(lines.back_slot), len(lines.shared)
        dy = dy.view(len(dy), -1, d)
        n_head, n_qk = dy.shape[1], dy.shape[1] + n_kv
        n_back = sum(bucket.back.n_lines * bucket.back.width for bucket in lines.buckets)
        d_out = dy.new_zeros(n_back, n_head, d).index_copy_(0, lines.back_slot, dy[:n_through])  # nothing from empty slots
        dq, dkv = torch.empty_like(d_out), dy.new_zeros(len(lines.token), 2 * n_kv, d)
        d_shared = dy.new_zeros(n_shared, 2 * n_kv, d)
        for i, bucket in enumerate(lines.buckets):
            if not bucket.back.width:
                continue
            q, k, v, share = kept[4 * i : 4 * i + 4]
            d_mixed = _by_head(d_out, bucket.back, n_kv)
            d_share = torch.bmm(d_mixed, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype).mul_(ctx.scale)
            dk, dv = torch.bmm(d_scores.transpose(1, 2), q), torch.bmm(share.transpose(1, 2), d_mixed)
            if n_shared:
                d_shared[:, :n_kv] += _of_shared(dk, n_shared, n_kv)
                d_shared[:, n_kv:] += _of_shared(dv, n_shared, n_kv)
                dk, dv = dk[:, n_shared:], dv[:, n_shared:]
            _to_slots(torch.bmm(d_scores, k), bucket.back, dq)
            _to_slots(dk, bucket.slots, dkv[:, :n_kv])
            _to_slots(dv, bucket.slots, dkv[:, n_kv:])
        turned = dkv.index_select(0, lines.slot)
        turned.index_add_(0, lines.shared, d_shared)
        out = dy.new_zeros(len(dy), n_qk + n_kv, d)
        queries = dq.index_select(0, lines.back_slot)
        _rotate(queries, cos[:n_through], -sin[:n_through], out[:n_through, :n_head])
        _rotate(turned[:, :n_kv], cos, -sin, out[:, n_head:n_qk])
        out[:, n_qk:] = turned[:, n_kv:]
        return out, None, None, None, None, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin)


def _by_head(slots: torch.Tensor, span: Span, n_kv: int) -> torch.Tensor:
    """Return a span of (N, heads, d) as (S K, heads / K n, d)."""
    part = slots[span.first : span.first + span.n_lines * span.width]
    by_line = part.view(span.n_lines, span.width, *part.shape[1:]).transpose(1, 2)
    return by_line.reshape(span.n_lines * n_kv, -1, part.shape[2])


def _to_slots(by_head: torch.Tensor, span: Span, slots: torch.Tensor) -> None:
    """Put (S K, heads / K n, d) into a span of (N, heads, d)."""
    n, width, (_, heads, d) = span.n_lines, span.width, slots.shape
    part = slots[span.first : span.first + n * width].view(n, width, heads, d)
    part.copy_(by_head.reshape(n, heads, width, d).transpose(1, 2))


def _some(by_head: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return some rows of (S K, H / K n, ...), as many of each S K."""
    return by_head.flatten(0, 1).index_select(0, queries).view(len(by_head), -1, by_head.shape[2])


def _behind(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return what is shared (P, K, d) in front of each line's keys or values (S K, n, d)."""
    n_lines = len(own) // shared.shape[1]
    return torch.cat([shared.transpose(0, 1).repeat(n_lines, 1, 1), own], 1)


def _of_shared(dk: torch.Tensor, n_shared: int, n_kv: int) -> torch.Tensor:
    """Return what all lines send back to what they share, (P, K, d), from (S K, P + n, d)."""
    return dk[:, :n_shared].reshape(-1, n_kv, n_shared, dk.shape[2]).sum(0).transpose(0, 1)
