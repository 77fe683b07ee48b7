"""What a Hugging Face folder says about its tokenizer.

tokenizer.json is the tokenizer: it is read as it stands, with the tokenizers library. (transformers 5 rebuilds some classes
from their names instead, and may then differ.) Only where it is missing, tokenizer.model is read as if it were one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConvertError
from .sentencepiece_file import read_sentencepiece


@dataclass(frozen=True)
class HfTokenizer:
    """A folder's tokenizer.

    Attributes:
        path: tokenizer.json or tokenizer.model.
        data: the content of tokenizer.json.
        settings: special_tokens_map.json and, over it, tokenizer_config.json.
        config: config.json, the part of the text model.
        generation: generation_config.json.
    """

    path: Path
    data: dict[str, Any]
    settings: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is no file.

    Raises:
        ConvertError: it cannot be read, or is not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_tokenizer(folder: Path) -> HfTokenizer:
    """Read a folder's tokenizer.

    Raises:
        ConvertError: there is none, or a file is damaged.
        UnsupportedError: only a tokenizer.model of a kind that is not handled.
    """
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    config = read_json(folder / "config.json")
    path = folder / "tokenizer.json"
    if path.is_file():
        data = read_json(path)
    elif (path := folder / "tokenizer.model").is_file():
        data = read_sentencepiece(path)
        _add_later_tokens(data, folder, settings)
        settings = {"add_bos_token": True} | settings  # as transformers has it for these models
    else:
        raise ConvertError(
            f"{folder}: has no tokenizer.json and no tokenizer.model; load its tokenizer with transformers and save it there"
        )
    if not isinstance(data.get("model"), dict) or "vocab" not in data["model"]:
        raise ConvertError(f'{path}: has no "model" with a "vocab"')
    text = config.get("text_config")
    return HfTokenizer(
        path, data, settings, text if isinstance(text, dict) else config, read_json(folder / "generation_config.json")
    )


def _add_later_tokens(data: dict[str, Any], folder: Path, settings: dict[str, Any]) -> None:
    """Add what was put beside a tokenizer.model later: added_tokens.json, and tokenizer_config.json's added_tokens_decoder."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    later = {int(i): plain | {"content": text} for text, i in read_json(folder / "added_tokens.json").items()}
    later |= {int(i): plain | token for i, token in settings.get("added_tokens_decoder", {}).items()}
    kept = [token for token in data["added_tokens"] if token["id"] not in later]
    data["added_tokens"] = kept + [{"id": i, **token} for i, token in sorted(later.items())]
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):
        for i, token in later.items():
            if i < len(vocab):
                vocab[i][0] = token["content"]
        return
    names = {i: text for text, i in vocab.items()}
    for i, token in later.items():
        if i in names and names[i] != token["content"]:  # a place that was kept free for it
            vocab[token["content"]] = vocab.pop(names[i])


def library_tokenizer(where: Path, data: dict[str, Any]) -> Any:
    """Return the tokenizers library's Tokenizer of a tokenizer.json's content; whole texts, no padding.

    Raises:
        ConvertError: the library refuses it.
    """
    from tokenizers import Tokenizer

    with library_errors(where):
        return Tokenizer.from_str(json.dumps({**data, "truncation": None, "padding": None}))


@contextmanager
def library_errors(where: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises within the block into a ConvertError."""
    try:
        yield
    except Exception as error:  # the library raises nothing narrower
        raise ConvertError(f"{where}: the tokenizers library refuses it: {error}") from None
