"""One model in llama.cpp, with at most one LoRA adapter: load, switch, run, generate.

An Engine belongs to one turn at a time, of whatever thread: who shares one holds a lock for the whole turn, as `Learner.turn`
does. Switching an adapter or a model empties the KV cache. Everything is greedy and therefore repeatable.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgecl_convert.ggml import default_threads

from ..data import common_length
from ..errors import EngineError
from .model import Vocab, check_sound, load_model, why

F32Array = NDArray[np.float32]

GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1


def _identity(path: Path) -> tuple[Path, int, int, int] | None:
    """Return what tells a file from another that takes its place later; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return path, stat.st_dev, stat.st_ino, stat.st_mtime_ns


class Engine:
    """A loaded model; close it, or use it as a context manager.

    Attributes:
        n_seq: sequences that can be scored at once.
    """

    def __init__(
        self,
        model: Path | str,
        adapter: Path | str | None = None,
        *,
        n_ctx: int = 2048,
        n_batch: int = 512,
        n_threads: int = 0,
        n_gpu_layers: int = 0,
        n_seq: int = 16,
        kv_type: int = GGML_TYPE_F16,
    ) -> None:
        """Load a model.

        Args:
            n_ctx: tokens of the KV cache, shared by all sequences.
            n_threads: 0 takes every core this process may use.
            kv_type: GGML_TYPE_F32 for parity tests, with flash attention off.

        Raises:
            EngineError: the file is not sound, llama.cpp refuses it, or memory does not suffice.
        """
        self.n_ctx, self.n_seq, self._kv_type = n_ctx, n_seq, kv_type
        self.n_batch = min(max(n_batch, n_seq + 1), n_ctx)  # outside of this range llama.cpp aborts the process
        self._n_threads = n_threads or default_threads()
        self._n_gpu_layers = n_gpu_layers
        self._load(Path(model), adapter)

    def _load(self, path: Path, adapter: Path | str | None) -> None:
        self._ctx = self._lora = self._batch = None
        self._held: list[int] = []  # what `generate` left in the cache
        self._loaded = _identity(path)  # before it is read: where it is replaced meanwhile, it is loaded again
        self._model: Any = load_model(path, self._n_gpu_layers)
        self._vocab = Vocab(self._model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.n_ctx, self.n_batch, self.n_batch
        settings.n_seq_max, settings.kv_unified = self.n_seq + 1, True  # one more for a prefix that rows share
        settings.n_threads = settings.n_threads_batch = self._n_threads
        settings.type_k = settings.type_v = self._kv_type
        if self._kv_type == GGML_TYPE_F32:
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._ctx = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._ctx:
            self.close()
            raise EngineError(f"{path}: llama.cpp could not make a context of {self.n_ctx} tokens{why()}")
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)
        self.model_path = path
        try:
            self.set_adapter(adapter)
        except EngineError:
            self.close()
            raise

    @property
    def vocab(self) -> Vocab:
        """The model's tokens.

        Raises:
            EngineError: the engine is closed.
        """
        self._check_open()
        return self._vocab

    def _check_open(self) -> None:
        if self._batch is None:  # llama.cpp would read freed memory
            raise EngineError("this engine is closed; open another")

    def switch(self, model: Path | str, adapter: Path | str | None = None) -> None:
        """Serve another generation from the next turn on; the KV cache is emptied.

        Raises:
            EngineError: it cannot be loaded; the engine is then closed, until a switch to one that can.
        """
        if self._batch is not None and _identity(Path(model)) == self._loaded:
            self.set_adapter(adapter)
            return
        self.close()
        self._load(Path(model), adapter)

    def set_adapter(self, adapter: Path | str | None) -> None:
        """Apply a GGUF LoRA file to the loaded model, or none; the KV cache is emptied.

        Raises:
            EngineError: the file is not sound, or llama.cpp refuses it; the model then has no adapter.
        """
        self.clear()
        llama_cpp.llama_set_adapters_lora(self._ctx, None, 0, None)
        self._free_adapter()
        if adapter:
            check_sound(Path(adapter))
            self._lora = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(adapter))
            if not self._lora:
                raise EngineError(f"{adapter}: llama.cpp could not load this adapter{why()}")
            handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._lora)
            scales = (ctypes.c_float * 1)(1.0)
            if llama_cpp.llama_set_adapters_lora(self._ctx, handles, 1, scales):
                raise EngineError(f"{adapter}: llama.cpp could not apply this adapter{why()}")

    def _free_adapter(self) -> None:
        if self._lora:
            llama_cpp.llama_adapter_lora_free(self._lora)
            self._lora = None

    def close(self) -> None:
        """Free the model; whatever uses the engine afterwards raises EngineError."""
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
            self._batch = None
        if self._ctx:
            llama_cpp.llama_free(self._ctx)
            self._ctx = None
        self._free_adapter()
        if self._model:
            self._vocab.close()
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the KV cache -------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Empty the KV cache."""
        self._check_open()
        self._held = []
        llama_cpp.llama_memory_clear(self._memory, True)

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> None:
        """Let sequence `target` share the first `n_tokens` of sequence `source`."""
        self._check_open()
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, n_tokens)

    def forget_from(self, sequence: int, position: int) -> None:
        """Drop a sequence's tokens from `position` on (0: the whole sequence)."""
        self._check_open()
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, position or -1, -1)

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(self, items: Sequence[tuple[int, int, int, bool]]) -> list[F32Array]:
        """Run at most n_batch (token, position, sequence, wanted) items; return the logits (V,) of the wanted ones.

        The arrays are views of llama.cpp's buffer: they hold until the next call.

        Raises:
            EngineError: too many items, the cache is full, or llama.cpp failed.
        """
        self._check_open()
        if len(items) > self.n_batch:
            raise EngineError(f"{len(items)} tokens at once, n_batch is {self.n_batch}; feed them in parts")
        batch: Any = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = llama_cpp.llama_decode(self._ctx, batch)
        if status:
            raise EngineError(
                f"{self.model_path}: llama.cpp could not compute {len(items)} tokens (status {status}, "
                f"n_ctx {self.n_ctx}){why()}; shorten the prompt or raise n_ctx"
            )
        shape = (self._vocab.n_vocab,)
        return [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._ctx, i), shape)
            for i, item in enumerate(items)
            if item[3]
        ]

    def feed(self, tokens: Sequence[int], start: int = 0, sequence: int = 0) -> None:
        """Put tokens into the cache of one sequence from position `start` on."""
        for first in range(0, len(tokens), self.n_batch):
            chunk = tokens[first : first + self.n_batch]
            self.forward([(token, start + first + i, sequence, False) for i, token in enumerate(chunk)])
        llama_cpp.llama_synchronize(self._ctx)

    def logits(self, tokens: Sequence[int]) -> F32Array:
        """Return (T, V) logits after every token of one sequence that starts at an empty cache."""
        self.clear()
        out = []
        for first in range(0, len(tokens), self.n_batch):
            chunk = tokens[first : first + self.n_batch]
            out += [x.copy() for x in self.forward([(t, first + i, 0, True) for i, t in enumerate(chunk)])]
        return np.stack(out)

    def generate(self, prompt: Sequence[int], max_tokens: int = 256) -> Iterator[int]:
        """Yield the greedy answer's tokens, the end-of-turn token excluded.

        What a prompt begins with and the last prompt or its answer had too is not computed again: a turn of a chat costs its
        own tokens, however long the chat is. Whoever else uses the cache empties it first.

        Raises:
            EngineError: the prompt is longer than the context.
        """
        if not 0 < len(prompt) < self.n_ctx:
            raise EngineError(f"prompt has {len(prompt)} tokens, the context holds {self.n_ctx}; shorten it")
        tokens = list(prompt)
        n_held = min(common_length([self._held, tokens]), len(tokens) - 1)
        if n_held:
            self.forget_from(0, n_held)
        else:
            self.clear()
        self._held = tokens[:n_held]  # never more than the cache holds: an interrupt may come between any two lines
        self.feed(tokens[n_held:-1], n_held)
        self._held = tokens[:-1]
        token = tokens[-1]
        for _ in range(min(max_tokens, self.n_ctx - len(tokens))):
            (logits,) = self.forward([(token, len(self._held), 0, True)])
            self._held.append(token)
            token = int(logits.argmax())
            if self._vocab.is_end(token):
                return
            yield token
