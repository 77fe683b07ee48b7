"""llama.cpp's AMX kernels: used where a product with them survives, and only there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgecl_convert import amx
from edgecl_convert.llama_model import LlamaModel, load_params
from tests import tiny


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECL_AMX", "")
    monkeypatch.delenv("EDGECL_AMX")


def test_a_trial_loads_and_computes_and_a_bad_one_is_seen(tmp_path: Path) -> None:
    amx._write_model(tmp_path / "one.gguf")
    code = "import sys, os; from edgecl_convert.amx import multiply; {}multiply(sys.argv[1])"
    without = "import llama_cpp; d = llama_cpp.llama_model_default_params(); d.use_extra_bufts = False; "
    without += "llama_cpp.llama_model_default_params = lambda: d; "
    assert amx.run_python(code.format(without), str(tmp_path / "one.gguf")).returncode == 0, "it is a sound model"
    assert amx.run_python(code.format(""), str(tmp_path / "none.gguf")).returncode == 1


@pytest.mark.usefixtures("untold")
def test_kernels_are_asked_for_where_they_work(tmp_path: Path) -> None:
    works = amx.amx_works()
    assert load_params().use_extra_bufts == (works or not amx.has_amx())
    assert os.environ.get("EDGECL_AMX", "0") == str(int(works)), "its children need not try again"
    (tmp_path / "cpuinfo").write_text("flags : sse avx2")
    assert not amx.amx_works(tmp_path / "cpuinfo") and not amx.amx_works(tmp_path / "none")


def test_what_they_compute_is_what_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    path = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q8_0, width=256)[0]
    logits = []
    for found in ("1", "0") if amx.amx_works() else ("0", "0"):
        monkeypatch.setenv("EDGECL_AMX", found)
        with LlamaModel(path) as model:
            logits.append(np.concatenate([*model.logits(tiny.random_tokens(40))]))
    np.testing.assert_allclose(logits[0], logits[1], atol=0.02 * np.abs(logits[1]).max())
