"""How long a merge takes beside llama.cpp's own quantizer, on the packaged model, in one sitting.

Merges a rank-8 adapter on all projections into SmolLM2-135M with Q8_0 out, alternating with `llama_model_quantize` F16 -> Q8_0
of the same model, and prints the medians and their ratio as JSON. No intermediate file is written by the merge.

    python examples/merge_speed.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np

from edgecl.places import PACKAGED, find_model
from edgecl_convert import Adapter, GgufFile, merge
from edgecl_convert.names import PROJECTIONS


def random_adapter(base: GgufFile, r: int = 8) -> Adapter:
    """Return an adapter of rank r on all projections of a model."""
    rng = np.random.default_rng(0)
    adapter = Adapter(base.architecture, lora_alpha=2.0 * r)
    for info in base.tensors.values():
        if info.name.split(".")[-2] in PROJECTIONS:
            a = rng.normal(0, 0.02, (r, info.shape[1])).astype(np.float32)
            b = rng.normal(0, 0.02, (info.shape[0], r)).astype(np.float32)
            adapter.pairs[info.name] = (a, b)
    return adapter


def llama_quantize(source: Path, target: Path) -> float:
    """Return the seconds that llama.cpp takes for F16 -> Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    began = time.perf_counter()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit("llama_model_quantize failed")
    return time.perf_counter() - began


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder, GgufFile(find_model(PACKAGED)) as base:
        adapter, half = random_adapter(base), Path(folder) / "f16.gguf"
        merge(base, None, half, "F16")
        for attempt in range(repeats + 1):
            took = merge(base, adapter, Path(folder) / "ours.gguf", "Q8_0").merge_s
            other = llama_quantize(half, Path(folder) / "theirs.gguf")
            if attempt:  # the first of each warms up
                ours.append(took)
                theirs.append(other)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(
        json.dumps(
            {
                "merge_s": round(statistics.median(ours), 3),
                "llama_model_quantize_s": round(statistics.median(theirs), 3),
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
