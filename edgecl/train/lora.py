"""LoRA: y = W x + scaling * B (A x), with W frozen, A and B trained in float32.

Of weights that are merged into minimums (`edgecl_convert.grid`), A is the same over the 32 columns of a block, as in QA-LoRA
(Xu et al. 2024): so a file of 4 bits has all of the update.

All factors lie in one flat parameter: one optimizer step, one norm, one cast a step. Adapters cross this module's border in
GGUF's layout (`edgecl_convert.Adapter`); inside, rows are in transformers' order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from edgecl_convert import Adapter, AdapterError, GgufFile
from edgecl_convert.grid import MINIMUM_BLOCK, by_block
from edgecl_convert.names import PROJECTIONS, from_gguf_rows, head_counts, n_heads_permuted, to_gguf_rows

from ..shape import GROUPS, Shape
from .weights import Placement


@dataclass
class LoraGroup:
    """The factors of projections that share an input, in the dtype of training, and where their gradients go.

    Attributes:
        a: (k r, in), the lora_A of k projections one below the other.
        b: (out, k r), their lora_B as blocks on the diagonal.
        a_grad: (k r, in) float32; b_grads: (out of a projection, r) float32 each.
    """

    scaling: float
    a: torch.Tensor
    b: torch.Tensor
    blocks: list[torch.Tensor]  # each projection's lora_B in the dtype of training
    a_grad: torch.Tensor
    b_grads: list[torch.Tensor]

    def refresh(self) -> None:
        """Put the blocks of B in their places; a single one is `b` itself."""
        if len(self.blocks) > 1:
            for block, place in zip(self.blocks, self._diagonal(self.b), strict=True):
                place.copy_(block)

    def add_gradients(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add gradients: `a` of the shape of `a`, `b` of that of the transpose of `b`, both for a scaling of 1."""
        self.a_grad.add_(a, alpha=self.scaling)
        for grad, part in zip(self.b_grads, self._diagonal(b.T), strict=True):
            grad.add_(part, alpha=self.scaling)

    def _diagonal(self, b: torch.Tensor) -> list[torch.Tensor]:
        parts, row = [], 0
        for i, grad in enumerate(self.b_grads):
            n_out, r = grad.shape
            parts.append(b[row : row + n_out, i * r : (i + 1) * r])
            row += n_out
        return parts


@dataclass
class _Place:
    """Where a projection's factors stand in the flat parameter."""

    a: slice
    b: slice
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]


@dataclass
class Lora:
    """The adapter of a model.

    Attributes:
        flat: every number; its gradient is `flat.grad`.
        first_layer: the lowest layer that is trained; those below are frozen.
        in_blocks: names of weights whose A is the same over each block of columns.
    """

    gguf: GgufFile
    shape: Shape
    r: int
    lora_alpha: float
    seed: int
    place: Placement
    in_blocks: Collection[str] = ()
    first_layer: int = field(default=0, init=False)
    flat: nn.Parameter = field(init=False)
    groups: dict[tuple[int, str], LoraGroup] = field(init=False)

    def __post_init__(self) -> None:
        """Draw lora_A as peft draws it (Kaiming uniform, a = sqrt 5); lora_B is zero, so nothing changes at first."""
        self._places: dict[str, _Place] = {}
        self._begins: list[int] = []  # where the factors of each layer begin in `flat`
        at = 0
        for layer in range(self.shape.n_layer):
            self._begins.append(at)
            for group, projections in GROUPS.items():
                at = self._lay_out(layer, projections, self.shape.columns(group), at)
        self.flat = nn.Parameter(torch.zeros(at, device=self.place.device))
        self.flat.grad = torch.zeros_like(self.flat)
        self._cast = self.flat.detach().to(self.place.dtype)  # itself, where training is in float32
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, place in self._places.items():
                a = torch.rand(place.a_shape, generator=generator)
                self.a(name).copy_((2 * a - 1) / math.sqrt(place.a_shape[1]))
        self._tied = self._places.keys() & set(self.in_blocks)
        for name in self._tied:
            blocks = _blocks(self.a(name))
            blocks.copy_(blocks[..., :1].clone())
        self.groups = {(layer, group): self._group(layer, group) for layer in range(self.shape.n_layer) for group in GROUPS}
        self.refresh()

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.lora_alpha / self.r

    @property
    def names(self) -> list[str]:
        """GGUF names of the weights that it is for."""
        return list(self._places)

    def a(self, name: str) -> torch.Tensor:
        """Return lora_A (r, in) of a weight: a view of `flat`."""
        place = self._places[name]
        return self.flat.detach()[place.a].view(place.a_shape)

    def b(self, name: str) -> torch.Tensor:
        """Return lora_B (out, r) of a weight, rows in transformers' order: a view of `flat`."""
        place = self._places[name]
        return self.flat.detach()[place.b].view(place.b_shape)

    def gradients(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of lora_A and lora_B of a weight: views of `flat.grad`."""
        place, grad = self._places[name], self.flat.grad
        assert grad is not None
        return grad[place.a].view(place.a_shape), grad[place.b].view(place.b_shape)

    def tie_gradients(self) -> None:
        """Give all of a block the same gradient, their mean, so that one step moves them together."""
        for name in self._tied:
            blocks = _blocks(self.gradients(name)[0])
            blocks.copy_(blocks.mean(-1, keepdim=True))

    def refresh(self) -> None:
        """Bring what products use up to date with `flat`, once after each change of it."""
        if self.place.dtype != torch.float32:
            self._cast.copy_(self.flat.detach())
        for group in self.groups.values():
            group.refresh()

    @property
    def trained(self) -> slice:
        """Which numbers of `flat` are trained."""
        return slice(self._begins[self.first_layer], None)

    def freeze_below(self, layer: int) -> None:
        """Keep the layers below one as they are; those that change nothing are not computed any more."""
        self.first_layer = layer
        for key in [key for key, group in self.groups.items() if key[0] < layer and not any(b.any() for b in group.blocks)]:
            del self.groups[key]

    def warm_start(self, adapter: Adapter) -> None:
        """Go on from an adapter, whose layers may have a smaller rank; layers that it does not have stay new.

        Raises:
            AdapterError: it does not fit the base, or has a larger rank.
        """
        adapter.check_fits(self.gguf)
        for name, (a, b) in adapter.pairs.items():
            if name.split(".")[-2] not in PROJECTIONS:
                raise AdapterError(f"adapter changes {name}, which is not trained here; allowed: {', '.join(PROJECTIONS)}")
            if len(a) > self.r:
                raise AdapterError(f"adapter has r {len(a)}, train.r is {self.r}; set train.r to at least {len(a)}")
            rows = torch.from_numpy(np.ascontiguousarray(from_gguf_rows(b, self._n_permuted(name))))
            rows = rows * (adapter.scaling(name) / self.scaling)
            with torch.no_grad():
                self.a(name)[: len(a)] = torch.from_numpy(np.ascontiguousarray(a))
                self.b(name)[:, : len(a)] = rows
                self.b(name)[:, len(a) :] = 0.0
            if by_block(a) is None:  # of nights that were not merged into minimums: it goes on as it is
                self._tied.discard(name)
        self.refresh()

    def digest_below(self) -> str:
        """Return a digest of what frozen layers have, "" where they change nothing."""
        if not any(layer < self.first_layer for layer, _ in self.groups):
            return ""
        below = self.flat.detach()[: self.trained.start].cpu()
        return hashlib.blake2b(below.numpy().tobytes(), digest_size=16).hexdigest()

    def adapter(self) -> Adapter:
        """Return the adapter in GGUF's layout, without weights of frozen layers that it does not change."""
        adapter = Adapter(self.gguf.architecture, self.lora_alpha)
        changed = [name for name in self._places if self._places[name].a.start >= self.trained.start or self.b(name).any()]
        for name in (name for name in self.gguf.tensors if name in changed):
            a, b = (factor.cpu().numpy().copy() for factor in (self.a(name), self.b(name)))
            if name in self._tied:  # steps may have left last bits apart
                a = a[:, ::MINIMUM_BLOCK].repeat(MINIMUM_BLOCK, 1)
            adapter.pairs[name] = (a, np.ascontiguousarray(to_gguf_rows(b, self._n_permuted(name))))
        return adapter

    def _n_permuted(self, name: str) -> int:
        return n_heads_permuted(name, self.gguf.architecture, head_counts(self.gguf))

    def _lay_out(self, layer: int, projections: tuple[str, ...], n_in: int, at: int) -> int:
        """Give the projections of a group their places from `at` on, every A before every B; return what follows."""
        ends = np.cumsum([at] + [self.r * n_in] * len(projections) + [self.r * self.shape.rows(p) for p in projections])
        spans = [slice(int(a), int(b)) for a, b in pairwise(ends)]
        for i, projection in enumerate(projections):
            self._places[f"blk.{layer}.{projection}.weight"] = _Place(
                spans[i], spans[i + len(projections)], (self.r, n_in), (self.shape.rows(projection), self.r)
            )
        return int(ends[-1])

    def _group(self, layer: int, group: str) -> LoraGroup:
        places = [self._places[f"blk.{layer}.{projection}.weight"] for projection in GROUPS[group]]
        grad = self.flat.grad
        assert grad is not None
        stacked = slice(places[0].a.start, places[-1].a.stop)
        blocks = [self._cast[place.b].view(place.b_shape) for place in places]
        n_in = places[0].a_shape[1]
        b = blocks[0]
        if len(blocks) > 1:
            b = self._cast.new_zeros(sum(len(block) for block in blocks), self.r * len(blocks))
        return LoraGroup(
            self.scaling,
            self._cast[stacked].view(-1, n_in),
            b,
            blocks,
            grad[stacked].view(-1, n_in),
            [grad[place.b].view(place.b_shape) for place in places],
        )


def _blocks(a: torch.Tensor) -> torch.Tensor:
    """Return a view (r, blocks, 32) of (r, in)."""
    return a.view(len(a), -1, MINIMUM_BLOCK)
