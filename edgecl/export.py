"""A generation for other programs: a merged GGUF file, a PEFT folder, or a folder for ollama.

Files are built in a hidden folder inside the target and renamed into place; what is copied or merged is compared with the
hashes of its generation's manifest. A model that was dropped to save space is rebuilt from base + adapter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgecl_convert import GgufFile, read_gguf_adapter, write_atomic, write_peft_adapter

from .child import Progress
from .errors import GenerationError, SettingError, translated
from .generations import Generation, check_files, sha256_file
from .learner import Learner
from .modelfile import go_template, write_modelfile
from .rebuild import rebuild

FORMS = ("gguf", "peft", "ollama")
MODEL = "model.gguf"
_HUB = "https://huggingface.co/"


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        files: by name, in `folder`; what had such a name there was replaced.
        notes: what the user should know, a line each.
    """

    to: str
    folder: str
    generation: int
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export(
    learner: Learner,
    to: str,
    folder: Path,
    number: int | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a generation (default: the one that serves) to a folder.

    Args:
        to: gguf (model.gguf), peft (adapter_config.json, adapter_model.safetensors) or ollama (model.gguf, Modelfile).
        force: write into a folder that is not empty; files of other names stay.

    Raises:
        SettingError: an unknown form, a folder that cannot be used, or the base as a PEFT folder.
        GenerationError: no such generation, or its files or its base are not what its manifest says.
        EdgeclError: the merge failed, or the disk did.
    """
    if to not in FORMS:
        raise SettingError(f"to must be one of {', '.join(FORMS)}; got {to}")
    generation = learner.generations.current() if number is None else learner.generations.load(number)
    if to == "peft" and not generation.number:
        raise SettingError("generation 0 is the base and has no adapter; export another --generation, or --to gguf")
    report = ExportReport(to, str(folder), generation.number)
    _make_folder(learner, folder, force)
    with translated(), _disk_errors(folder), tempfile.TemporaryDirectory(prefix=".edgecl-", dir=folder) as name:
        draft = Path(name)
        if to == "peft":
            report.notes += _peft(learner, generation, draft)
        else:
            report.notes += _gguf(learner, generation, draft / MODEL, progress)
        if to == "ollama":
            report.notes += _modelfile(draft)
        report.files = sorted(path.name for path in draft.iterdir())
        for file in report.files:
            (draft / file).chmod(0o600)  # what was learned is its owner's
            os.replace(draft / file, folder / file)
    return report


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk says into one line that names the folder."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"{folder}: cannot be written: {error.strerror or error}; choose another folder") from None


def _make_folder(learner: Learner, folder: Path, force: bool) -> None:
    if folder.resolve().is_relative_to(learner.home.resolve()):
        raise SettingError(f"{folder} is inside the home, which holds what nights made alone; choose another folder")
    if (folder / MODEL).resolve() == Path(learner.settings.base).resolve():
        raise SettingError(f"{folder / MODEL} is this home's base, which an export would replace; choose another folder")
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not force and next(folder.iterdir(), None):
            raise SettingError(f"{folder} is not empty; choose another folder, or give --force to write into it")


def _gguf(learner: Learner, generation: Generation, out: Path, progress: Progress | None) -> list[str]:
    """Write the merged model: the served file where it is there, else base + adapter merged as that was."""
    manifest = generation.manifest
    if not generation.number or (manifest.model and generation.model.is_file()):
        wanted = manifest.files.get(manifest.model, "") if generation.number else manifest.base_sha256
        _copy(generation.model, out, wanted)
        return []
    learner.generations.check_base(full=True, base=learner.settings.base)
    same = rebuild(generation, learner.settings.base, out, learner.limits(), progress)
    if not manifest.model:
        return [f"generation {generation.number} serves base + adapter; they were merged at F16, which keeps all of the night"]
    what = "bit for bit the file that was served" if same else "not bit for bit the file that was served: edgecl has changed"
    return [f"{manifest.model} was dropped to save space and has been rebuilt: {what}"]


def _peft(learner: Learner, generation: Generation, draft: Path) -> list[str]:
    """Write the adapter that llama.cpp takes as a PEFT folder, with a base that can be found by its name."""
    adapter, config = generation.folder / "adapter.gguf", draft / "adapter_config.json"
    check_files(replace(generation, adapter=adapter))
    learner.generations.check_base(full=True, base=learner.settings.base)
    with GgufFile(learner.settings.base) as base:
        write_peft_adapter(draft, read_gguf_adapter(adapter), base)
        name = base_name(base)
    write_atomic(config, json.dumps(json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": name}, indent=2) + "\n")
    if not name.endswith(".gguf"):
        return [f"base model: {name}"]
    path = Path(name)
    load = f"from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}, quantization_config=GgufConfig(dequantize=True))"
    return [f"base model, in transformers: AutoModelForCausalLM.{load}"]


def base_name(base: GgufFile) -> str:
    """Return how transformers finds a base: the repository that its file was converted from where it says so, else its path."""
    source = base.get("general.source.huggingface.repository") or base.get("general.source.repo_url") or ""
    repository = str(source).removeprefix(_HUB).strip("/")
    return repository if repository.count("/") == 1 else str(base.path.resolve())


def _modelfile(draft: Path) -> list[str]:
    from .engine import VocabFile
    from .template import chat_format

    with GgufFile(draft / MODEL) as gguf, VocabFile(gguf.path) as vocab:
        bos = gguf.get("tokenizer.ggml.tokens")[vocab.bos] if vocab.bos is not None else ""
        template = go_template(chat_format(gguf, vocab).render, bos)
    write_atomic(draft / "Modelfile", write_modelfile(MODEL, template))
    return [] if template else ["the chat template is none that is known to be the same in ollama: TEMPLATE was left out"]


def _copy(source: Path, target: Path, sha256: str) -> None:
    if not source.is_file():
        raise GenerationError(f"{source} is gone; run `edgecl verify`")
    shutil.copyfile(source, target)
    _check(target, source, sha256)


def _check(path: Path, source: Path, sha256: str) -> None:
    """Compare a file of a generation, or the copy of it, with the hash in its manifest."""
    got = sha256_file(path)
    if got != sha256:
        raise GenerationError(f"{source} has sha256 {got[:12]}, its manifest says {sha256[:12] or 'none'}; run `edgecl verify`")
