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


class Norm(NamedTuple):
    """Of an RMS norm: its factors (D,), float32 and frozen, and what is added to the mean square."""

    factors: torch.Tensor
    eps: float


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
        norm: Norm | None,
        gelu: bool | None,
    ) -> torch.Tensor:
        """Map (T, in) to (T, out).

        What is mapped in place of x, is computed again in the backward pass: that spares its memory, a third of what a layer
        would keep.

        Args:
            trained: the adapter's parameter: the output then belongs to the graph even where x does not.
            lora: the group's factors, None where it has none.
            norm: x is mapped after this norm.
            gelu: x is gate and up (T, 2 in), side by side, and active(gate) * up is mapped.
        """
        kept, inverse = x, None
        if norm is not None:
            x, inverse = _normed(x, norm)
        if gelu is not None:
            gate, up = x.chunk(2, -1)
            x = _active(gate, gelu).mul_(up)
        y = F.linear(x, weights.group(layer, group), weights.biases[layer, group])
        low = None
        if lora is not None:
            low = x @ lora.a.T  # (T, k r)
            y.addmm_(low, lora.b.T, alpha=lora.scaling)
        ctx.save_for_backward(kept, low, inverse)
        ctx.weights, ctx.layer, ctx.group, ctx.lora, ctx.norm, ctx.gelu = weights, layer, group, lora, norm, gelu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Add the gradients of A and B to their buffers; return that of x."""
        kept, low, inverse = ctx.saved_tensors
        lora: LoraGroup | None = ctx.lora
        norm: Norm | None = ctx.norm
        x, unit, active, dlow = kept, None, None, None
        if norm is not None:
            unit = _wide(kept).mul_(inverse)
            x = (unit * norm.factors).to(kept.dtype)
        if ctx.gelu is not None:
            gate, up = kept.chunk(2, -1)
            active = _active(gate, ctx.gelu)
            x = active * up
        if lora is not None:
            dlow = dy @ lora.b
            lora.add_gradients(dlow.T @ x, low.T @ dy)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weights.group(ctx.layer, ctx.group)
            if lora is not None and dlow is not None:
                dx.addmm_(dlow, lora.a, alpha=lora.scaling)
            if active is not None:
                dx = _gated_backward(kept, active, dx, ctx.gelu)
            if norm is not None and unit is not None:
                dx = _norm_backward(unit, inverse, norm.factors, dx)
        return dx, None, None, None, None, None, None, None


class RmsNorm(torch.autograd.Function):
    """y = x / rms(x) * factors over the last dimension, computed in float32; the factors are frozen."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Norm (T, ..., D)."""
        y, inverse = _normed(x, norm)
        ctx.save_for_backward(x, norm.factors, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of x."""
        x, factors, inverse = ctx.saved_tensors
        return _norm_backward(_wide(x).mul_(inverse), inverse, factors, dy), None


def _normed(x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x after a norm over the last dimension, and 1 / rms(x), (..., 1) float32."""
    wide = _wide(x)
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
    return wide.mul_(inverse).mul_(norm.factors).to(x.dtype), inverse


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x in float32: changing that in place is faster than operations whose operands differ in type."""
    return x.to(torch.float32, copy=True)


def _norm_backward(unit: torch.Tensor, inverse: torch.Tensor, factors: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x from that of its norm; unit is x / rms(x), float32."""
    g = _wide(dy).mul_(factors)  # (..., D)
    projected = (g * unit).mean(-1, keepdim=True)
    return g.addcmul_(unit, projected, value=-1).mul_(inverse).to(dy.dtype)


def _active(gate: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    """Return SiLU of a gate (T, F), or the GELU of gemma."""
    return F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)


def _gated_backward(gate_up: torch.Tensor, active: torch.Tensor, dy: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    """Return the gradient of gate and up (T, 2 F), which stand side by side, from that of active * up."""
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    d_gate, d_up = out.chunk(2, -1)
    torch.mul(active, dy, out=d_up)
    through = dy.mul_(up)
    if is_gelu:
        d_gate.copy_(torch.ops.aten.gelu_backward(through, gate, approximate="tanh"))
    else:
        torch.ops.aten.silu_backward(through, gate, grad_input=d_gate)
    return out


class Bucket(NamedTuple):
    """Rows of about the same length, side by side: S lines of n slots, in each of which whole rows stand.

    Heads are rows of their own while they attend, so that one step of indexing lays them out. What an empty slot takes is any.

    Attributes:
        queries, keys: (S H n,) and (S K (P + n),) where what each slot asks and offers stands among the heads of turned
            queries and keys (T (H + K)); values: the same among those of queries, keys and values (T (H + 2 K)). The tree's P
            tokens stand in front of every line.
        from_out: (S H n,) where the gradient that each slot gets stands among those of the heads of all tokens; one behind
            them, a row of zeros, for an empty slot.
        bias: (S K, H / K n, P + n), 0 where a slot sees a token of the tree or a slot, and -inf where not.
        near: the same within a window, or None.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    from_out: torch.Tensor
    bias: torch.Tensor
    near: torch.Tensor | None


class Lines(NamedTuple):
    """How the T tokens of a packed sequence attend, and where they find what comes of it in all buckets, one after the other.

    Attributes:
        out: (T H,) of the heads of each token, and of its queries; d_keys: (T K,) of its keys, and of its values.
        tree: the tokens which stand in front of every line, besides slots of their own.
    """

    out: torch.Tensor
    d_keys: torch.Tensor
    tree: range
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
        n_qk, d = qkv.shape[1] - n_kv, qkv.shape[2]
        turned = qkv.new_empty(len(qkv), n_qk, d)
        _rotate(qkv[:, :n_qk], cos, sin, turned)
        turned_heads, heads = turned.view(-1, d), qkv.view(-1, d)
        mixed, kept = [], []
        for bucket in lines.buckets:
            bias = bucket.near if is_near and bucket.near is not None else bucket.bias
            q, k = (turned_heads.index_select(0, at).view(len(bias), -1, d) for at in (bucket.queries, bucket.keys))
            v = heads.index_select(0, bucket.values).view(len(bias), -1, d)
            share = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale), -1)
            mixed.append(torch.bmm(share, v).view(-1, d))
            kept += [q, k, v, share]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.lines, ctx.n_kv, ctx.scale = lines, n_kv, scale
        return _joined(mixed).index_select(0, lines.out).view(len(qkv), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of qkv."""
        cos, sin, *kept = ctx.saved_tensors
        lines, n_kv, d = ctx.lines, ctx.n_kv, kept[0].shape[-1]
        n, n_tree = len(dy), len(lines.tree)
        d_out = F.pad(dy.view(-1, d), (0, 0, 0, 1))
        parts: tuple[list[torch.Tensor], ...] = [], [], []  # of queries, keys and values
        of_tree: tuple[list[torch.Tensor], ...] = [], []
        for i, bucket in enumerate(lines.buckets):
            q, k, v, share = kept[4 * i : 4 * i + 4]
            d_mixed = d_out.index_select(0, bucket.from_out).view(len(k), -1, d)
            d_share = torch.bmm(d_mixed, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype).mul_(ctx.scale)
            dk, dv = torch.bmm(d_scores.transpose(1, 2), q), torch.bmm(share.transpose(1, 2), d_mixed)
            for found, gradient in zip(parts, (torch.bmm(d_scores, k), dk, dv), strict=True):
                found.append(gradient.view(-1, d))
            for found, gradient in zip(of_tree, (dk, dv), strict=True):
                found.append(gradient[:, :n_tree].reshape(len(gradient) // n_kv, n_kv, n_tree, d).sum(0).transpose(0, 1))
        dq = _joined(parts[0]).index_select(0, lines.out).view(n, -1, d)
        dk, dv = (_joined(part).index_select(0, lines.d_keys).view(n, n_kv, d) for part in parts[1:])
        for gradient, found in zip((dk, dv), of_tree, strict=True):
            for of_bucket in found:  # what all lines send back to what they share
                gradient[lines.tree.start : lines.tree.stop] += of_bucket
        n_head = dq.shape[1]
        out = dy.new_empty(n, n_head + 2 * n_kv, d)
        _rotate(dq, cos, -sin, out[:, :n_head])
        _rotate(dk, cos, -sin, out[:, n_head : n_head + n_kv])
        out[:, n_head + n_kv :] = dv
        return out, None, None, None, None, None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
