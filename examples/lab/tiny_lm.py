"""Train a small float language model on the running Python's own standard library.

The packaged SmolLM2 is already quantized, so nothing about float -> INT4 can be measured on it: copying it would win. This
makes models that never were: llama- or qwen3-shaped, about 5 million parameters, float32, with a byte-level BPE vocabulary
of 4,096 tokens, as Hugging Face folders in a cache of yours.

``python examples/lab/tiny_lm.py --arch llama --seed 0 DIR`` writes DIR/llama-seed0: config.json, model.safetensors,
tokenizer.json; valid.txt to calibrate on, test.txt to measure on (files the model never saw), and result.json. A folder
that has a result.json is left alone. Rows divide by 256, so that every K-quant applies.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

Ids = np.ndarray[Any, np.dtype[np.int64]]
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
N_VOCAB, T, BATCH = 4096, 256, 16
END = "<|endoftext|>"


def corpus() -> dict[str, list[str]]:
    """Return the standard library's source files, split by a hash of their names: train 90%, valid 5%, test 5%."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if "site-packages" in name.parts or path.stat().st_size > 200_000:  # tables, not code
            continue
        bucket = hashlib.sha256(str(name).encode()).digest()[0]
        split = "test" if bucket < 13 else "valid" if bucket < 26 else "train"
        parts[split].append(path.read_text("utf-8", errors="replace"))
    return parts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with GPT-2's way of splitting words, which llama.cpp knows as `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """Return the ids (N,) of texts, one at a time (an encoding is a hundred times its ids), each followed by END."""
    return np.concatenate([np.array(tokenizer.encode(text + END).ids, np.int64) for text in texts])


def build(arch: str, width: int, seed: int) -> PreTrainedModel:
    """Return an untrained model: four heads, two of them shared; llama ties its head, qwen3 does not."""
    torch.manual_seed(seed)
    config = CONFIGS[arch](
        vocab_size=N_VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=5 if arch == "llama" else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=arch == "llama",
        bos_token_id=0,
        eos_token_id=0,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def loss_of(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats per token of (B, T + 1) ids."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def fit(model: PreTrainedModel, ids: Ids, steps: int, seed: int) -> None:
    """Train on (N,) ids: AdamW, 5% warm-up, cosine to a twentieth."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (0.05 * steps), 0.525 + 0.475 * math.cos(math.pi * i / steps))
    )
    began = time.perf_counter()
    for step in range(steps):
        starts = rng.integers(0, len(ids) - T - 1, BATCH)
        loss = loss_of(model, torch.from_numpy(np.stack([ids[s : s + T + 1] for s in starts])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            rate = (step + 1) * BATCH * T / (time.perf_counter() - began)
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)


@torch.no_grad()
def evaluate(model: PreTrainedModel, ids: Ids, n_windows: int = 64) -> float:
    """Return the mean loss in nats per token over the first windows of (N,) ids."""
    n = min(n_windows, (len(ids) - 1) // T)
    return float(np.mean([loss_of(model, torch.from_numpy(ids[i * T : i * T + T + 1])[None]).item() for i in range(n)]))


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="cache folder, outside the repository")
    parser.add_argument("--arch", choices=sorted(CONFIGS), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, choices=(256, 512), default=256)
    parser.add_argument("--steps", type=int, default=800, help=f"of {BATCH * T} tokens each (default 800)")
    args = parser.parse_args()
    folder = args.dir / f"{args.arch}-seed{args.seed}"
    if (folder / "result.json").is_file():
        print(f"{folder} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    texts = corpus()
    tokenizer = train_tokenizer(texts["train"])
    ids = {split: encode(tokenizer, part) for split, part in texts.items()}
    model = build(args.arch, args.width, args.seed)
    fit(model, ids["train"], args.steps, args.seed)
    model.eval()
    result = {
        "arch": args.arch,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.steps * BATCH * T,
        "corpus_tokens": {split: len(part) for split, part in ids.items()},
        "test_loss_nats": evaluate(model, ids["test"]),
        "seconds": round(time.perf_counter() - began),
        "python": platform.python_version(),
    }
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text("\n".join(texts[split])[:1_000_000], "utf-8")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
