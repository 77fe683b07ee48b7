"""A decoder for training: the layers of a base with LoRA on the upper ones, over rows packed into one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from edgecl_convert import GgufFile

from ..shape import read_shape
from .lora import Lora
from .ops import Attend, Lines, Norm, Project, RmsNorm
from .weights import Placement, Weights

OUT_MULTIPLE = 64  # of tokens that leave the last layer: kernels for each other number would take 30 MB


@dataclass(frozen=True)
class Sequenced:
    """Where the tokens of a packed sequence stand: angles (T, 1, head_dim / 2) as cosine and sine, and what sees what.

    Attributes:
        window_turns: the angles of layers that look back over a window, or None.
    """

    turns: tuple[torch.Tensor, torch.Tensor]
    window_turns: tuple[torch.Tensor, torch.Tensor] | None
    lines: Lines


class Decoder:
    """A base in the dtype of training. `run` goes through some of its layers; what a batch looks like is `forward`'s matter.

    Attributes:
        checkpointing: whether a layer keeps only its input and is computed again in the backward pass.
    """

    def __init__(self, gguf: GgufFile, place: Placement, n_resident: int | None = None, resident_head: bool = True) -> None:
        """Read the weights of a GGUF file; which of them stay decoded is as for `Weights`.

        Raises:
            UnsupportedError, GgufError: as `read_shape`, or a tensor is missing or has no place.
        """
        self.shape = read_shape(gguf)
        self.place = place
        self.weights = Weights(gguf, self.shape, place, n_resident, resident_head)
        self.checkpointing = False

    def run(
        self,
        x: torch.Tensor,
        where: Sequenced,
        lora: Lora | None,
        first: int = 0,
        last: int | None = None,
        n_wanted: int | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (T, D) after layers first ... last - 1, for those that enter layer `first`.

        Args:
            n_wanted: of so many tokens in front only; the others are spared what the last layer does after attention.
        """
        last = self.shape.n_layer if last is None else last
        for layer in range(first, last):
            n_out = n_wanted if layer == last - 1 else None
            if self.checkpointing and lora is not None and torch.is_grad_enabled() and layer >= lora.first_layer:
                x = _Recomputed.apply(x, lora.flat, self, layer, where, lora, n_out)
            else:
                x = self.layer(x, layer, where, lora, n_out)
        return x[:n_wanted]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the head multiplies, (T, D)."""
        out: torch.Tensor = RmsNorm.apply(x, Norm(self.weights.output_norm(), self.shape.norm_eps))
        return out

    def layer(self, x: torch.Tensor, layer: int, where: Sequenced, lora: Lora | None, n_out: int | None = None) -> torch.Tensor:
        """Return the hidden states (T, D) after one layer; with `n_out`, of at least so many tokens in front."""
        shape = self.shape
        heads = [shape.n_head, shape.n_kv, shape.n_kv]

        def norm(name: str) -> Norm:
            return Norm(self.weights.norm(layer, name), shape.norm_eps)

        def normed(values: torch.Tensor, name: str) -> torch.Tensor:
            out: torch.Tensor = RmsNorm.apply(values, norm(name))
            return out

        def project(values: torch.Tensor, group: str, before: Norm | None = None, gelu: bool | None = None) -> torch.Tensor:
            held = None if lora is None else lora.groups.get((layer, group))
            flat = lora.flat if lora is not None and layer >= lora.first_layer else None  # no graph below the first
            return Project.apply(values, flat, self.weights, layer, group, held, before, gelu)

        is_near = shape.looks_back_over_a_window(layer)
        turns = where.window_turns if is_near and where.window_turns else where.turns
        qkv = project(x, "qkv", norm("attn_norm")).view(len(x), sum(heads), shape.head_dim)
        if shape.norms_heads:
            q, k, v = qkv.split(heads, 1)
            qkv = torch.cat([normed(q, "attn_q_norm"), normed(k, "attn_k_norm"), v], 1)
        seen = Attend.apply(qkv, *turns, where.lines, shape.n_kv, is_near, shape.score_scale)
        if n_out is not None:
            n_out += -n_out % OUT_MULTIPLE
            seen, x = seen[:n_out], x[:n_out]
        out = project(seen, "out")
        x = x + (normed(out, "post_attention_norm") if shape.is_gemma else out)
        down = project(project(x, "gate_up", norm("ffn_norm")), "down", gelu=shape.is_gemma)
        return x + (normed(down, "post_ffw_norm") if shape.is_gemma else down)

    def turns(self, positions: torch.Tensor, theta: float, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (T, 1, head_dim / 2) of the rotary angles at positions (T,)."""
        steps = torch.arange(0, self.shape.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = theta ** -(steps / self.shape.head_dim)
        if factors is not None:
            frequencies = frequencies / factors
        angles = positions[:, None, None].float() * frequencies
        return angles.cos().to(self.place.dtype), angles.sin().to(self.place.dtype)


class _Recomputed(torch.autograd.Function):
    """A layer that keeps only its input and is computed again in the backward pass: a little slower, far smaller."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        trained: torch.Tensor,
        decoder: Decoder,
        layer: int,
        where: Sequenced,
        lora: Lora,
        n_out: int | None,
    ) -> torch.Tensor:
        """Return the layer's output."""
        ctx.save_for_backward(x)
        ctx.again = (decoder, layer, where, lora, n_out)
        return decoder.layer(x, layer, where, lora, n_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of x; those of the factors go to their buffers."""
        decoder, *rest = ctx.again
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            y = decoder.layer(x, *rest)
            (y * dy).sum().backward()  # given a gradient, torch would load sympy: 36 MB
        return x.grad, None, None, None, None, None, None
