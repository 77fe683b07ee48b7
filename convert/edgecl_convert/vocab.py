"""A folder's tokenizer as GGUF metadata: every `tokenizer.*` field.

llama.cpp takes these fields at their word: a wrong type, a dropped merge or a missing added token makes other ids and no
error. So what is written here is derived from behaviour where it can be (the pre-tokenizer, what is added around a text), and
what llama.cpp would compute differently is refused in one line, or listed by `Vocabulary.limits`. `verify` then compares ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from .errors import ConvertError, UnsupportedError
from .hf_tokenizer import HfTokenizer, library_errors, library_tokenizer, read_json, read_tokenizer
from .sentencepiece_file import is_byte_token
from .served_tokenizer import Served, serve

_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name -> GGUF's


@dataclass(frozen=True)
class Vocabulary:
    """A folder's tokenizer as GGUF has it.

    Attributes:
        fields: every `tokenizer.*` field, in the order of the file. Python values stand for GGUF types: int uint32, bool,
            str, list[str], list[int] int32, list[float] float32, bytes an array of uint8.
        limits: one sentence for each way in which llama.cpp's ids will differ from the folder's, whatever is written.
    """

    fields: dict[str, Any]
    limits: list[str]


def read_vocabulary(folder: Path | str) -> Vocabulary:
    """Return the vocabulary of a Hugging Face folder.

    Raises:
        ConvertError: no tokenizer, a damaged file, or ids and merges that contradict each other.
        UnsupportedError: a tokenizer that llama.cpp does not have.
    """
    try:
        tokenizer = read_tokenizer(Path(folder))
        served = serve(tokenizer)
        return Vocabulary(_fields(tokenizer, served, Path(folder)), served.limits)
    except ConvertError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConvertError(f"{folder}: its tokenizer is not built as a tokenizer.json is: {error!r}") from None


def _fields(tokenizer: HfTokenizer, served: Served, folder: Path) -> dict[str, Any]:
    tokens, types = _tokens(tokenizer, served)
    fields: dict[str, Any] = {"model": served.model, "pre": served.pre, "tokens": tokens}
    if served.model == "llama":
        fields["scores"] = _scores_of_merges(tokenizer, served, tokens)
    elif served.model == "t5":
        scores = [float(score) for _, score in served.data["model"]["vocab"]]
        fields["scores"] = scores + [min(scores)] * (len(tokens) - len(scores))
    fields["token_type"] = [int(kind) for kind in types]
    if served.model == "gpt2":
        fields["merges"] = [" ".join(pair) for pair in _merges(tokenizer, served)]
    ids = {text: i for i, text in enumerate(tokens)}
    special = _special_ids(tokenizer, ids)
    template = chat_template(folder, tokenizer.settings)
    fields |= _added_around(tokenizer, special) | {f"{_KEYS[name]}_token_id": i for name, i in special.items()}
    fields |= _end_of_turn(tokenizer, special, tokens, template)
    if served.model != "gpt2":
        fields["add_space_prefix"] = served.add_space_prefix
    if served.model == "t5":
        fields["remove_extra_whitespaces"] = True
        if served.charsmap:
            fields["precompiled_charsmap"] = served.charsmap
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return named | ({"tokenizer.chat_template": template} if template else {})


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: HfTokenizer, served: Served) -> tuple[list[str], list[TokenType]]:
    """Return text and type of every id, padded up to config.json's vocab_size."""
    texts = _vocabulary(tokenizer)
    kinds = {
        i: TokenType.BYTE if served.model == "llama" and is_byte_token(text) else TokenType.NORMAL for i, text in texts.items()
    }
    ids = {text: i for i, text in texts.items()}
    for token in served.data["added_tokens"]:
        i, text = token["id"], token["content"]
        if texts.setdefault(i, text) != text or ids.get(text, i) != i:
            raise ConvertError(f"{tokenizer.path}: the added token {text!r} has the id {i}, which its vocabulary contradicts")
        kinds[i] = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
    if served.model != "gpt2" and (unknown := _unknown(tokenizer, texts)) is not None:
        kinds[unknown] = TokenType.UNKNOWN
    n_used, size = len(texts), tokenizer.config.get("vocab_size", len(texts))
    if missing := sorted(set(range(max(texts) + 1)) - texts.keys()):
        raise ConvertError(
            f"{tokenizer.path}: no token has the id {missing[0]}, but some have greater ones; ids must be without holes"
        )
    if n_used > size:
        raise ConvertError(f"{tokenizer.path}: has {n_used} tokens; config.json's vocab_size is {size}")
    known = set(texts.values())
    if nul := [text for text in known if "\0" in text]:
        raise UnsupportedError(f"{tokenizer.path}: the token {nul[0]!r} has a NUL; llama.cpp reads a token up to that")
    if len(known) < n_used:
        twice = next(text for text, n in Counter(texts.values()).items() if n > 1)
        raise ConvertError(f"{tokenizer.path}: two ids have the text {twice!r}; llama.cpp needs each text once")
    if served.model == "llama" and (lost := [b for b in range(256) if f"<0x{b:02X}>" not in known]):
        raise UnsupportedError(f"{tokenizer.path}: byte_fallback without the token <0x{lost[0]:02X}>; llama.cpp needs all 256")
    tokens = [texts[i] for i in range(n_used)] + [_padding(i, known) for i in range(n_used, size)]
    return tokens, [kinds[i] for i in range(n_used)] + [TokenType.UNUSED] * (size - n_used)


def _vocabulary(tokenizer: HfTokenizer) -> dict[int, str]:
    """Return the model's own tokens by id; where a byte and a character share one (Gemma's tab), it is the byte's."""
    vocab = tokenizer.data["model"]["vocab"]
    if isinstance(vocab, list):
        return {i: text for i, (text, _) in enumerate(vocab)}
    texts: dict[int, str] = {}
    for text, i in vocab.items():
        if i in texts and not is_byte_token(text) and not is_byte_token(texts[i]):
            raise ConvertError(f"{tokenizer.path}: id {i} is two tokens, {texts[i]!r} and {text!r}")
        if i not in texts or is_byte_token(text):
            texts[i] = text
    if not texts:
        raise ConvertError(f"{tokenizer.path}: has no tokens")
    return texts


def _unknown(tokenizer: HfTokenizer, texts: Mapping[int, str]) -> int | None:
    model = tokenizer.data["model"]
    if isinstance(model["vocab"], list):
        return int(model["unk_id"])
    return next((i for i, text in texts.items() if text == model.get("unk_token")), None)


def _padding(i: int, known: set[str]) -> str:
    name = f"[PAD{i}]"
    while name in known:
        name = f"[{name}]"
    return name


# --- merges -----------------------------------------------------------------------------------------------------------


def _merges(tokenizer: HfTokenizer, served: Served) -> list[tuple[str, str]]:
    """Return the merges in order of rank, each checked against the vocabulary."""
    model = tokenizer.data["model"]
    pairs = []
    for n, merge in enumerate(model.get("merges") or []):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        if len(pair) != 2:
            raise ConvertError(f"{tokenizer.path}: merge {n} is {merge!r}, not two tokens")
        if served.model == "gpt2" and any(" " in text for text in pair):
            raise ConvertError(f"{tokenizer.path}: merge {n} is {merge!r}; GGUF cannot write one with a space in it")
        if lost := [text for text in (*pair, "".join(pair)) if text not in model["vocab"]]:
            raise ConvertError(f"{tokenizer.path}: merge {n} is {merge!r}, but {lost[0]!r} is no token")
        pairs.append(pair)
    return pairs


def _scores_of_merges(tokenizer: HfTokenizer, served: Served, tokens: list[str]) -> list[float]:
    """Return scores that let llama.cpp merge as the merges say: it joins what makes the token with the highest score.

    The earlier a token's first merge, the higher its score; what no merge makes comes last.
    """
    pairs = _merges(tokenizer, served)
    order: dict[str, int] = {}
    for left, right in pairs:
        order.setdefault(left + right, len(order))
    _check_unlisted_pairs(tokenizer, served, set(pairs))
    return [-float(order.get(text, len(tokens))) for text in tokens]


def _check_unlisted_pairs(tokenizer: HfTokenizer, served: Served, pairs: set[tuple[str, str]]) -> None:
    """Check that llama.cpp, which joins any two parts that make a token, makes no token that the merges never make."""
    vocab = tokenizer.data["model"]["vocab"]
    added = {token["content"] for token in served.data["added_tokens"]}

    def is_part(text: str) -> bool:
        return len(text) == 1 or text in vocab  # llama.cpp begins with characters, tokens or not

    def has_unlisted(text: str) -> bool:
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        return any(is_part(left) and is_part(right) and (left, right) not in pairs for left, right in cuts)

    doubtful = [
        text for text in vocab if len(text) > 1 and text not in added and not is_byte_token(text) and has_unlisted(text)
    ]
    if not doubtful:
        return
    model = library_tokenizer(tokenizer.path, served.data).model
    with library_errors(tokenizer.path):
        never = [text for text in doubtful if len(model.tokenize(text)) != 1]
    if never:
        raise UnsupportedError(
            f"{tokenizer.path}: its merges never make {never[0]!r} ({len(never)} such tokens), but llama.cpp would; "
            "a SentencePiece BPE needs every pair that makes a token among its merges"
        )


# --- special tokens, chat template ------------------------------------------------------------------------------------


def _special_ids(tokenizer: HfTokenizer, ids: Mapping[str, int]) -> dict[str, int]:
    """Return ids by transformers' name: bos, eos, unk, pad; all but eos may be an added token that was left out."""
    found: dict[str, int] = {}
    left_out = {token["content"] for token in tokenizer.data.get("added_tokens") or []} - ids.keys()  # a limit says so
    for name in _KEYS:
        token = tokenizer.settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in left_out and name != "eos":
            continue
        if text:
            if text not in ids:
                raise ConvertError(f"{tokenizer.path}: {name}_token is {text!r}, which is no token of it")
            found[name] = ids[text]
        elif (numbers := _config_ids(tokenizer, name)) and 0 <= numbers[0] < len(ids):
            found[name] = numbers[0]
    model = tokenizer.data["model"]
    unknown = model.get("unk_id") if isinstance(model["vocab"], list) else ids.get(model.get("unk_token") or "")
    if unknown is not None:
        found.setdefault("unk", int(unknown))
    if "eos" not in found:  # llama.cpp would take token 11, 2 or 1 for it
        raise ConvertError(f"{tokenizer.path}: no end-of-sequence token is named; give eos_token in tokenizer_config.json")
    return found


def _config_ids(tokenizer: HfTokenizer, name: str) -> list[int]:
    """The ids that config.json or generation_config.json give a special token."""
    for source in (tokenizer.config, tokenizer.generation):
        value = source.get(f"{name}_token_id")
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if numbers:
            return numbers
    return []


def _added_around(tokenizer: HfTokenizer, special: dict[str, int]) -> dict[str, Any]:
    """Whether bos and eos are put around a text: as tokenizer_config.json says, or else as the post-processor does."""
    letter = {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}  # an id that no special token has
    bare = {"version": "1.0", "post_processor": tokenizer.data.get("post_processor"), "model": letter}
    ids = library_tokenizer(tokenizer.path, bare).encode("a").ids
    at = ids.index(1 << 31)
    around = {"bos": ids[:at], "eos": ids[at + 1 :]}
    flags = {}
    for name, added in around.items():
        if len(added) == 1 and not tokenizer.settings.get(f"{name}_token"):  # it knows better than config.json
            special[name] = added[0]
        explicit = tokenizer.settings.get(f"add_{name}_token")
        if explicit is None and added not in ([], [special.get(name)]):
            raise UnsupportedError(
                f"{tokenizer.path}: its post-processor adds the tokens {added}; llama.cpp adds one {name} at most"
            )
        wanted = bool(added) if explicit is None else bool(explicit)
        flags[f"add_{name}_token"] = wanted and name in special
    return flags


def _end_of_turn(tokenizer: HfTokenizer, special: dict[str, int], tokens: list[str], template: str) -> dict[str, int]:
    """The token that ends a turn, where generation stops at one that the chat template writes and that is not eos."""
    ends = tokenizer.generation.get("eos_token_id", tokenizer.config.get("eos_token_id"))
    if not isinstance(ends, list) or tokens[special["eos"]] in template:
        return {}
    written = [i for i in ends if isinstance(i, int) and 0 <= i < len(tokens) and tokens[i] in template]
    return {"eot_token_id": written[0]} if written else {}


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return a folder's chat template, "" where it has none: chat_template.jinja goes before tokenizer_config.json's.

    Raises:
        ConvertError: the file cannot be read.
    """
    try:
        return (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        template = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"{folder / 'chat_template.jinja'}: cannot be read: {error}") from None
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), "")
    return template if isinstance(template, str) else ""
