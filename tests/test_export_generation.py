"""Generations for other programs: each form is opened again by the program that it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GgufConfig

from edgecl import Learner
from edgecl.engine import GGML_TYPE_F32, Engine
from edgecl.errors import EdgeclError, GenerationError, SettingError
from edgecl.export import base_name, export
from edgecl.generations import Manifest, now, sha256_file
from edgecl_convert import GgufFile, merge, read_gguf_adapter, read_peft_adapter, resolve_quant, write_gguf_adapter
from tests import tiny

IDS = [tiny.START, *tiny.random_tokens(12)]


def publish(learner: Learner, quant: str) -> None:
    """Publish a generation with a random adapter, merged as a night does (quant "": base + adapter serves)."""
    generations, parent = learner.generations, learner.generations.current()
    draft, number = generations.draft(), generations.next_number()
    with GgufFile(learner.settings.base) as base:
        adapter = tiny.random_adapter(base, seed=number, size=0.3)
        write_gguf_adapter(draft / "adapter.gguf", adapter)
        qtype = resolve_quant(quant or "F16", base, learned=True)
        name = f"model-{quant if qtype.startswith('keep') else qtype}.gguf" if quant else ""
        if name:
            merge(base, adapter, draft / name, qtype)
    files = {str(path.relative_to(draft)): sha256_file(path) for path in draft.rglob("*") if path.is_file()}
    generations.publish(draft, Manifest(number, parent.hash, parent.manifest.base_sha256, name, now(), quant, files=files))


@pytest.fixture
def learner(tmp_path: Path, one_thread: None) -> Any:
    """Generation 1 serves a merged F32 file, generation 2 base + adapter."""
    with Learner.init(tiny.build(tmp_path / "base.gguf")[0], tmp_path / "home", quant="F32") as learner:
        publish(learner, "F32"), publish(learner, "")
        learner.generations.point(1)
        yield learner


def served(path: Path) -> np.ndarray[Any, Any]:
    with Engine(path, None, n_ctx=64, n_threads=1, kv_type=GGML_TYPE_F32) as engine:
        return engine.logits(IDS)


def test_no_export_replaces_the_base(learner: Learner, tmp_path: Path) -> None:
    base = Path(learner.settings.base).rename(tmp_path / "model.gguf")
    learner.settings = replace(learner.settings, base=str(base))
    before = base.read_bytes()
    for form in ("gguf", "ollama"):
        with pytest.raises(SettingError, match=r"model\.gguf is this home's base, which an export would replace"):
            export(learner, form, tmp_path, force=True)
    assert base.read_bytes() == before


# --- what other programs make of it -----------------------------------------------------------------------------------


def test_llama_cpp_and_peft_open_the_same_model(learner: Learner, tmp_path: Path) -> None:
    report = export(learner, "gguf", tmp_path / "out/gguf")
    assert (report.generation, report.files, report.notes) == (1, ["model.gguf"], [])
    report = export(learner, "peft", tmp_path / "out/peft")
    assert report.files == ["adapter_config.json", "adapter_model.safetensors"] and "gguf_file='base.gguf'" in report.notes[0]

    base = Path(json.loads((tmp_path / "out/peft/adapter_config.json").read_text())["base_model_name_or_path"])
    assert base == tmp_path / "base.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        base.parent, gguf_file=base.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    with torch.no_grad():
        before = model(torch.tensor([IDS])).logits[0].numpy()
        after = PeftModel.from_pretrained(model, tmp_path / "out/peft").eval()(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(served(tmp_path / "out/gguf/model.gguf"), after, atol=1e-2)
    assert np.abs(after - before).max() > 1


def test_a_peft_folder_has_the_numbers_that_llama_cpp_has(learner: Learner, tmp_path: Path) -> None:
    export(learner, "peft", tmp_path / "out", 2)
    wanted = read_gguf_adapter(learner.generations.load(2).folder / "adapter.gguf")
    with GgufFile(learner.settings.base) as base:
        found = read_peft_adapter(tmp_path / "out", base)
    assert (found.lora_alpha, found.pairs.keys()) == (wanted.lora_alpha, wanted.pairs.keys())
    assert all((a == b).all() for name in wanted.pairs for a, b in zip(found.pairs[name], wanted.pairs[name], strict=True))


def test_ollama_gets_a_model_and_a_modelfile(learner: Learner, tmp_path: Path) -> None:
    report = export(learner, "ollama", tmp_path / "out")
    assert report.files == ["Modelfile", "model.gguf"] and report.notes == []
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}')
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n" in text
    assert sha256_file(tmp_path / "out/model.gguf") == sha256_file(learner.generations.load(1).model)
    assert not [path for path in (tmp_path / "out").iterdir() if path.stat().st_mode & 0o077]


def test_a_template_that_ollama_cannot_have_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(tiny, "TEMPLATE", "{% for m in messages %}{{ loop.index }} {{ m.content }}<|im_end|>{% endfor %}")
    with Learner.init(tiny.build(tmp_path / "base.gguf")[0], tmp_path / "home") as learner:
        report = export(learner, "ollama", tmp_path / "out")
    assert report.notes == ["the chat template is none that is known to be the same in ollama: TEMPLATE was left out"]
    assert "TEMPLATE" not in (tmp_path / "out/Modelfile").read_text()


# --- what is not there is made again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("qtype", "quant"), [("F32", "F32"), ("F32", "int8"), ("Q4_0", "int4")])
def test_a_dropped_model_is_rebuilt_bit_for_bit(qtype: str, quant: str, tmp_path: Path, one_thread: None) -> None:
    base = tiny.build(tmp_path / "base.gguf", qtype=gguf.GGMLQuantizationType[qtype], width=128)[0]
    with Learner.init(base, tmp_path / "home", quant=quant) as learner:
        publish(learner, quant)
        model = learner.generations.load(1).model
        wanted = sha256_file(model)
        model.unlink()
        report = export(learner, "gguf", tmp_path / "out")
    assert sha256_file(tmp_path / "out/model.gguf") == wanted != sha256_file(base)
    (note,) = report.notes
    assert model.name in note and note.endswith("bit for bit the file that was served")


def test_an_unmerged_generation_is_merged_at_f16_and_the_base_is_itself(learner: Learner, tmp_path: Path) -> None:
    report = export(learner, "gguf", tmp_path / "out", 2)
    assert report.generation == 2 and "merged at F16" in report.notes[0]
    unmerged = learner.generations.load(2)
    with Engine(unmerged.model, unmerged.adapter, n_ctx=64, n_threads=1, kv_type=GGML_TYPE_F32) as engine:
        np.testing.assert_allclose(served(tmp_path / "out/model.gguf"), engine.logits(IDS), atol=0.3)
    export(learner, "gguf", tmp_path / "out", 0, force=True)
    assert sha256_file(tmp_path / "out/model.gguf") == sha256_file(Path(learner.settings.base))
    with pytest.raises(SettingError, match="generation 0 is the base and has no adapter"):
        export(learner, "peft", tmp_path / "other", 0)
    assert not (tmp_path / "other").exists()


def test_a_base_is_named_by_its_repository_where_the_file_says_so(tmp_path: Path) -> None:
    class Said:
        def __init__(self, **fields: str) -> None:
            self.path, self.fields = tmp_path / "b.gguf", fields

        def get(self, key: str) -> str | None:
            return self.fields.get(key.rpartition(".")[2])

    assert base_name(Said(repo_url="https://huggingface.co/maker/model")) == "maker/model"
    assert base_name(Said(repository="maker/model")) == "maker/model"
    for other in ({"repo_url": "https://example.org/x/y"}, {}):
        assert base_name(Said(**other)) == str(tmp_path / "b.gguf")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_used(learner: Learner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"is not empty; .* --force"):
        export(learner, "gguf", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export(learner, "gguf", out, force=True), export(learner, "gguf", out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "model.gguf"]
    for folder in (out / "mine.txt", out / "mine.txt/below"):
        with pytest.raises(SettingError, match=r"cannot be written: .*; choose another folder"):
            export(learner, "gguf", folder, force=True)
    with pytest.raises(SettingError, match="is inside the home"):
        export(learner, "gguf", learner.home / "generations/0001", force=True)
    with pytest.raises(SettingError, match="to must be one of gguf, peft, ollama; got onnx"):
        export(learner, "onnx", tmp_path / "x")
    with pytest.raises(GenerationError, match="there is no generation 9"):
        export(learner, "gguf", tmp_path / "x", 9)


@pytest.mark.parametrize(
    ("to", "number", "name"),
    [("gguf", 1, "model-F32.gguf"), ("gguf", 2, "adapter.gguf"), ("peft", 1, "adapter.gguf")],
)
def test_what_differs_from_its_manifest_is_not_handed_on(
    to: str, number: int, name: str, learner: Learner, tmp_path: Path
) -> None:
    path = learner.generations.load(number).folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(GenerationError, match=f"{name} (has sha256 .*run `edgecl verify`|was changed since it was published)"):
        export(learner, to, tmp_path / "out", number)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("to", ["gguf", "peft"])
def test_what_is_gone_is_one_line(to: str, learner: Learner, tmp_path: Path) -> None:
    (learner.generations.load(2).folder / "adapter.gguf").unlink()
    with pytest.raises(EdgeclError, match=r"adapter\.gguf is gone"):
        export(learner, to, tmp_path / "out", 2)


def test_export_at_the_terminal(learner: Learner, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgecl", "--home", learner.home, "export", "--to"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*args: str | Path) -> tuple[int, str, str]:
        done = subprocess.run([*command, *args], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    code, out, error = run("ollama", tmp_path / "out")
    assert (code, error) == (0, "") and out.splitlines()[1] == f"next: ollama create NAME -f {tmp_path}/out/Modelfile"
    code, out, error = run("gguf", tmp_path / "out")
    assert code == 1 and len(error.splitlines()) == 1 and "--force" in error
    code, out, _ = run("peft", tmp_path / "out", "--force", "--generation", "2", "--json")
    assert code == 0 and json.loads(out)["files"] == ["adapter_config.json", "adapter_model.safetensors"]
