"""What llama.cpp computes for a tokenizer of a Hugging Face folder.

`serve` finds the nearest tokenizer that llama.cpp has, again as a tokenizer.json: byte-level BPE, SentencePiece BPE or unigram.
Where the two differ and nothing that GGUF can say would mend it, a sentence in `limits` says so; what would break ordinary
text is refused.

*Does not cover*: WordPiece and word models, BPE on characters without byte fallback, unigram models with byte fallback. In
unigram models with a table of normalization, llama.cpp does as SentencePiece where marks follow digits or signs; the
tokenizers library does not.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from .errors import UnsupportedError
from .hf_tokenizer import HfTokenizer, library_tokenizer
from .pretokenizer import EMPTY, find_pretokenizer
from .sentencepiece_file import SPACE

_TO_SPACE_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREFIX = {"type": "Prepend", "prepend": SPACE}


@dataclass
class Served:
    """What llama.cpp computes for a tokenizer.

    Attributes:
        model: tokenizer.ggml.model: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "t5" (unigram).
        pre: tokenizer.ggml.pre.
        data: the tokenizer llama.cpp is, as the content of a tokenizer.json.
        charsmap: SentencePiece's table of normalization, for "t5".
        limits: one sentence for each way in which the folder's own tokenizer differs from it.
    """

    model: str
    pre: str
    data: dict[str, Any]
    add_space_prefix: bool = False
    charsmap: bytes = b""
    limits: list[str] = field(default_factory=list)


def serve(tokenizer: HfTokenizer) -> Served:
    """Return what llama.cpp computes for a tokenizer.

    Raises:
        ConvertError: the tokenizers library refuses it.
        UnsupportedError: nothing that is near enough.
    """
    model = tokenizer.data["model"]
    kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else "unknown")
    if kind not in ("BPE", "Unigram"):
        raise UnsupportedError(f"{tokenizer.path}: a {kind} tokenizer; llama.cpp's decoder models have BPE and unigram")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedError(f"{tokenizer.path}: {option} is {model[option]!r}; llama.cpp has none")
    pre = _parts(tokenizer.data.get("pre_tokenizer"))
    if kind == "Unigram":
        served = _serve_unigram(tokenizer, pre)
    elif any(part["type"] == "ByteLevel" for part in pre):
        served = _serve_byte_level(tokenizer)
    elif model.get("byte_fallback"):
        served = _serve_sentencepiece(tokenizer, pre)
    else:
        raise UnsupportedError(
            f"{tokenizer.path}: a BPE neither on bytes nor with byte_fallback; llama.cpp has no such tokenizer"
        )
    served.data["added_tokens"] = _served_added(tokenizer, served)
    return served


def _parts(described: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of steps."""
    if not described:
        return []
    inner = described.get("normalizers") or described.get("pretokenizers")
    if inner is None:
        return [] if described["type"] == "Sequence" else [described]
    return [step for part in inner for step in _parts(part)]


def _unhandled(tokenizer: HfTokenizer, what: str, part: dict[str, Any]) -> UnsupportedError:
    shown = json.dumps(part, ensure_ascii=False)
    return UnsupportedError(
        f"{tokenizer.path}: its {what} {shown[:120]} is nothing that llama.cpp does for this kind of tokenizer"
    )


def _normalizers(tokenizer: HfTokenizer, limits: list[str]) -> list[dict[str, Any]]:
    """The steps of the normalizer that llama.cpp may have; that it never composes characters is a limit."""
    parts = _parts(tokenizer.data.get("normalizer"))
    if any(part["type"] == "NFC" for part in parts):
        limits.append("llama.cpp does not compose characters (NFC): text that is not composed gets other tokens")
    return [part for part in parts if part["type"] != "NFC"]


def _serve_byte_level(tokenizer: HfTokenizer) -> Served:
    limits: list[str] = []
    for part in _normalizers(tokenizer, limits):
        raise _unhandled(tokenizer, "normalizer", part)
    model = tokenizer.data["model"]
    known = find_pretokenizer(tokenizer.path, tokenizer.data["pre_tokenizer"], model)
    if known.limit:
        limits.append(known.limit)
    served_model = {**model, "ignore_merges": known.ignore_merges}
    if model.get("unk_token"):  # of a byte that is no token, llama.cpp makes nothing
        served_model["unk_token"] = None
        if any(_byte_char(byte) not in model["vocab"] for byte in range(256) if byte < 0xF5 and byte not in (0xC0, 0xC1)):
            limits.append("some bytes are no tokens: llama.cpp leaves them out, the tokenizer writes its unknown token")
    data = {**tokenizer.data, "normalizer": None, "pre_tokenizer": known.description(), "model": served_model}
    return Served("gpt2", known.pre, data, limits=limits)


def _byte_char(byte: int) -> str:
    """The character that stands for a byte in a byte-level vocabulary: its own where that prints, else one from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [i for i in range(256) if i not in plain]
    return chr(byte if byte in plain else 256 + others.index(byte))


def _serve_sentencepiece(tokenizer: HfTokenizer, pre: list[dict[str, Any]]) -> Served:
    limits: list[str] = []
    prefix = marked = False
    for part in _normalizers(tokenizer, limits):
        if part == _PREFIX:
            prefix = True
        elif part == _TO_SPACE_MARK:
            marked = True
        else:
            raise _unhandled(tokenizer, "normalizer", part)
    for part in pre:
        if part["type"] == "Metaspace" and part.get("replacement") == SPACE and not prefix and not marked:
            prefix, marked = _metaspace(tokenizer, part, limits), True
        elif not (
            part["type"] == "Split" and part.get("pattern") == {"String": " "} and marked
        ):  # no space is left to split at
            raise _unhandled(tokenizer, "pre-tokenizer", part)
    if not marked:
        raise UnsupportedError(f"{tokenizer.path}: a BPE with byte_fallback that does not write spaces as {SPACE}")
    steps = [_PREFIX, _TO_SPACE_MARK] if prefix else [_TO_SPACE_MARK]
    data = {**tokenizer.data, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return Served("llama", "default", data, prefix, limits=limits)


def _metaspace(tokenizer: HfTokenizer, part: dict[str, Any], limits: list[str]) -> bool:
    """Return whether a Metaspace puts a space in front of a text; how it differs from llama.cpp's is a limit."""
    scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
    if part.get("split", True):
        for text in _texts(tokenizer.data["model"]):
            if SPACE in text[1:]:
                raise UnsupportedError(
                    f"{tokenizer.path}: splits words, but has the token {text!r}; llama.cpp does not split them"
                )
    if scheme == "first":
        limits.append(
            "llama.cpp puts a space before text after a special token and before leading spaces, the tokenizer does not"
        )
    elif scheme == "always":
        limits.append("llama.cpp puts a space before leading spaces too, the tokenizer does not")
    return bool(scheme != "never")


def _texts(model: dict[str, Any]) -> list[str]:
    return [entry[0] for entry in model["vocab"]] if isinstance(model["vocab"], list) else list(model["vocab"])


def _serve_unigram(tokenizer: HfTokenizer, pre: list[dict[str, Any]]) -> Served:
    """Unigram as T5 has it: spaces collapse, and one is put in front."""
    model = tokenizer.data["model"]
    if model.get("byte_fallback"):
        raise UnsupportedError(f"{tokenizer.path}: a unigram model with byte_fallback; llama.cpp's unigram has none")
    if model.get("unk_id") is None:
        raise UnsupportedError(f"{tokenizer.path}: a unigram model without unk_id; llama.cpp needs one")
    limits: list[str] = []
    charsmap, collapses = b"", False
    for part in _normalizers(tokenizer, limits):
        collapse = (
            part["type"] == "Replace" and part.get("pattern") == {"Regex": " {2,}"} and part.get("content") in (" ", SPACE)
        )
        if part["type"] == "Precompiled":
            charsmap = base64.b64decode(part["precompiled_charsmap"] or "")
        elif collapse:
            collapses = True
        elif part["type"] != "Strip":
            raise _unhandled(tokenizer, "normalizer", part)
    metaspace = [part for part in pre if part["type"] == "Metaspace" and part.get("replacement") == SPACE]
    for part in pre:
        if part["type"] != "WhitespaceSplit" and part not in metaspace:
            raise _unhandled(tokenizer, "pre-tokenizer", part)
    collapses = collapses or len(pre) > len(metaspace)
    if len(metaspace) != 1 or not collapses or not _metaspace(tokenizer, metaspace[0], []):
        raise UnsupportedError(
            f"{tokenizer.path}: a unigram model that does not collapse spaces and put one in front, as T5 does"
        )
    limits.append(
        "llama.cpp collapses spaces only; the tokenizer may drop other white space, and the prefix after special tokens"
    )
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": " +"}, "content": SPACE},
        _PREFIX,
    ]
    if charsmap:
        # the library looks up one mark at most of a letter with several, llama.cpp all of them: so they are composed before
        steps[:0] = [
            {"type": "NFC"},
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")},
        ]
    data = {**tokenizer.data, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return Served("t5", "default", data, True, charsmap, limits)


def _served_added(tokenizer: HfTokenizer, served: Served) -> list[dict[str, Any]]:
    """Added tokens as llama.cpp finds them: wherever their text stands, before anything else is done to it."""
    vocab, size = tokenizer.data["model"]["vocab"], tokenizer.config.get("vocab_size")
    bare = {"version": "1.0", "normalizer": tokenizer.data.get("normalizer"), "model": EMPTY}
    normalizer = library_tokenizer(tokenizer.path, bare).normalizer
    added, hidden, beyond, merged = [], [], [], []
    for token in tokenizer.data.get("added_tokens") or []:
        text = token["content"]
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise UnsupportedError(
                f"{tokenizer.path}: the added token {text!r} has lstrip, rstrip or single_word, which llama.cpp has not; "
                "set them to false if the model can do without"
            )
        if isinstance(size, int) and token["id"] >= size:
            beyond.append(text)
        elif SPACE in text and not token.get("special") and text in vocab and served.model != "gpt2":
            merged.append(text)  # merging makes it as well, and as a normal token it is shown with its spaces
        else:
            if token.get("normalized") and normalizer and normalizer.normalize_str(text) != text:
                hidden.append(text)
            added.append({**token, "normalized": False})
    if hidden:
        served.limits.append(
            f"llama.cpp finds {hidden[0]} in any text; the tokenizer only where its normalizer leaves it alone"
        )
    if merged:
        served.limits.append(
            f"llama.cpp takes a {SPACE} that is written in a text for a space; the tokenizer finds {merged[0]} there"
        )
    if beyond:
        served.limits.append(
            f"{beyond[0]} and other added tokens beyond config.vocab_size are left out: the model has no row for them"
        )
    return added
