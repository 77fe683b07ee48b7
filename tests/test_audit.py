"""Manifests against files: each kind of damage is found and named, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecl.audit import CHANGED, Finding, audit
from edgecl.cli import cli
from edgecl.generations import Generations, Manifest, now, sha256_file
from edgecl.profile import Settings

KEEP = 2


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base and four nights: the first two lost their models by the rule, the third serves base + adapter."""
    base, home = tmp_path / "base.gguf", tmp_path / "home"
    base.write_bytes(b"the base's weights")
    generations = Generations(home)
    generations.create_base(Manifest(0, "", sha256_file(base), str(base), now()))
    for number in range(1, 5):
        draft, parent = generations.draft(), generations.current()
        names = ["adapter/adapter_config.json", "adapter.gguf", "report.json"] + ([] if number == 3 else ["model-Q8_0.gguf"])
        (draft / "adapter").mkdir()
        for name in names:
            (draft / name).write_bytes(f"{name} {number}".encode())
        files = {name: sha256_file(draft / name) for name in names}
        model = "" if number == 3 else "model-Q8_0.gguf"
        generations.publish(draft, Manifest(number, parent.hash, parent.manifest.base_sha256, model, now(), files=files))
    generations.drop_old_models(KEEP)
    (home / "edgecl.toml").write_text(Settings(base=str(base), keep_models=KEEP).to_toml())
    return home


def findings(home: Path, keep: int = KEEP) -> list[tuple[str, str]]:
    return [(finding.path.removeprefix("generations/"), finding.problem) for finding in audit(home, keep).findings]


def rewrite(home: Path, number: int, **changed: Any) -> None:
    path = home / f"generations/{number:04d}/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_damaged_store_is_no_reason_to_check_nothing(home: Path) -> None:
    (home / "replay.db").write_bytes(b"SQLite format 3\0, or not")
    done = CliRunner().invoke(cli, ["--home", str(home), "verify"])
    assert done.exit_code == 0 and "5 generations" in done.output and done.output.endswith("sound\n")
    done = CliRunner().invoke(cli, ["--home", str(home / "no"), "verify"])
    assert done.exit_code == 1 and "is not a learner's home" in str(done.exception)


def test_a_home_as_nights_leave_it_is_sound(home: Path) -> None:
    (home / "generations/.draft-123").mkdir()  # a night runs
    report = audit(home, KEEP)
    assert report.sound and report.generations == [0, 1, 2, 3, 4]
    assert report.dropped == ["generations/0001/model-Q8_0.gguf", "generations/0002/model-Q8_0.gguf"]
    assert report.n_files == 5 + 1 + 4 * 3 + 1 and report.n_bytes > 100


@pytest.mark.parametrize("name", ["adapter.gguf", "adapter/adapter_config.json", "report.json", "model-Q8_0.gguf"])
def test_a_changed_and_a_missing_file_are_named(home: Path, name: str) -> None:
    path = home / "generations/0004" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (finding,) = audit(home, KEEP).findings
    assert (finding.path, finding.problem) == (f"generations/0004/{name}", "changed") and "sha256 is" in finding.detail
    path.unlink()
    assert findings(home) == [(f"0004/{name}", "missing")]


def test_only_the_rule_explains_a_model_that_is_gone(home: Path) -> None:
    assert findings(home, keep=3) == [("0002/model-Q8_0.gguf", "missing")]
    (home / "generations/0002/model-Q8_0.gguf").write_bytes(b"model-Q8_0.gguf 2")
    assert findings(home) == []
    Generations(home).point(2)
    assert findings(home) == []
    (home / "generations/0002/model-Q8_0.gguf").unlink()
    assert findings(home) == [("0002/model-Q8_0.gguf", "missing")]  # it serves
    Generations(home).point(4)
    (home / "generations/0002/adapter.gguf").unlink()
    assert findings(home) == [("0002/adapter.gguf", "missing")]  # never dropped


def test_the_base_is_hashed_whole(home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    stat = base.stat()
    base.write_bytes(b"The base's weights")
    os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert findings(home) == [(str(base), "changed")]
    base.unlink()
    assert findings(home) == [(str(base), "missing")]


@pytest.mark.parametrize("name", ["0001/notes.txt", "0001/adapter/extra", "notes", "old/x"])
def test_a_file_that_no_manifest_names_is_unknown(home: Path, name: str) -> None:
    path = home / "generations" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert findings(home) == [("old" if name == "old/x" else name, "unknown")]


def test_a_manifest_that_was_edited_is_seen_by_its_child(home: Path) -> None:
    rewrite(home, 2, created="yesterday")
    (finding,) = audit(home, KEEP).findings
    assert finding.path == "generations/0003/manifest.json" and "is no manifest here" in finding.detail
    assert finding.detail.endswith("one of these may have been it: generations/0002/manifest.json")


def test_a_generation_that_was_rolled_back_is_no_finding(home: Path) -> None:
    generations = Generations(home)
    generations.point(3)
    manifest, draft = generations.load(3).manifest, generations.draft()
    generations.publish(draft, replace(manifest, number=5, parent=generations.load(3).hash, files={}))
    assert findings(home) == []


@pytest.mark.parametrize("damage", ["{", '{"number": 1}', "[]", ""])
def test_a_damaged_or_lost_manifest_is_named(home: Path, damage: str) -> None:
    path = home / "generations/0004/manifest.json"
    path.write_text(damage)
    assert findings(home) == [("0004/manifest.json", "changed"), ("current", "changed")]
    path.unlink()
    assert {("0004/manifest.json", "missing"), ("current", "changed")} <= set(findings(home))


@pytest.mark.parametrize("files", [3, None, ["adapter.gguf"], {"adapter.gguf": 7}, {"a\0b": "c"}, {"../../edgecl.toml": "d"}])
def test_a_manifest_that_says_nonsense_is_a_finding(home: Path, files: Any) -> None:
    rewrite(home, 4, files=files)
    assert {"0004"} <= {path.split("/")[0] for path, _ in findings(home)} <= {"0004", "current"}


def test_without_the_manifest_of_the_base_it_alone_is_named(home: Path) -> None:
    (home / "generations/0000/manifest.json").write_text("{")
    assert findings(home) == [("0000/manifest.json", "changed")]
    shutil.rmtree(home / "generations")
    assert findings(home) == [("0000/manifest.json", "missing")]


def test_a_link_that_is_gone_is_a_finding(home: Path) -> None:
    (home / "current").unlink()
    said = f"{home} serves no generation; run `edgecl rollback N`, there are: 0, 1, 2, 3, 4"
    assert Finding("current", "missing", said) in audit(home, KEEP).findings


def run(home: Path, *args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "edgecl", "--home", str(home), "verify", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    return done.returncode, done.stdout, done.stderr


def test_verify_at_the_terminal(home: Path) -> None:
    code, out, error = run(home)
    assert (code, error) == (0, "") and "dropped to save space" in out and out.splitlines()[-1].endswith("sound")
    (home / "generations/0003/adapter.gguf").write_bytes(b"other")
    code, out, error = run(home)
    assert code == 1 and "not sound" in out and error.startswith("generations/0003/adapter.gguf: changed: sha256 is ")
    code, out, error = run(home, "--json")
    facts = json.loads(out)
    assert (code, error, facts["sound"]) == (1, "", False)
    assert facts["findings"][0]["path"] == "generations/0003/adapter.gguf"


def test_an_asker_that_forgetting_deleted_is_no_loss_and_a_changed_one_is(home: Path) -> None:
    files = json.loads((home / "generations/0004/manifest.json").read_text())["files"]
    rewrite(home, 4, files=files | {"asker.gguf": "0" * 64})
    report = audit(home, KEEP)
    assert not report.findings and "generations/0004/asker.gguf" in report.dropped
    (home / "generations/0004/asker.gguf").write_bytes(b"another")
    assert [problem for _, problem in findings(home)] == [CHANGED]
