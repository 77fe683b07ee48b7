"""A full-precision base with noise in place of quantization error: the control of "When Less is More".

If quantized bases learn sequences better because their error is noise, noise of the same size must do as well. Every tensor
that Q4_0 would quantize gets normal noise with the standard deviation of its own Q4_0 error; the file is F16.

    python examples/less_is_more/noisy_base.py smollm2 NOISY.gguf --seed 0
    edgecl --home NOISY_CELLS stream DATA --model NOISY.gguf --precision f16 ...
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgecl.places import find_model
from edgecl_convert import GgufFile, merge
from edgecl_convert.ggml import Bytes
from edgecl_convert.gguf_file import copied_fields, write_gguf
from edgecl_convert.merge import planned_tensors
from edgecl_convert.recipe import Recipe


def write_noisy(base: Path, out: Path, seed: int) -> float:
    """Write the noisy base; return the noise's share of the weights' variance, over all tensors that got some."""
    rng, noise, total = np.random.default_rng(seed), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths = {quant: Path(folder) / f"{quant}.gguf" for quant in ("F16", "Q4_0")}
        with GgufFile(base) as source:
            for quant, path in paths.items():
                merge(source, None, path, quant)
        with GgufFile(paths["F16"]) as plain, GgufFile(paths["Q4_0"]) as coarse:

            def tensors() -> Iterator[Bytes]:
                nonlocal noise, total
                for name in plain.tensors:
                    weights = plain.weights(name)
                    std = float((coarse.weights(name) - weights).std())
                    if not std:
                        yield plain.blocks(name)
                        continue
                    noise, total = noise + weights.size * std**2, total + float(np.vdot(weights, weights))
                    noisy = weights + rng.normal(0.0, std, weights.shape).astype(np.float32)
                    yield noisy.astype(np.float16).view(np.uint8).reshape(len(plain.blocks(name)), -1)

            plan = planned_tensors(plain, Recipe.named("keep"))
            write_gguf(out, copied_fields(plain), plan, tensors(), plain.alignment)
    return noise / total


def main() -> None:
    """Write one and say how much noise it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    share = write_noisy(find_model(args.base), args.out, args.seed)
    print(f"{args.out}: noise is {share:.2%} of the weights' variance, as the error of Q4_0 is")


if __name__ == "__main__":
    main()
