"""LoRA: y = W x + scaling * B (A x), with W frozen, A and B trained in float32.

Adapters cross this module's border in GGUF's layout (`edgecl_convert.Adapter`); inside, rows are in transformers' order.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgecl_convert import Adapter, AdapterError, GgufFile
from edgecl_convert.names import PROJECTIONS, from_gguf_rows, head_counts, module_of, n_heads_permuted, to_gguf_rows


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update.

    Attributes:
        lora_A: (r, in) float32.
        lora_B: (out, r) float32, zero at first, so that an untrained adapter changes nothing.
    """

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, generator: torch.Generator) -> None:
        """Wrap `base`; lora_A is drawn as peft draws it (Kaiming uniform, a = sqrt 5)."""
        super().__init__()
        self.base = base
        self.scaling = lora_alpha / r
        bound = 1.0 / math.sqrt(base.in_features)
        a = torch.rand((r, base.in_features), generator=generator)
        self.lora_A = nn.Parameter((2 * a - 1) * bound)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        update = F.linear(low, (self.scaling * self.lora_B).to(x.dtype))  # (..., out)
        return F.linear(x, self.base.weight, self.base.bias) + update


class LoraModel:
    """The adapter of a model: its layers by the GGUF name of the weight that they update."""

    def __init__(self, model: nn.Module, gguf: GgufFile, r: int, lora_alpha: float, seed: int) -> None:
        """Put LoRA on all seven projections of every layer of `model`, in place."""
        self.gguf, self.lora_alpha = gguf, lora_alpha
        self.layers: dict[str, LoraLinear] = {}
        generator = torch.Generator().manual_seed(seed)
        for name in gguf.tensors:
            if name.split(".")[-2:-1] and name.split(".")[-2] in PROJECTIONS and name.endswith(".weight"):
                path = module_of(name, gguf.architecture).removesuffix(".weight")
                parent, _, child = path.rpartition(".")
                holder = model.get_submodule(parent)
                layer = LoraLinear(getattr(holder, child), r, lora_alpha, generator)
                setattr(holder, child, layer)
                self.layers[name] = layer

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that is trained."""
        return [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]

    def warm_start(self, adapter: Adapter) -> None:
        """Go on from an adapter, whose layers may have a smaller rank; layers that it does not have stay new.

        Raises:
            AdapterError: it does not fit the base, or has a larger rank.
        """
        adapter.check_fits(self.gguf)
        heads = head_counts(self.gguf)
        for name, (a, b) in adapter.pairs.items():
            layer, r = self.layers.get(name), len(a)
            if layer is None:
                raise AdapterError(f"adapter changes {name}, which is not trained here; allowed: {', '.join(PROJECTIONS)}")
            if r > len(layer.lora_A):
                raise AdapterError(f"adapter has r {r}, train.r is {len(layer.lora_A)}; set train.r to at least {r}")
            rows = from_gguf_rows(b, n_heads_permuted(name, self.gguf.architecture, heads))
            rescale = adapter.scaling(name) / layer.scaling
            with torch.no_grad():
                layer.lora_A[:r] = torch.from_numpy(np.ascontiguousarray(a))
                layer.lora_B[:, :r] = torch.from_numpy(np.ascontiguousarray(rows)) * rescale
                layer.lora_B[:, r:] = 0.0

    def adapter(self) -> Adapter:
        """Return the trained adapter in GGUF's layout."""
        heads = head_counts(self.gguf)
        adapter = Adapter(self.gguf.architecture, self.lora_alpha)
        for name, layer in self.layers.items():
            b = layer.lora_B.detach().numpy().copy()
            rows = to_gguf_rows(b, n_heads_permuted(name, self.gguf.architecture, heads))
            adapter.pairs[name] = (layer.lora_A.detach().numpy().copy(), np.ascontiguousarray(rows))
        return adapter
