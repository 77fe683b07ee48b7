"""Whether llama.cpp's AMX kernels work here: three times as fast as its others, where they do.

GCC 12.2 takes most of the configuration of AMX's tiles for unused and leaves it out (ggml-org/llama.cpp #26954): the first
product then ends the process. What llama.cpp was compiled with cannot be asked, so a product is tried.

A thread is given its configuration once. Where torch computes in the same thread, it takes that away, and the next product of
llama.cpp is an illegal instruction. So they are used where WITH_AMX is set: in child processes that have no torch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from .errors import ConvertError
from .ggml import QType, cpu_words
from .gguf_file import PlannedTensor, encode_field, write_gguf
from .names import PROJECTIONS
from .process import run_python

AMX_TYPES = (QType.Q4_0, QType.Q4_1, QType.Q8_0, QType.Q4_K, QType.Q5_K, QType.Q6_K)
WITH_AMX = "EDGECL_AMX"  # in the environment of a process
_WIDTH, _N_VOCAB = 256, 64


def has_amx() -> bool:
    """Return whether llama.cpp was compiled with AMX kernels."""
    import llama_cpp

    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


@lru_cache(maxsize=1)
def amx_works(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether it has AMX kernels that work, tried once in a child process."""
    return "amx_int8" in cpu_words(cpuinfo) and has_amx() and _survives()


def _survives() -> bool:
    code = "import sys; from edgecl_convert.amx import multiply; multiply(sys.argv[1])"
    try:
        with tempfile.TemporaryDirectory(prefix="edgecl-amx-") as folder:
            _write_model(Path(folder) / "one.gguf")
            return run_python(code, f"{folder}/one.gguf").returncode == 0
    except (ConvertError, OSError):  # the disk is full: without them it works, too
        return False


def _write_model(path: Path) -> None:
    """Write the smallest llama that llama.cpp loads, without a vocabulary; all weights are zero."""
    facts = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": _N_VOCAB,
        "llama.context_length": 32,
        "llama.embedding_length": _WIDTH,
        "llama.feed_forward_length": _WIDTH,
        "llama.block_count": 1,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_embd", "output"), (_N_VOCAB, _WIDTH))
    shapes |= {f"blk.0.{name}": (_WIDTH, _WIDTH) for name in PROJECTIONS}
    shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (_WIDTH,))
    plan = [
        PlannedTensor(f"{name}.weight", shape, QType.Q8_0 if len(shape) > 1 else QType.F32) for name, shape in shapes.items()
    ]
    fields = [encode_field(key, value) for key, value in facts.items()]
    write_gguf(path, fields, plan, (np.zeros((1, tensor.n_bytes), np.uint8) for tensor in plan))


# --- the child --------------------------------------------------------------------------------------------------------


def multiply(path: str) -> None:
    """Load a model with llama.cpp's own choice of kernels and compute two tokens; the exit code is not 0 where that fails."""
    import llama_cpp

    from .llama_model import fill

    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 32, 1, 1
    context = llama_cpp.llama_init_from_model(model, settings) if model else None
    if not context:
        sys.exit(1)
    batch = llama_cpp.llama_batch_init(2, 0, 1)
    fill(batch, [1, 2], 0)
    sys.exit(llama_cpp.llama_decode(context, batch))
