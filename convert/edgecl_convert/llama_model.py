"""A GGUF file in llama.cpp, as far as verifying needs it: its token ids and its logits.

The file is walked by GgufFile before llama.cpp sees it, because llama.cpp ends the whole process on some malformed ones.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .amx import WITH_AMX, has_amx
from .errors import ConvertError, GgufError
from .ggml import F32Array, default_threads
from .gguf_file import GgufFile

_F32 = 0  # GGML_TYPE_F32, of the KV cache
_N_BATCH = 64  # tokens whose logits are in memory at once


def llama_threads() -> int:
    """Return OMP_NUM_THREADS, or every core: llama.cpp's threads wait by spinning, and crawl where another program computes."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(wanted), default_threads()) if wanted.isdecimal() and int(wanted) else default_threads()


def load_params(vocab_only: bool = False, n_gpu_layers: int = 0) -> Any:
    """Return how a model is loaded: with AMX kernels, and so repacked ones, only where a process is to have them (`amx`)."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = n_gpu_layers, vocab_only
    params.use_extra_bufts = WITH_AMX in os.environ or not has_amx()
    return params


def fill(batch: Any, tokens: Sequence[int], first: int) -> None:
    """Put a part of one sequence into a llama_batch, at the positions from `first`, with logits for every token."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, True


@contextmanager
def _heard(api: Any) -> Iterator[list[str]]:
    """Yield what llama.cpp complains about meanwhile, instead of on stderr."""
    complaints: list[str] = []

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, _user: object) -> None:
        if level in (3, 4):  # warnings and errors
            complaints.append(text.decode("utf-8", "replace").strip())

    before, user = api.llama_log_callback(), ctypes.c_void_p()
    api.llama_log_get(ctypes.byref(before), ctypes.byref(user))
    api.llama_log_set(keep, None)
    try:
        yield complaints
    finally:
        api.llama_log_set(before, user)


def _check_vocabulary(gguf: GgufFile) -> None:
    """Check what llama.cpp would end the process on: the same text for two ids, a byte without a token, a missing bos or eos.

    Raises:
        GgufError: the vocabulary is not sound.
    """
    texts = [text.split("\0")[0] for text in gguf.require("tokenizer.ggml.tokens")]  # as llama.cpp reads them
    if len(set(texts) - {""}) < len(texts) - texts.count(""):
        raise GgufError(gguf.path, "has the same token text at two ids (tokenizer.ggml.tokens)")
    if gguf.get("tokenizer.ggml.model") == "llama" and (lost := {f"<0x{byte:02X}>" for byte in range(256)} - set(texts)):
        raise GgufError(gguf.path, f"lacks the byte token {min(lost)} (tokenizer.ggml.tokens)")
    for name in ("bos", "eos"):
        index = gguf.get(f"tokenizer.ggml.{name}_token_id")
        if gguf.get(f"tokenizer.ggml.add_{name}_token") and (not isinstance(index, int) or index >= len(texts)):
            raise GgufError(gguf.path, f"asks for {name} around a text, but has no {name} token")


class LlamaModel:
    """A loaded file; close it, or use it as a context manager.

    Attributes:
        n_vocab: number of tokens.
    """

    def __init__(self, path: Path | str, vocab_only: bool = False) -> None:
        """Load it; `vocab_only` leaves the weights on the disk.

        Raises:
            ConvertError: the file is not sound, or llama.cpp refuses it.
        """
        import llama_cpp

        with GgufFile(path) as gguf:
            _check_vocabulary(gguf)
        self.path, self._api = Path(path), llama_cpp
        self._listening = ExitStack()
        self._complaints = self._listening.enter_context(_heard(llama_cpp))
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), load_params(vocab_only))
        if not self._model:
            self.close()
            raise ConvertError(f"{path}: llama.cpp could not load this model{self._why()}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None
        self._listening.close()

    def _why(self) -> str:
        return f": {self._complaints[-1]}" if self._complaints else ""

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Return the ids of a text; special tokens written in it are recognized, `add_special` puts bos and eos around it."""
        data = text.encode("utf-8")
        size = len(data) + 16
        buffer = (self._api.llama_token * size)()
        n = self._api.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, True)
        if n < 0:
            raise ConvertError(f"{self.path}: llama.cpp could not tokenize a text of {len(data)} bytes")
        return list(buffer[:n])

    def logits(self, ids: Sequence[int], n_threads: int = 0) -> Iterator[F32Array]:
        """Yield (n, V) logits of consecutive parts of one sequence, computed with an F32 KV cache.

        Raises:
            ConvertError: memory does not suffice, or llama.cpp failed.
        """
        api = self._api
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = max(len(ids), _N_BATCH), _N_BATCH, _N_BATCH
        settings.n_threads = settings.n_threads_batch = n_threads or llama_threads()
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = api.llama_init_from_model(self._model, settings)
        if not context:
            raise ConvertError(f"{self.path}: llama.cpp could not make a context of {settings.n_ctx} tokens{self._why()}")
        batch: Any = api.llama_batch_init(_N_BATCH, 0, 1)
        try:
            for first in range(0, len(ids), _N_BATCH):
                part = ids[first : first + _N_BATCH]
                fill(batch, part, first)
                if status := api.llama_decode(context, batch):
                    raise ConvertError(
                        f"{self.path}: llama.cpp could not compute {len(part)} tokens (status {status}){self._why()}"
                    )
                pointer = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
                yield np.ctypeslib.as_array(pointer, (len(part), self.n_vocab)).copy()
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)
