"""Which of llama.cpp's pre-tokenizers is a folder's own, found by what it does.

A byte-level BPE first splits a text into words; GGUF names the way of splitting by an id. A name or a hash of some token ids
would say nothing about a model trained yesterday, so the folder's pre-tokenizer and each of the `KNOWN` ones, described here
with the tokenizers library, split the same thousands of texts (`torture.probes`); the id whose words are all the same is the
answer. Where llama.cpp's own regular expression is not the one that its id stands for, `served` says what it is.

*Does not cover*: the dozens of ids of architectures that are not exported here.

Source:
    tokenizer.json of the models that each id was made for; llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UnsupportedError
from .hf_tokenizer import library_errors, library_tokenizer
from .torture import probes

EMPTY = {"type": "BPE", "vocab": {}, "merges": []}  # the model of a tokenizer of which only another part is wanted
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_REST = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*" + _TEKKEN_REST
_NOT_a, _NOT_A = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_TEKKEN_SERVED = rf"[^\r\n\p{{L}}\p{{N}}]?{_NOT_a}*{_NOT_A}+|[^\r\n\p{{L}}\p{{N}}]?{_NOT_a}+{_NOT_A}*" + _TEKKEN_REST
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Known:
    """A pre-tokenizer that llama.cpp has.

    Attributes:
        pre: the value of tokenizer.ggml.pre.
        splits: regular expressions, each applied to the pieces that the one before left; what matches is a piece.
        ignore_merges: whether a word that is a token is taken whole, whatever the merges say; llama.cpp decides it by the id.
        served: what llama.cpp applies where that is not `splits`, and `limit`, what this changes.
    """

    pre: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    served: tuple[str, ...] = ()
    limit: str = ""

    def description(self) -> dict[str, Any]:
        """Return what llama.cpp applies, as tokenizer.json has it."""
        return _described(self.served or self.splits)


KNOWN = (  # of ids that behave alike, one: gpt-2 is also olmo, mpt and phi-2, smollm also starcoder and command-r
    Known("gpt-2", (_GPT2,)),
    Known("smollm", (r"\p{N}", _GPT2)),
    Known("llama-bpe", (_LLAMA3,), ignore_merges=True),
    Known("smaug-bpe", (_LLAMA3,)),
    Known("qwen2", (_QWEN2,)),
    Known("qwen35", (_QWEN35,)),
    Known(
        "tekken", (_TEKKEN,), True, (_TEKKEN_SERVED,), "llama.cpp splits words before combining marks, the tokenizer does not"
    ),
    Known("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    Known("seed-coder", (_SEED,)),
)


def _described(splits: tuple[str, ...]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in splits
    ]
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


def find_pretokenizer(where: Path, described: dict[str, Any], model: dict[str, Any]) -> Known:
    """Return the known pre-tokenizer that splits as a folder's own does.

    Args:
        where: the file, for the message.
        described: the "pre_tokenizer" of a tokenizer.json.
        model: its "model", a BPE.

    Raises:
        ConvertError: the tokenizers library refuses the pre-tokenizer or the model.
        UnsupportedError: none does, or none of those does with the folder's ignore_merges, which matters to its vocabulary.
    """
    texts = list(probes())
    own = _split(where, described, texts)
    alike = [known for known in KNOWN if _splits_alike(where, known, own, texts)]
    if not alike:
        tried = ", ".join(known.pre for known in KNOWN)
        raise UnsupportedError(f"{where}: its pre-tokenizer splits text like none that llama.cpp has; tried: {tried}")
    wanted = bool(model.get("ignore_merges"))
    for known in alike:
        if known.ignore_merges == wanted:
            return known
    if _ignore_merges_matters(where, model):
        raise UnsupportedError(
            f"{where}: ignore_merges is {str(wanted).lower()}, which llama.cpp does not have for {alike[0].pre}, and it "
            "changes how tokens of this vocabulary are found"
        )
    return alike[0]


def _splitter(where: Path, described: dict[str, Any]) -> Any:
    return library_tokenizer(where, {"version": "1.0", "pre_tokenizer": described, "model": EMPTY}).pre_tokenizer


def _split(where: Path, described: dict[str, Any], texts: list[str]) -> list[list[tuple[str, tuple[int, int]]]]:
    split = _splitter(where, described).pre_tokenize_str
    with library_errors(where):
        return [split(text) for text in texts]


def _splits_alike(where: Path, known: Known, own: list[list[tuple[str, tuple[int, int]]]], texts: list[str]) -> bool:
    split = _splitter(where, _described(known.splits)).pre_tokenize_str
    return all(split(text) == words for text, words in zip(texts, own, strict=True))


def _ignore_merges_matters(where: Path, model: dict[str, Any]) -> bool:
    """Whether a token of the vocabulary is not what the merges make of its own text."""
    plain = library_tokenizer(where, {"version": "1.0", "model": {**model, "ignore_merges": False}}).model
    with library_errors(where):
        return any(len(plain.tokenize(token)) != 1 for token in model["vocab"])
