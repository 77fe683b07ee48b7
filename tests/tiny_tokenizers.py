"""Small tokenizers, trained in code, as the tokenizer.json that a folder of each family has; and their fields as a GGUF file.

The byte-level ones are trained without splitting words: their merges run across every boundary that a pre-tokenizer makes, so
a wrong one shows at once. The file is written with gguf's own writer.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import edgecl
from edgecl_convert.sentencepiece_file import complete_merges
from edgecl_convert.torture import TORTURE, probes

SPACE = "▁"
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@cache
def corpus() -> tuple[str, ...]:
    prose = (Path(edgecl.__file__).parent / "prose.txt").read_text("utf-8")
    return (*TORTURE, *list(probes())[::3], *(prose[i : i + 500] for i in range(0, 12000, 500)))


def added(index: int, text: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"id": index, "content": text, **FLAGS, "special": special, **flags}


@cache
def _byte_level_model() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, max_token_length=8, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


def byte_level(pre_tokenizer: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A byte-level BPE with three special tokens and one that is not; `model` changes options of the model."""
    data: dict[str, Any] = json.loads(_byte_level_model())
    data["model"] |= model
    n = len(data["model"]["vocab"])
    data["pre_tokenizer"] = pre_tokenizer
    data["added_tokens"] = [
        *(added(n + i, text) for i, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))),
        added(n + 3, "<tool>", special=False),
    ]
    return data


@cache
def _sentencepiece_vocab() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Characters and merged tokens, the latter best first."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=1500, limit_alphabet=200, max_token_length=12, show_progress=False)
    tokenizer.train_from_iterator([SPACE + text.replace(" ", SPACE) for text in corpus()], trainer)
    vocab = tokenizer.get_vocab()
    tokens = sorted((token for token in vocab if "\0" not in token), key=lambda token: vocab[token])
    return tuple(t for t in tokens if len(t) == 1), tuple(t for t in tokens if len(t) > 1 and not set(t) & set("<["))


def sentencepiece_bpe(normalizer: Any = None, pre_tokenizer: Any = None) -> dict[str, Any]:
    """A SentencePiece BPE with byte fallback, in the order of Llama's: special, bytes, merged, characters.

    Llama 2's normalizer is the default.
    """
    chars, merged = _sentencepiece_vocab()
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *merged, *chars]
    vocab = {text: i for i, text in enumerate(tokens)}
    scores = {text: -float(i) for i, text in enumerate(merged)}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    data: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [added(i, text) for i, text in enumerate(tokens[:3])],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": bos_first("<s>", 1),
        "model": model | {"vocab": vocab, "merges": complete_merges(vocab, scores)},
    }
    if normalizer is None and pre_tokenizer is None:
        data["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    return data


def bos_first(text: str, index: int) -> dict[str, Any]:
    parts = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {text: {"id": text, "ids": [index], "tokens": [text]}}
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def gemma() -> dict[str, Any]:
    """As Gemma's: no space in front, runs of newlines and spaces as added tokens, a tab that shares its byte's id."""
    data = sentencepiece_bpe(
        REPLACE, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    )
    model = data["model"]
    runs = [char * n for char in ("\n", SPACE) for n in range(2, 8)]
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 4, "<end_of_turn>": 5}
    old = [text for text in model["vocab"] if text not in ("<unk>", "<s>", "</s>", "\t", *runs)]
    for text in (*runs, *old):
        vocab[text] = len(vocab)
    vocab["\t"] = vocab["<0x09>"]
    merged = [*runs, *(pair[0] + pair[1] for pair in model["merges"] if pair[0] + pair[1] not in runs)]
    scores = {text: -float(i) for i, text in enumerate(dict.fromkeys(merged))}
    model |= {"vocab": vocab, "merges": complete_merges(vocab, scores)}
    special = list(vocab)[:6]
    data["added_tokens"] = [
        *(added(i, text) for i, text in enumerate(special)),
        *(added(vocab[t], t, special=False) for t in runs),
    ]
    data["post_processor"] = bos_first("<bos>", 2)
    return data


def unigram(normalizer: Any = None) -> dict[str, Any]:
    """A unigram model as transformers makes one of SentencePiece's: spaces collapse."""
    tokenizer = Tokenizer(models.Unigram())
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=1200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    tokenizer.train_from_iterator([text.replace("\0", "").replace("<", "(") for text in corpus()], trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    collapse = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    data["normalizer"] = normalizer or {"type": "Sequence", "normalizers": [strip, collapse]}
    data["pre_tokenizer"] = metaspace("always", split=True)
    return data


def save(folder: Path, data: dict[str, Any], settings: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write tokenizer.json, tokenizer_config.json and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [token["content"] for token in data["added_tokens"]]
    eos = next((t for t in ("<|im_end|>", "</s>", "<eos>") if t in texts), None)
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos} if settings is None else settings), "utf-8")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def add_fields(writer: gguf.GGUFWriter, fields: dict[str, Any], **changed: Any) -> None:
    """Add fields; `changed` replaces them by the last part of their names."""
    for key, value in fields.items():
        value = changed.get(key.rpartition(".")[2], value)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_vocab(path: Path, fields: dict[str, Any], **changed: Any) -> Path:
    """Write fields as a GGUF file without weights."""
    writer = gguf.GGUFWriter(path, "llama")
    add_fields(writer, fields, **changed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
