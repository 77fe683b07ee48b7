"""How close 4-bit files stay to the float model: llama.cpp's Q4_K_M, the adaptive recipe, and plain types.

Measures the calibration text on the float model, writes one file per recipe, and compares each in llama.cpp (F32 KV cache)
with the float file on a text that nothing was calibrated on. Q4_K_M is `llama_model_quantize` with the same importance matrix;
the adaptive recipe gets no more bytes than that file has. Intervals are 95% bootstraps over windows.

    python examples/int4_recipes.py MODEL --calibrate valid.txt --test test.txt [--windows 64]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgecl.engine import GGML_TYPE_F32, Engine
from edgecl_convert import GgufFile, Imatrix, adaptive_recipe, measure, merge, open_source

WINDOW = 256  # tokens
FloatArray = NDArray[np.float64]
F32Array = NDArray[np.float32]


@dataclass
class Measured:
    """One file against the float file; per window, in nats per token."""

    name: str
    n_bytes: int
    n_weights: int
    kld: FloatArray
    loss: FloatArray

    def row(self) -> dict[str, Any]:
        low, high = interval(self.kld)
        return {
            "recipe": self.name,
            "bytes": self.n_bytes,
            "bits_per_weight": round(8 * self.n_bytes / self.n_weights, 3),
            "kld_nats": float(f"{self.kld.mean():.3g}"),
            "interval": [float(f"{low:.3g}"), float(f"{high:.3g}")],
            "perplexity": round(float(np.exp(self.loss.mean())), 3),
        }


def interval(values: FloatArray, n_draws: int = 2000) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).integers(0, len(values), (n_draws, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def llama_q4_k_m(source: Path, target: Path, imatrix: Imatrix | None) -> None:
    """Write llama.cpp's own Q4_K_M."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    entries, kept = imatrix_entries(imatrix) if imatrix else (None, [])
    if entries is not None:
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit("llama_model_quantize failed")
    del kept


def imatrix_entries(imatrix: Imatrix) -> tuple[Any, list[object]]:
    """Return llama.cpp's array of entries, ended by an empty one, and what must outlive it."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix.sums) + 1))()
    kept: list[object] = []
    for entry, name in zip(entries, imatrix.sums, strict=False):
        values = imatrix.importance(name)
        assert values is not None
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        kept.append(values)
    return entries, kept


def log_probabilities(path: Path, windows: list[list[int]]) -> list[F32Array]:
    """Return (T, V) log-probabilities of each window."""
    found = []
    with Engine(path, n_ctx=WINDOW, n_seq=1, kv_type=GGML_TYPE_F32) as engine:
        for ids in windows:
            logits = engine.logits(ids)
            logits -= logits.max(-1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return found


def compare(name: str, path: Path, windows: list[list[int]], reference: list[F32Array]) -> Measured:
    """Measure one file."""
    kld, loss = [], []
    for ids, p, q in zip(windows, reference, log_probabilities(path, windows), strict=True):
        kld.append(float((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean()))
        loss.append(float(-q[np.arange(len(ids) - 1), ids[1:]].mean()))
    with GgufFile(path) as file:
        n_weights = sum(info.n_weights for info in file.tensors.values())
    return Measured(name, path.stat().st_size, n_weights, np.array(kld), np.array(loss))


def test_windows(path: Path, text: str, n_windows: int) -> list[list[int]]:
    """Return windows of token ids, evenly spread over a text."""
    with Engine(path, n_ctx=WINDOW, n_seq=1) as engine:
        ids = engine.vocab.encode(text)
    n = len(ids) // WINDOW
    if n == 0:
        raise SystemExit(f"the test text must have at least {WINDOW} tokens, got {len(ids)}")
    starts = np.linspace(0, n - 1, min(n, n_windows)).round().astype(int) * WINDOW
    return [ids[start : start + WINDOW] for start in starts]


def run(model: Path, calibration: str, test: str, n_windows: int, folder: Path) -> dict[str, Any]:
    """Write and measure every recipe; return the table and the paired difference."""
    reference, stock = folder / "float.gguf", folder / "Q4_K_M.gguf"
    with open_source(model) as source:
        merge(source, None, reference, "F32")
        imatrix = measure(source, calibration)
    llama_q4_k_m(reference, stock, imatrix)
    llama_q4_k_m(reference, folder / "Q4_K_M without imatrix.gguf", None)
    with GgufFile(reference) as source:
        recipe = adaptive_recipe(source, imatrix, imatrix.sensitivities, stock.stat().st_size)
        merge(source, None, folder / "adaptive.gguf", recipe, imatrix=imatrix)
        for quant in ("Q4_0", "Q4_1"):
            merge(source, None, folder / f"{quant}.gguf", quant, imatrix=imatrix)
    windows = test_windows(reference, test, n_windows)
    wanted = log_probabilities(reference, windows)
    names = ("float", "Q4_K_M without imatrix", "Q4_K_M", "adaptive", "Q4_0", "Q4_1")
    found = {name: compare(name, folder / f"{name}.gguf", windows, wanted) for name in names}
    ours, theirs = found["adaptive"].kld, found["Q4_K_M"].kld
    return {
        "model": str(model),
        "windows": len(windows),
        "table": [measured.row() for measured in found.values()],
        "predicted_nats": recipe.predicted_nats,
        "kld_ratio": round(float(ours.mean() / theirs.mean()), 3),
        "kld_difference_interval": list(interval(ours - theirs)),
        "types": {name: qtype.name for name, qtype in recipe.types.items()},
    }


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a float GGUF file or Hugging Face folder")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    texts = args.calibrate.read_text("utf-8"), args.test.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        result = run(args.model, *texts, args.windows, Path(folder))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'recipe':24s} {'bytes':>12s} {'bits/w':>7s} {'KLD':>9s} {'95%':>20s} {'ppl':>9s}")
    for row in result["table"]:
        span = "{:.3g} to {:.3g}".format(*row["interval"])
        print(f"{row['recipe']:24s} {row['bytes']:12,d} {row['bits_per_weight']:7.3f} {row['kld_nats']:9.3g}", end=" ")
        print(f"{span:>20s} {row['perplexity']:9.3f}")
    low, high = result["kld_difference_interval"]
    print(f"adaptive against Q4_K_M: KLD times {result['kld_ratio']}, difference {low:.2g} to {high:.2g}")


if __name__ == "__main__":
    main()
