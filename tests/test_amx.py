"""llama.cpp's AMX kernels: used where a product with them survives, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgecl_convert import amx
from edgecl_convert.ggml import QType
from edgecl_convert.llama_model import load_params
from edgecl_convert.process import run_python
from tests import tiny


def test_a_trial_loads_and_computes_and_a_bad_one_is_seen(tmp_path: Path) -> None:
    amx._write_model(tmp_path / "one.gguf")
    code = "import sys, os; from edgecl_convert.amx import multiply; {}multiply(sys.argv[1])"
    without = "import llama_cpp; d = llama_cpp.llama_model_default_params(); d.use_extra_bufts = False; "
    without += "llama_cpp.llama_model_default_params = lambda: d; "
    assert run_python(code.format(without), str(tmp_path / "one.gguf")).returncode == 0, "it is a sound model"
    assert run_python(code.format(""), str(tmp_path / "none.gguf")).returncode == 1


def test_kernels_are_asked_for_where_a_process_is_to_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(amx.WITH_AMX, raising=False)
    assert load_params().use_extra_bufts == (not amx.has_amx())
    monkeypatch.setenv(amx.WITH_AMX, "1")
    assert load_params().use_extra_bufts
    (tmp_path / "cpuinfo").write_text("flags : sse avx2")
    assert not amx.amx_works(tmp_path / "cpuinfo") and not amx.amx_works(tmp_path / "none")


@pytest.mark.skipif(not amx.amx_works(), reason="no AMX here, or a llama.cpp whose kernels do not work")
def test_what_they_compute_is_what_the_others_do(tmp_path: Path) -> None:
    path = tiny.build(tmp_path / "tiny.gguf", qtype=QType.Q8_0, width=256)[0]
    code = "import sys, os; from edgecl_convert.llama_model import LlamaModel; import numpy as np; {}"
    code += "m = LlamaModel(sys.argv[1]); sys.stdout.buffer.write(np.concatenate([*m.logits(list(range(40)))]).tobytes())"
    found = [
        np.frombuffer(run_python(code.format(first), str(path)).stdout, np.float32)
        for first in (f"os.environ['{amx.WITH_AMX}'] = '1'; ", "")
    ]
    assert len(found[0]) == 40 * tiny.N_VOCAB and (found[0] != found[1]).any()
    np.testing.assert_allclose(found[0], found[1], atol=0.02 * np.abs(found[1]).max())
