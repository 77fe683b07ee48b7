"""Training beside what people use today: Hugging Face Trainer + PEFT, on the same rows, machine and day.

Both learn the same three-epoch night from a JSONL file of chats (default: the demo's data), LoRA r = 8 on all seven
projections, eight rows a step, from the packaged SmolLM2-135M; in turn, each run in a process of its own. The peer computes
in the faster of bfloat16 and float32, which a few steps of each decide. Shown are:

- full_depth: LoRA on every layer, the peer's recipe, but that the loss is averaged over rows; speed in real (unpadded) tokens
  per second of training;
- default: new rows as a first night trains on them, its anchor to the base included; speed from the files on disk to the
  adapter, and accuracy on held-out rows beside the same night with every layer trained to the end, as later nights train;
- front: that night, the default, and the same with other shares of the layers;
- low_memory: default in 790 MB, with packed weights, and beside it full_depth in 790 MB;
- scaling: ten times as many rows, one epoch;
- large: a model of 1.2 billion random weights in 2 GB, packed.

    python examples/compare_training.py [--data FILE.jsonl] [--out compare-out] [--json]

full_depth, default and low_memory run three times by turns, with the peer's longer run after the first turn, and the median
night of each counts. Every run is kept in the output folder and not repeated while it is asked for the same. It takes about
45 minutes on two cores. Needs `accelerate` besides edgecl[demo,plot].
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecl.child import BRIEF_WAITS
from edgecl.data import parse_lines
from edgecl.metrics import paired_interval
from edgecl.places import PACKAGED, find_model
from edgecl.profile import Profile, TrainSettings
from edgecl_convert import write_atomic

Rows = list[tuple[list[int], list[bool]]]
SEEDS = (0, 1, 2)
EVERY_LAYER = (1.0, 1.0)
N_TRAIN, N_HELDOUT = 300, 150
PEER_RECIPE = TrainSettings(epochs=3, min_steps=1, anchor_weight=0.0, freeze_at=1.0, schedule="constant", warmup=0.0)
SHIPPED = TrainSettings(min_steps=1)
DEFAULT = (SHIPPED.depth, SHIPPED.freeze_at)
FRONT = (EVERY_LAYER, DEFAULT, (0.75, 1.0), (0.5, 1.0), (0.4, 1.0))  # depth, freeze_at
LOW_MEMORY_BYTES = 790_000_000
LARGE_BYTES = 2_000_000_000
LARGE_STEPS = 3
TURNS = 3  # of nights whose times are set against each other: a machine's speed changes within one of the peer's


# --- rows -------------------------------------------------------------------------------------------------------------


def chats(data: Path | None, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (prompt, answer) pairs to train on and to measure on."""
    if data is None:
        from edgecl.demo import demo_data

        parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        with tempfile.TemporaryDirectory() as folder:
            demo_data().write_stream(Path(folder), N_TRAIN // 3, N_HELDOUT // 3, seed)
            for split, rows in parts.items():
                for path in sorted((Path(folder) / split).glob("*.jsonl")):
                    rows += _pairs(path)
        return parts["train"], parts["test"]
    rows = random.Random(seed).sample(pairs := _pairs(data), len(pairs))
    n_heldout = min(N_HELDOUT, len(rows) // 3)
    return rows[n_heldout:][:N_TRAIN], rows[:n_heldout]


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Return what chats of one question ask and answer; a system turn is left out."""
    examples, bad = parse_lines(path.read_bytes().splitlines())
    if bad:
        raise SystemExit(f"{path}, line {bad[0][0]}: {bad[0][1]}")
    turns = [[turn for turn in example.messages if turn[0] != "system"] for example in examples]
    if longer := [chat for chat in turns if len(chat) != 2]:
        raise SystemExit(f"{path}: chats must be of one question and one answer, {len(longer)} are not; remove them")
    return [(asked, answer) for (_, asked), (_, answer) in turns]


def encoded(pairs: list[tuple[str, str]]) -> Rows:
    """Return token ids and what of them is supervised, without a system turn."""
    from edgecl.engine import VocabFile

    rows = []
    with VocabFile(find_model(PACKAGED)) as vocab:
        for prompt, answer in pairs:
            before = vocab.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            after = vocab.encode(f"{answer}<|im_end|>")
            rows.append((before + after, [False] * len(before) + [True] * len(after)))
    return rows


# --- runs, each in a process of its own ---------------------------------------------------------------------------------


def run_edgecl(request: dict[str, Any], progress: Callable[[int, int, float], None] | None = None) -> dict[str, Any]:
    """Train with edgecl, calling `progress` after every step; measure held-out rows afterwards."""
    from edgecl.engine import VocabFile
    from edgecl.stages import anchor_pieces
    from edgecl.train import LatentStore, Night, TrainRow, train
    from edgecl_convert import GgufFile

    settings, base = TrainSettings(**request["settings"]), find_model(PACKAGED)
    with VocabFile(base) as vocab:
        anchor = anchor_pieces(vocab)
    rows = [TrainRow(*row) for row in request["rows"]]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, GgufFile(base) as gguf:
        with LatentStore(Path(folder) / "latents.db", "base") as store:
            limits = Profile(ram_bytes=request["ram_bytes"])
            adapter, report = train(gguf, rows, [], settings, limits, Night(anchor=anchor, store=store), progress)
        facts = asdict(report) | {"night_s": time.perf_counter() - began, "peak_rss_bytes": _peak_rss()}
        return facts | _heldout(adapter, request["heldout"])


def run_peer(request: dict[str, Any]) -> dict[str, Any]:
    """Train with Hugging Face Trainer and PEFT; measure held-out rows afterwards with edgecl's decoder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GgufConfig, Trainer, TrainingArguments, set_seed

    from edgecl_convert import GgufFile, read_peft_adapter

    base, rows = find_model(PACKAGED), request["rows"]
    set_seed(request["seed"])
    began = time.perf_counter()
    quantized = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base.parent, gguf_file=base.name, dtype=torch.float32, quantization_config=quantized
    )
    model.is_quantized, model.hf_quantizer = False, None  # dense by now; Trainer would refuse otherwise
    model.config.__dict__.pop("quantization_config", None)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch])

        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        return {"input_ids": padded("input_ids", 2), "labels": padded("labels", -100), "attention_mask": torch.tensor(mask)}

    labelled = [
        {"input_ids": ids, "labels": [t if on else -100 for t, on in zip(ids, wanted, strict=True)]} for ids, wanted in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=8, num_train_epochs=3, max_steps=request.get("max_steps", -1),
            learning_rate=1e-3, lr_scheduler_type="constant", bf16=request["dtype"] == "bf16", use_cpu=True,
            save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, seed=request["seed"],
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=labelled, data_collator=collate)
        trainer.train()
        night_s, peak = time.perf_counter() - began, _peak_rss()
        log = trainer.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        train_s = log[-1]["train_runtime"]
        tokens = sum(len(ids) for ids, _ in rows) * rows_met(len(rows), len(losses)) / len(rows)
        facts = {"dtype": request["dtype"], "steps": len(losses), "losses": losses, "train_s": train_s, "night_s": night_s}
        facts |= {"tokens": tokens, "tokens_per_s": tokens / train_s, "peak_rss_bytes": peak}
        if request["heldout"]:
            model.save_pretrained(folder)
            with GgufFile(base) as gguf:
                facts |= _heldout(read_peft_adapter(folder, gguf), request["heldout"])
    return facts


def rows_met(n_rows: int, n_steps: int) -> int:
    """Return how many rows so many steps have, eight in each but the last of an epoch."""
    n_epochs, rest = divmod(n_steps, math.ceil(n_rows / 8))
    return n_epochs * n_rows + 8 * rest


def run_large(request: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps of a model of 1.2 billion random weights."""
    from edgecl.train import Night, TrainRow, train
    from edgecl_convert import GgufFile

    rng = np.random.default_rng(0)
    with GgufFile(request["model"]) as gguf:
        n_vocab = gguf.tensors["token_embd.weight"].shape[0]
        ids = [rng.integers(0, n_vocab, int(n)).tolist() for n in rng.integers(20, 40, 8 * LARGE_STEPS)]
        rows = [TrainRow(row, [False] * 12 + [True] * (len(row) - 12)) for row in ids]
        settings = replace(PEER_RECIPE, epochs=1)
        _, report = train(gguf, rows, [], settings, Profile(ram_bytes=request["ram_bytes"]), Night())
        n_weights = sum(info.n_weights for info in gguf.tensors.values())
    return asdict(report) | {"peak_rss_bytes": _peak_rss(), "n_weights": n_weights}


def _peak_rss() -> int:
    """Return the largest resident set of this process; getrusage would count that of the process it was forked from."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
    return int(status.read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024


def _heldout(adapter: Any, rows: Rows) -> dict[str, Any]:
    """Return answer loss (nats) of each row, and whether every token of its answer is the likeliest one."""
    import torch
    import torch.nn.functional as F

    from edgecl.train.decoder import Decoder
    from edgecl.train.forward import hidden_states
    from edgecl.train.lora import Lora
    from edgecl.train.weights import placement
    from edgecl_convert import GgufFile

    out: dict[str, Any] = {"heldout_losses": [], "heldout_correct": []}
    with GgufFile(find_model(PACKAGED)) as gguf, torch.no_grad():
        decoder = Decoder(gguf, placement(0))
        lora = Lora(gguf, decoder.shape, PEER_RECIPE.r, PEER_RECIPE.lora_alpha, 0, decoder.place)
        lora.warm_start(adapter)
        for first in range(0, len(rows), 8):
            part = rows[first : first + 8]
            wanted = [[t for t, on in enumerate(supervised) if on] for _, supervised in part]
            places = [(i, t - 1) for i, row in enumerate(wanted) for t in row]
            hidden = hidden_states(decoder, lora, [ids for ids, _ in part], places)
            for (ids, _), row, states in zip(part, wanted, hidden.split([len(row) for row in wanted]), strict=True):
                targets = torch.tensor([ids[t] for t in row])
                logits = torch.cat([states @ head.T for _, head in decoder.weights.head()], -1).float()
                out["heldout_losses"].append(F.cross_entropy(logits, targets).item())
                out["heldout_correct"].append(bool((logits.argmax(-1) == targets).all()))
    return out


RUNS = {"edgecl": run_edgecl, "peer": run_peer, "large": run_large}


class Cells:
    """Runs by name; one that has run is read back, where the same was asked for."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def found(self, name: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a run has found, None where there is none of this request."""
        with contextlib.suppress(OSError, ValueError, TypeError):  # none, or of an older version
            of, found = json.loads((self.out / f"{name}.json").read_text("utf-8"))
            return dict(found) if of == _digest(request) else None
        return None

    def run(self, name: str, kind: str, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return what a run found; `more` of its request is where it works, and changes nothing."""
        if (found := self.found(name, request)) is not None:
            return found
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        asked = json.dumps(request | more).encode()
        environment = os.environ if kind == "peer" else BRIEF_WAITS | os.environ  # as a night's process has it
        done = subprocess.run([sys.executable, __file__, "--run", kind], input=asked, env=environment, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr.decode()[-3000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) | {"date": time.strftime("%Y-%m-%d")}
        write_atomic(self.out / f"{name}.json", json.dumps([_digest(request), result]))
        return result


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


# --- the comparison -----------------------------------------------------------------------------------------------------


def compare(data: Path | None, out: Path) -> dict[str, Any]:
    """Run everything that has not run yet; return the figures."""
    cells = Cells(out)
    requests = {}
    for seed in SEEDS:
        train_rows, heldout = (encoded(pairs) for pairs in chats(data, seed))
        requests[seed] = {"rows": train_rows, "heldout": heldout, "seed": seed, "ram_bytes": Profile().ram_bytes}
    few = requests[0] | {"max_steps": 24, "heldout": []}  # the first steps are spent compiling kernels of bfloat16
    probes = {dtype: cells.run(f"peer-{dtype}-probe", "peer", few | {"dtype": dtype}) for dtype in ("bf16", "fp32")}
    dtype = max(probes, key=lambda name: probes[name]["tokens_per_s"])

    peer: list[dict[str, Any]] = []
    full: list[dict[str, Any]] = []
    low: list[dict[str, Any]] = []
    full_low: list[dict[str, Any]] = []
    front: dict[tuple[float, float], list[dict[str, Any]]] = {of: [] for of in FRONT}
    for seed, request in requests.items():
        recipe = request | {"settings": asdict(replace(PEER_RECIPE, seed=seed))}
        shipped = {of: request | {"settings": asdict(replace(SHIPPED, seed=seed, **_setting(of)))} for of in FRONT}
        ours = {"full": recipe, "default": shipped[DEFAULT], "low": shipped[DEFAULT] | {"ram_bytes": LOW_MEMORY_BYTES}}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ours}
        for turn in range(TURNS):
            if turn == TURNS // 2:
                peer.append(cells.run(f"peer-{dtype}-seed{seed}", "peer", request | {"dtype": dtype}))
            for name, asked in ours.items():
                turns[name].append(cells.run(f"{name}-seed{seed}-turn{turn}", "edgecl", asked))
        full.append(_median_night(turns["full"]))
        low.append(_median_night(turns["low"]))
        front[DEFAULT].append(_median_night(turns["default"]))
        for of in FRONT:
            if of != DEFAULT:
                front[of].append(cells.run("depth{:g}-frozen{:g}".format(*of) + f"-seed{seed}", "edgecl", shipped[of]))
        if not full_low:
            full_low.append(cells.run(f"full-low-seed{seed}", "edgecl", recipe | {"ram_bytes": LOW_MEMORY_BYTES}))
    large = large_cell(cells)
    some, many = (
        cells.run(f"rows{n}", "edgecl", _repeated(requests[0], n) | {"settings": asdict(replace(PEER_RECIPE, epochs=1))})
        for n in (200, 2000)
    )

    every, chosen = front[EVERY_LAYER], front[DEFAULT]
    result: dict[str, Any] = {
        "peer": {"dtype": dtype} | _facts(peer) | {f"{d}_tokens_per_s": p["tokens_per_s"] for d, p in probes.items()},
        "full_depth": _facts(full) | {"speed_ratio": _ratio(full, peer, "tokens_per_s")},
        "default": _setting(DEFAULT) | _facts(chosen) | _against(chosen, every, peer),
        "low_memory": _facts(low)
        | {
            "rss_ratio": _ratio(low, peer, "peak_rss_bytes"),
            "slowdown": _ratio(chosen, low, "tokens_per_s") - 1,
            "full_depth_rss_ratio": _ratio(full_low, peer[:1], "peak_rss_bytes"),
            "full_depth_slowdown": _ratio(full[:1], full_low, "tokens_per_s") - 1,
        },
        "large": {name: large[name] for name in ("peak_rss_bytes", "predicted_rss_bytes", "n_weights", "tokens_per_s", "plan")},
        "scaling": {
            "rows": [200, 2000],
            "speed_ratio": many["tokens_per_s"] / some["tokens_per_s"],
            "rss_ratio": many["peak_rss_bytes"] / some["peak_rss_bytes"],
        },
        "front": [_setting(of) | _facts(runs) | _against(runs, every, peer) for of, runs in front.items()],
        "loss_curves": {"peer": peer[0]["losses"], "full_depth": full[0]["losses"], "default": chosen[0]["losses"]},
        "data": data.name if data else "demo",
        "machine": {"machine": platform.machine(), "python": platform.python_version(), "date": peer[0]["date"]},
    }
    return result


def _median_night(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run whose night is the median."""
    return sorted(runs, key=lambda run: run["night_s"])[len(runs) // 2]


def _repeated(request: dict[str, Any], n: int) -> dict[str, Any]:
    rows = request["rows"]
    return request | {"rows": (rows * (n // len(rows) + 1))[:n], "heldout": []}


def large_cell(cells: Cells) -> dict[str, Any]:
    """Build the large model, train it, and remove it."""
    request = {"ram_bytes": LARGE_BYTES}
    if (found := cells.found("large", request)) is not None:
        return found
    spec = importlib.util.spec_from_file_location("random_llama", Path(__file__).parent / "lab" / "random_llama.py")
    assert spec and spec.loader
    random_llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(random_llama)
    with tempfile.TemporaryDirectory(dir=cells.out) as folder:
        model = random_llama.write_random_llama(Path(folder) / "large.gguf")
        return cells.run("large", "large", request, model=str(model))


def _setting(of: tuple[float, float]) -> dict[str, Any]:
    return dict(zip(("depth", "freeze_at"), of, strict=True))


def _facts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    median = {key: float(np.median([run[key] for run in runs])) for key in ("tokens_per_s", "night_s", "peak_rss_bytes")}
    median["accuracy"] = float(np.mean([np.mean(run["heldout_correct"]) for run in runs]))
    if "plan" in runs[0]:
        median["time_over_predicted"] = float(np.median([run["train_s"] / run["predicted_s"] for run in runs]))
        median["rss_over_predicted"] = float(np.median([run["peak_rss_bytes"] / run["predicted_rss_bytes"] for run in runs]))
    return median


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    return float(np.median([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]))


def _against(runs: list[dict[str, Any]], every: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """Return speed against the peer, from start to end, and what training fewer layers costs."""
    before, after = (np.concatenate([run["heldout_losses"] for run in part]) for part in (every, runs))
    change, low, high = paired_interval(before, after)
    right = [np.concatenate([run["heldout_correct"] for run in part]).astype(float) for part in (every, runs)]
    speed = [(a["tokens"] / a["night_s"]) / (b["tokens"] / b["night_s"]) for a, b in zip(runs, peer, strict=True)]
    return {
        "speed_ratio": float(np.median(speed)),
        "accuracy_difference": float((right[1] - right[0]).mean()),
        "answer_loss_change": change,
        "answer_loss_low": low,
        "answer_loss_high": high,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw loss curves, and speed against accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, losses in result["loss_curves"].items():
        smooth = np.convolve(losses, np.ones(9) / 9, "valid")
        left.plot(np.arange(len(smooth)) + 4, smooth, label=name)
    left.set(xlabel="step", ylabel="answer loss, nats (mean of 9 steps)", yscale="log", title="Loss")
    left.legend()
    speeds, accuracies = ([row["speed_ratio"] for row in result["front"]], [100 * row["accuracy"] for row in result["front"]])
    right.plot(speeds, accuracies, "o", label="edgecl, by depth")
    for row, *place in zip(result["front"], speeds, accuracies, strict=True):
        right.annotate(_named(row), place, textcoords="offset points", xytext=(-7, -3), ha="right")
    right.plot([1], [100 * result["peer"]["accuracy"]], "s", label=f"Trainer + PEFT, {result['peer']['dtype']}")
    right.set(xlabel="speed of a whole night, times the peer's", ylabel="held-out rows answered, %", title="Speed and accuracy")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _named(row: dict[str, Any]) -> str:
    return f"{row['depth']:g}" + (f", half frozen at {row['freeze_at']:g}" if row["freeze_at"] < 1 else "")


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"{'':<12}tokens/s  peak RSS  right")
    for name in ("peer", "full_depth", "default", "low_memory"):
        row = result[name]
        ratios = [
            f"{key} {row[key]:.3f}" for key in row if key.endswith(("_ratio", "_difference", "slowdown")) and "full" not in key
        ]
        row_start = f"{name:<12}{row['tokens_per_s']:<10.0f}{row['peak_rss_bytes'] / 1e6:>5.0f} MB  {row['accuracy']:<6.1%}"
        print(row_start, ", ".join(ratios) or row["dtype"])
    large = result["large"]
    large_size = f"{large['peak_rss_bytes'] / 1e6:>5.0f} MB  {large['n_weights'] / 1e9:.2f}e9 weights"
    print(f"{'large':<12}{large['tokens_per_s']:<10.1f}{large_size}")
    scaling = result["scaling"]
    print(f"2,000 rows against 200: speed {scaling['speed_ratio']:.2f} times, peak RSS {scaling['rss_ratio']:.2f} times")
    print("\ndepth                   night  right   against the first: accuracy, answer loss, nats (95%)")
    for row in result["front"]:
        print(
            f"{_named(row):<23} {row['speed_ratio']:<6.2f} {row['accuracy']:<7.1%} "
            f"{row['accuracy_difference']:+.1%}, {row['answer_loss_change']:+.3f} "
            f"({row['answer_loss_low']:+.3f} to {row['answer_loss_high']:+.3f})"
        )


def main() -> None:
    """Compare, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="JSONL of one question and its answer a line; default: the demo's data")
    parser.add_argument("--out", type=Path, default=Path("compare-out"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](json.load(sys.stdin))))
        return
    result = compare(arguments.data, arguments.out)
    write_atomic(arguments.out / "compare.json", json.dumps(result, indent=1) + "\n")
    draw(result, arguments.out / "compare.png")
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
