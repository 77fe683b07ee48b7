"""Whether llama.cpp's AMX kernels work here: three times as fast as its others, where they do.

GCC 12.2 takes most of the configuration of AMX's tiles for unused and leaves it out (ggml-org/llama.cpp #26954): the first
product then ends the process. What llama.cpp was compiled with cannot be asked, so a product is tried.

A thread is given its configuration once. Where torch computes in the same thread, it takes that away, and the next product of
llama.cpp is an illegal instruction. So they are used where WITH_AMX is set: in child processes that have no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from .errors import ConvertError
from .ggml import Bytes, QType
from .gguf_file import PlannedTensor, encode_field, write_gguf

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
    try:
        return "amx_int8" in cpuinfo.read_text("ascii", "replace").split() and has_amx() and _survives()
    except OSError:
        return False


def run_python(code: str, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run code that imports this package in a child process: what llama.cpp does to it does not end this one."""
    roots = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=data,
        env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, roots))},
        capture_output=True,
        check=False,
    )


def _survives() -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix="edgecl-amx-") as folder:
            _write_model(Path(folder) / "one.gguf")
            done = run_python(
                "import sys; from edgecl_convert.amx import multiply; multiply(sys.argv[1])", f"{folder}/one.gguf"
            )
    except (ConvertError, OSError):  # the disk is full: without them it works, too
        return False
    return done.returncode == 0


def _write_model(path: Path) -> None:
    """Write the smallest llama that llama.cpp loads, without a vocabulary; all weights are zero."""
    sizes = ("embedding_length", "feed_forward_length"), ("attention.head_count", "attention.head_count_kv", "block_count")
    fields = [
        encode_field("general.architecture", "llama"),
        encode_field("tokenizer.ggml.model", "no_vocab"),
        encode_field("llama.vocab_size", _N_VOCAB),
        encode_field("llama.context_length", 32),
        encode_field("llama.attention.layer_norm_rms_epsilon", 1e-5),
        *(encode_field(f"llama.{key}", value) for keys, value in zip(sizes, (_WIDTH, 1), strict=True) for key in keys),
    ]
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    plan = [PlannedTensor(f"{name}.weight", (_N_VOCAB, _WIDTH), QType.Q8_0) for name in ("token_embd", "output")]
    plan += [PlannedTensor(f"blk.0.{name}.weight", (_WIDTH, _WIDTH), QType.Q8_0) for name in matrices]
    plan += [
        PlannedTensor(f"{name}.weight", (_WIDTH,), QType.F32) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    ]

    def data() -> Iterator[Bytes]:
        for tensor in plan:
            yield np.zeros((1, tensor.n_bytes), np.uint8)

    write_gguf(path, fields, plan, data())


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
