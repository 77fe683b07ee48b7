"""Base weights: a GGUF file's tensors, decoded once into the dtype of training, or anew each time they are multiplied.

Resident weights cost 2 bytes each (bfloat16). Packed ones stay in the memory-mapped file; a layer's are decoded into
one scratch that all layers share, in the forward and again in the backward pass. Both are the same numbers: the kernels are
ggml's, so an adapter is trained against exactly the weights that the file serves. How many layers are resident is the planner's
choice: those nearest the head, because they are trained and gone through most often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgecl_convert import GgufFile, UnsupportedError
from edgecl_convert.ggml import bf16_is_fast, default_threads, dequantize, dequantize_into
from edgecl_convert.names import from_gguf_rows, head_counts, n_heads_permuted

from ..shape import GROUPS, Shape

HEAD_PART = 1 << 22  # weights of the head that are multiplied at once

_NORMS = ("attn_norm", "ffn_norm")
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_POST_NORMS = ("post_attention_norm", "post_ffw_norm")


@dataclass(frozen=True)
class Placement:
    """Where tensors live and in which dtype products are computed."""

    device: torch.device
    dtype: torch.dtype


def placement(n_gpu_layers: int) -> Placement:
    """Return CUDA, where torch sees it and models may use it, or the CPU; bfloat16 where that is multiplied fast."""
    if n_gpu_layers and torch.cuda.is_available():
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Placement(torch.device("cuda"), torch.bfloat16 if is_fast else torch.float32)
    return Placement(torch.device("cpu"), torch.bfloat16 if bf16_is_fast() else torch.float32)


def threads_beside_the_assistant() -> int:
    """Return the threads that leave a core to who is chatting meanwhile, where there are more than two."""
    cores = default_threads()
    return cores - 1 if cores > 2 else cores


class Weights:
    """The frozen weights of a base, by layer and group of projections."""

    def __init__(
        self, gguf: GgufFile, shape: Shape, place: Placement, n_resident: int | None = None, resident_head: bool = True
    ) -> None:
        """Decode norms and biases, the `n_resident` layers nearest the head (None: all), and the head if it is to stay.

        Raises:
            UnsupportedError: a tensor is missing, or has no place in a model of this architecture.
        """
        self.gguf, self.shape, self.place = gguf, shape, place
        self._heads = head_counts(gguf)
        self._head_name = "output.weight" if "output.weight" in gguf.tensors else "token_embd.weight"
        _check_tensors(gguf, shape)
        self._small = {name: self._vector(name) for name, info in gguf.tensors.items() if len(info.shape) == 1}
        self.biases = {(layer, group): self._bias(layer, group) for layer in range(shape.n_layer) for group in GROUPS}
        self._scratch: dict[str, torch.Tensor] = {}
        self._in_scratch = -1
        self._layers: dict[int, dict[str, torch.Tensor]] = {}
        self._head: torch.Tensor | None = None
        self._head_scratch: torch.Tensor | None = None
        if resident_head:
            self._head = self._empty(shape.n_vocab, shape.width)
            self._decode([(self._head_name, 0, self._head)])
        for layer in range(0 if n_resident is None else shape.n_layer - n_resident, shape.n_layer):
            self._layers[layer] = self._decode_layer(layer, self._empty_layer())

    def group(self, layer: int, group: str) -> torch.Tensor:
        """Return the (out, in) rows of a group of projections, one below the other; packed ones only until another layer's."""
        if (held := self._layers.get(layer)) is not None:
            return held[group]
        if self._in_scratch != layer:
            self._scratch = self._decode_layer(layer, self._scratch or self._empty_layer())
            self._in_scratch = layer
        return self._scratch[group]

    def norm(self, layer: int, name: str) -> torch.Tensor:
        """Return the factors of a norm of a layer, float32."""
        return self._small[f"blk.{layer}.{name}.weight"]

    def output_norm(self) -> torch.Tensor:
        """Return the factors of the last norm, float32."""
        return self._small["output_norm.weight"]

    def rotary_factors(self) -> torch.Tensor | None:
        """Return what Llama 3.1 divides its rotary frequencies by, (head_dim / 2,), or None."""
        return self._small.get("rope_freqs.weight")

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the embeddings (T, D) of tokens; only their rows are decoded."""
        rows = self._rows("token_embd.weight", ids)
        if self.shape.is_gemma:
            rows *= self.shape.width**0.5
        return rows.to(self.place.dtype)

    def head_rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the head's rows (T, D) of tokens, as they are multiplied, in float32."""
        return self._rows(self._head_name, ids).to(self.place.dtype).float()

    def head(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the head in parts: the first token of a part, and its rows (n, D), good until the next part."""
        step = self._head_step()
        for first in range(0, self.shape.n_vocab, step):
            last = min(first + step, self.shape.n_vocab)
            if self._head is not None:
                yield first, self._head[first:last]
                continue
            if self._head_scratch is None:
                self._head_scratch = self._empty(step, self.shape.width)
            self._decode([(self._head_name, first, self._head_scratch[: last - first])])
            yield first, self._head_scratch[: last - first]

    def _head_step(self) -> int:
        """Return the rows of a part: a multiple of head.NTH, and parts of one size if any does: few shapes of products."""
        most = max(16, HEAD_PART // self.shape.width // 16 * 16)
        even = (step for step in range(most, most // 2, -16) if self.shape.n_vocab % step == 0)
        return next(even, most)

    def _rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        info = self.gguf.tensors[name]
        rows = dequantize(self.gguf.blocks(name)[np.asarray(ids)], info.qtype, info.shape[-1])
        self.gguf.release(name)
        return torch.from_numpy(rows).to(self.place.device)

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=self.place.dtype, device=self.place.device)

    def _empty_layer(self) -> dict[str, torch.Tensor]:
        rows = {group: sum(self.shape.rows(name) for name in names) for group, names in GROUPS.items()}
        return {group: self._empty(rows[group], self.shape.columns(group)) for group in GROUPS}

    def _vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.gguf.weights(name).copy()).to(self.place.device)

    def _bias(self, layer: int, group: str) -> torch.Tensor | None:
        """Return the biases of a group in the dtype of training, rows in the order of its weights, or None."""
        names = [f"blk.{layer}.{name}.bias" for name in GROUPS[group]]
        if not any(name in self._small for name in names):
            return None
        parts = [
            from_gguf_rows(self.gguf.weights(name), n_heads_permuted(name, self.shape.architecture, self._heads))
            if name in self._small
            else np.zeros(self.shape.rows(projection), np.float32)
            for name, projection in zip(names, GROUPS[group], strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts)).to(self.place.device, self.place.dtype)

    def _decode_layer(self, layer: int, out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = []
        for group, names in GROUPS.items():
            rows = out[group].split([self.shape.rows(name) for name in names])
            parts += [(f"blk.{layer}.{name}.weight", 0, part) for name, part in zip(names, rows, strict=True)]
        self._decode(parts)
        return out

    def _decode(self, parts: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        """Decode rows of tensors: each from a row on, into a (rows, in) tensor."""
        stored = []
        for name, first, out in parts:
            n_heads = n_heads_permuted(name, self.shape.architecture, self._heads)
            blocks = self.gguf.blocks(name)[first : first + len(out)]
            stored.append((from_gguf_rows(blocks, n_heads), self.gguf.tensors[name].qtype))  # bytes, a tenth of the weights
        if self.place.device.type == "cpu":
            # numpy alone: torch's threads, once awake, would take a core from those that decode
            outs = [(out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy() for _, _, out in parts]
            tensors = [(blocks, qtype, to) for (blocks, qtype), to in zip(stored, outs, strict=True)]
            dequantize_into(tensors, torch.get_num_threads())
        else:
            for (blocks, qtype), (_, _, out) in zip(stored, parts, strict=True):
                out.copy_(torch.from_numpy(dequantize(blocks, qtype, out.shape[1])))
        for name, _, _ in parts:
            self.gguf.release(name)


def _check_tensors(gguf: GgufFile, shape: Shape) -> None:
    norms = [*_NORMS]
    if shape.norms_heads:
        norms += _QK_NORMS
    if shape.is_gemma:
        norms += _POST_NORMS
    layers = [f"blk.{layer}." for layer in range(shape.n_layer)]
    wanted = {"token_embd.weight", "output_norm.weight"}
    sizes = {
        f"{layer}{name}.weight": (shape.rows(name), shape.columns(group))
        for layer in layers
        for group, names in GROUPS.items()
        for name in names
    }
    wanted |= sizes.keys() | {f"{layer}{name}.weight" for layer in layers for name in norms}
    allowed = wanted | {"output.weight", "rope_freqs.weight"} | {name.removesuffix("weight") + "bias" for name in sizes}
    if missing := sorted(wanted - gguf.tensors.keys()):
        raise UnsupportedError(f"{gguf.path}: lacks the weights of {missing[0]}")
    for name, size in sizes.items():  # blocks are decoded by address
        if (got := gguf.tensors[name].shape) != size:
            raise UnsupportedError(f"{gguf.path}: {name} is {got}, its metadata wants {size}; download it again")
    if others := sorted(gguf.tensors.keys() - allowed):
        raise UnsupportedError(f"{gguf.path}: tensor {others[0]} has no place in a {shape.architecture} model")
