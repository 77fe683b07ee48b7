"""Loading GGUF files into llama.cpp, and their vocabulary.

The only place that opens a model file through llama.cpp: it is walked by `edgecl_convert.GgufFile` first, because
llama.cpp aborts the whole process on some malformed files.
"""

from __future__ import annotations

import codecs
import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from edgecl_convert import ConvertError, GgufFile
from edgecl_convert.llama_model import load_params

from ..errors import DataError, EngineError

_log: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _user: object) -> None:
    if level in (3, 4):  # warnings and errors
        _log.append(text.decode("utf-8", "replace").strip())
        del _log[:-20]


llama_cpp.llama_log_set(_keep_log, None)


def why() -> str:
    """Return llama.cpp's last complaint as ': ...', or nothing."""
    return f": {_log[-1]}" if _log else ""


def check_sound(path: Path) -> None:
    """Check that llama.cpp can be trusted with a GGUF file.

    Raises:
        EngineError: it cannot be read, is truncated, or is malformed.
    """
    try:
        GgufFile(path).close()
    except ConvertError as error:
        raise EngineError(str(error)) from None


def load_model(path: Path, n_gpu_layers: int = 0, vocab_only: bool = False) -> Any:
    """Return a llama_model handle of a GGUF file.

    Raises:
        EngineError: the file is not sound, or llama.cpp refuses it.
    """
    check_sound(path)
    params = load_params(vocab_only, n_gpu_layers)
    del _log[:]
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise EngineError(f"{path}: llama.cpp could not load this model{why()}")
    return model


class Vocab:
    """The tokens of a loaded model: what training, serving and measuring share.

    Attributes:
        n_vocab: number of tokens.
        bos: id of the beginning-of-sequence token that a prompt needs, None where the model wants none.
    """

    def __init__(self, model: Any) -> None:
        """Read the vocabulary of a llama_model handle; it must be closed before the model is freed."""
        self._vocab: Any = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        add_bos = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self.bos: int | None = llama_cpp.llama_vocab_bos(self._vocab) if add_bos else None

    def close(self) -> None:
        """Let go of the model; whatever asks for a token afterwards raises EngineError."""
        self._vocab = None

    def _open(self) -> Any:
        if self._vocab is None:  # llama.cpp would read freed memory
            raise EngineError("this vocabulary's model is closed; take that of the model which is open now")
        return self._vocab

    def encode(self, text: str) -> list[int]:
        """Return token ids of `text`; special tokens written in it are recognized, none are added."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("the text is not valid Unicode: it has half of a character; write it as UTF-8") from None
        size = len(data) + 8
        buffer = (llama_cpp.llama_token * size)()
        n = llama_cpp.llama_tokenize(self._open(), data, len(data), buffer, size, False, True)
        if n < 0:
            raise EngineError(f"llama.cpp could not tokenize a text of {len(data)} bytes")
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token; control tokens give none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._open(), token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def with_bos(self, tokens: Sequence[int]) -> list[int]:
        """Return the ids of a text that nothing stands before: behind `bos`, where the model wants one."""
        return [*tokens] if self.bos is None else [self.bos, *tokens]

    def text_of(self, tokens: Sequence[int], is_indented: bool = False) -> str:
        """Return the text of an answer, up to its end-of-turn token.

        Args:
            is_indented: white space before it is part of it, as of code.
        """
        pieces = []
        for token in tokens:
            if self.is_end(token):
                break
            pieces.append(self.piece(token))
        text = b"".join(pieces).decode("utf-8", "replace").rstrip()
        return text if is_indented else text.lstrip()

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of an answer as its tokens come, never half a character; joined it is what `text_of` gives."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        waiting, has_begun = "", False
        for token in tokens:
            if self.is_end(token):
                break
            waiting += decoder.decode(self.piece(token))
            text = (waiting if has_begun else waiting.lstrip()).rstrip()
            if text:
                yield text
                has_begun, waiting = True, waiting[len(waiting.rstrip()) :]  # white space is the end, unless text follows
        if rest := decoder.decode(b"", True):
            yield waiting + rest if has_begun else rest

    def is_end(self, token: int) -> bool:
        """Return whether the token ends a turn."""
        return bool(llama_cpp.llama_vocab_is_eog(self._open(), token))


class VocabFile:
    """A model file's vocabulary without its weights; a context manager that yields a Vocab."""

    def __init__(self, path: Path | str) -> None:
        """Load it.

        Raises:
            EngineError: the file is not sound, or llama.cpp refuses it.
        """
        self._model = load_model(Path(path), vocab_only=True)
        self.vocab = Vocab(self._model)

    def __enter__(self) -> Vocab:
        return self.vocab

    def __exit__(self, *_: object) -> None:
        self.vocab.close()
        llama_cpp.llama_model_free(self._model)
