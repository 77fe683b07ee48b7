"""Nats per token of a text, measured in llama.cpp in a child process.

llama.cpp can end the whole process on a model that it does not like, and keeps its memory for itself; a child gives both
back. The parent sends one JSON object on stdin, the child answers with one on stdout: {"nats": [...]} or {"error": "..."}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .gguf_file import GgufFile
from .llama_model import fill, llama_threads, load_params
from .process import run_python

WINDOW = 512  # tokens that are read together; each window starts afresh
_MOST_WINDOWS = 32  # of a longer text, as many are taken, evenly spread
_BATCH = 128  # tokens whose logits are in memory at once: 134 MB for a vocabulary of 262,144


def nats_per_token(model: Path | str, text: str, n_threads: int = 0) -> NDArray[np.float64]:
    """Return the negative log-likelihood of each token of `text`, but for the first of a window that nothing precedes.

    Of a text of more than 32 windows of 512 tokens, 32 are taken, evenly spread.

    Weights are as the file has them, the KV cache is F32. Perplexity is exp of the mean.

    Raises:
        ConvertError: llama.cpp cannot load or run the model, or the text has fewer than two tokens.
    """
    with GgufFile(model) as gguf:  # llama.cpp aborts on some malformed files
        window = min(WINDOW, int(gguf.get(f"{gguf.architecture}.context_length", WINDOW)))
    request = {"model": str(model), "text": text, "window": window, "n_threads": n_threads or llama_threads()}
    done = run_python("from edgecl_convert.perplexity import main; main()", data=json.dumps(request).encode())
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no word"])[-1]
        raise ConvertError(f"llama.cpp ended with exit code {done.returncode}: {last}") from None
    if "error" in answer:
        raise ConvertError(answer["error"])
    return np.array(answer["nats"], np.float64)


# --- the child --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"nats": _measure(**request)}
    except ConvertError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


def _measure(model: str, text: str, window: int, n_threads: int) -> list[float]:
    import llama_cpp

    complaints: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, line: bytes, _user: object) -> None:
        if level == 4:  # errors; the first one says why
            complaints.append(line.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(keep, None)
    handle = llama_cpp.llama_model_load_from_file(model.encode(), load_params())
    if not handle:
        raise ConvertError(f"llama.cpp could not load this model: {(complaints or ['no word'])[0]}")
    vocab = llama_cpp.llama_model_get_vocab(handle)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = window
    settings.n_batch = settings.n_ubatch = min(_BATCH, window)
    settings.n_threads = settings.n_threads_batch = n_threads
    settings.type_k = settings.type_v = 0  # F32: the gap is the weights' alone
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(handle, settings)
    if not context:
        raise ConvertError(f"llama.cpp could not make a context: {(complaints or ['no word'])[0]}")
    head = [llama_cpp.llama_vocab_bos(vocab)] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
    tokens, per_window = _encode(vocab, text), window - len(head)
    nats: list[float] = []
    n_windows = -(-len(tokens) // per_window)
    for window_number in np.linspace(0, n_windows - 1, min(n_windows, _MOST_WINDOWS)).round().astype(int).tolist():
        first = window_number * per_window
        nats += _window_nats(context, head + tokens[first : first + per_window], llama_cpp.llama_vocab_n_tokens(vocab))
    if not nats:
        raise ConvertError(f"the text has {len(tokens)} tokens; give one of some hundred words")
    return nats


def _encode(vocab: Any, text: str) -> list[int]:
    import llama_cpp

    data = text.encode("utf-8")
    buffer = (llama_cpp.llama_token * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, False)
    if n < 0:
        raise ConvertError(f"llama.cpp could not tokenize a text of {len(data)} bytes")
    return list(buffer[:n])


def _window_nats(context: Any, tokens: list[int], n_vocab: int) -> list[float]:
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    size = llama_cpp.llama_n_batch(context)
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    nats = []
    try:
        for first in range(0, len(tokens) - 1, size):
            chunk = tokens[first : min(first + size, len(tokens) - 1)]
            fill(batch, chunk, first)
            if status := llama_cpp.llama_decode(context, batch):
                raise ConvertError(f"llama.cpp could not compute {len(chunk)} tokens (status {status})")
            for i in range(len(chunk)):
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (n_vocab,))
                top = float(logits.max())
                total = float(np.exp(logits - top).sum(dtype=np.float64))
                nats.append(top + float(np.log(total)) - float(logits[tokens[first + i + 1]]))
    finally:
        llama_cpp.llama_batch_free(batch)
    return nats
