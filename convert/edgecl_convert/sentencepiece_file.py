"""tokenizer.model, SentencePiece's own file, read as the tokenizer.json it would be.

The file is a protocol buffer; the few fields that matter are found by their public numbers, so neither sentencepiece nor
protobuf is needed. A BPE's merges are not stored: every way to cut a piece into two other pieces is one, and the better a
piece's score, the earlier its merges come.

*Does not cover*: word and character models, white space as a suffix.

Source:
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from .errors import ConvertError, UnsupportedError

SPACE = "▁"
_MODELS = {1: "Unigram", 2: "BPE"}


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score, and its type, which GGUF numbers alike."""

    text: str
    score: float
    type: TokenType


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """Return the content of the tokenizer.json that says the same.

    Raises:
        ConvertError: the file is damaged.
        UnsupportedError: neither BPE nor unigram.
    """
    try:
        message = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in message if number == 1]
        trainer, normalizer = (dict(_fields(_last(message, number, b""))) for number in (2, 3))
        charsmap = _data(normalizer.get(2, b""))
    except (struct.error, LookupError, TypeError, ValueError):
        raise ConvertError(f"{path}: is not a SentencePiece model, or damaged") from None
    kind = _MODELS.get(trainer.get(3, 1))
    if kind is None or not pieces or trainer.get(24):
        raise UnsupportedError(f"{path}: only SentencePiece's BPE and unigram models are handled, spaces as prefixes")
    unknown = next((piece.text for piece in pieces if piece.type == TokenType.UNKNOWN), None)
    fallback = any(piece.type == TokenType.BYTE for piece in pieces)
    model: dict[str, Any] = {"type": kind, "byte_fallback": fallback}
    if kind == "BPE":
        vocab = {piece.text: i for i, piece in enumerate(pieces)}
        scores = {piece.text: piece.score for piece in pieces if piece.type in (TokenType.NORMAL, TokenType.USER_DEFINED)}
        model |= {"vocab": vocab, "merges": complete_merges(vocab, scores), "unk_token": unknown, "fuse_unk": True}
    else:
        ids = [i for i, piece in enumerate(pieces) if piece.text == unknown]
        model |= {"vocab": [[piece.text, piece.score] for piece in pieces], "unk_id": ids[0] if ids else None}
    parts, metaspace = _normalizers(kind, normalizer, charsmap)
    return {
        "version": "1.0",
        "added_tokens": [_added(i, piece) for i, piece in enumerate(pieces) if _is_added(piece)],
        "normalizer": {"type": "Sequence", "normalizers": parts},
        "pre_tokenizer": metaspace,
        "post_processor": None,
        "model": model,
    }


def is_byte_token(text: str) -> bool:
    """Whether a token stands for a byte: <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def complete_merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[list[str]]:
    """Return every pair of tokens that makes a third, best first: by the score of what they make, then by the ids of the pair.

    Args:
        scores: of the tokens that merging may make.
    """
    merges = []
    for text, score in scores.items():
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
        merges += [(-score, vocab[left], vocab[right], left, right) for left, right in pairs]
    return [[left, right] for _, _, _, left, right in sorted(merges)]


def _normalizers(kind: str, spec: Mapping[int, Any], charsmap: bytes) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What is done to a text before it is cut: SentencePiece's flags in the form of tokenizer.json."""
    prefix, collapse = spec.get(3, 1), spec.get(4, 1)
    parts: list[dict[str, Any]] = []
    if charsmap:
        parts.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")})
    if collapse:
        parts.append({"type": "Strip", "strip_left": False, "strip_right": True})
        parts.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE})
    if kind == "Unigram":
        scheme = "always" if prefix else "never"
        return parts, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    if prefix:
        parts.append({"type": "Prepend", "prepend": SPACE})
    parts.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return parts, None


def _is_added(piece: Piece) -> bool:
    return piece.type in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


def _added(index: int, piece: Piece) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": piece.text, **flags, "special": piece.type != TokenType.USER_DEFINED}


# --- protocol buffers -------------------------------------------------------------------------------------------------


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return Piece(_data(fields[1]).decode("utf-8"), score, TokenType(fields.get(3, 1)))


def _data(value: Any) -> bytes:
    if not isinstance(value, bytes):  # bytes(n) would be n zeros
        raise TypeError("a number where bytes belong")
    return value


def _last(message: list[tuple[int, Any]], number: int, default: Any) -> Any:
    return next((value for field, value in reversed(message) if field == number), default)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a message: whole numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, len(data) + 1)
        if at + size > len(data):
            raise ValueError("a field ends past the end of the message")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
