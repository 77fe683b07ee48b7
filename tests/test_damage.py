"""Damage to a home: what is damaged is not served, the advice in each message helps, and no accepted row is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_cli import one_line

from edgecl import Learner
from edgecl.cli import cli
from edgecl.cli.output import print_json, safe
from edgecl.engine import Engine
from edgecl.errors import GenerationError, NothingToLearn, SettingError, StageError, StoreError
from edgecl.generations import check_files
from edgecl.lock import night_lock
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.writers import Writers
from tests import tiny

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=5, learning_rate=0.02, anchor_weight=0.0)


def rows(n: int, first: int = 0, task: str = "echo") -> list[str]:
    return [json.dumps({"prompt": f"say {i}", "completion": f"ok {i}", "task": task}) for i in range(first, first + n)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one published night that learned four rows and kept two."""
    folder = tmp_path_factory.mktemp("damage")
    replay = ReplaySettings(share=0.5, written=0)
    with Learner.init(tiny.build(folder / "tiny.gguf")[0], folder / "home", replay=replay, train=TRAIN) as learner:
        learner.observe(rows(4))
        assert learner.adapt(gate="report").accepted
    return folder / "home"


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home", symlinks=True))


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_manifest(home: Path, number: int, **changed: Any) -> None:
    path = home / f"generations/{number:04d}/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def model_of(home: Path) -> Path:
    (path,) = (home / "generations/0001").glob("model-*.gguf")
    return path


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_store_begun_anew_are_not_taken_for_those_of_the_last_night(home: Path) -> None:
    for old in home.glob("replay.db*"):
        old.unlink()
    with Learner(home) as learner:
        learner.observe(rows(4, first=50))  # they get the ids of the rows that the last night learned
        with pytest.raises(StageError, match="memory"):
            learner.adapt(ram_bytes=1)
        assert [row.example.answer for row in learner.store.rows("pending")] == [f"ok {i}" for i in range(50, 54)]


def test_a_night_that_was_killed_after_it_was_published_is_finished_with_what_it_had_claimed(home: Path) -> None:
    with Learner(home) as learner:
        learner.observe(rows(3, first=50))
        ids = [row.id for row in learner.store.rows("pending")]
        learner.store.claim(ids[:2], 1)
        change_manifest(home, 1, learned=ids, kept=ids[:1])
        with pytest.raises(NothingToLearn):
            learner.adapt(task="another")
        assert [row.id for row in learner.store.rows("pending")] == ids[2:]
        assert ids[0] in [row.id for row in learner.store.rows("replay")]


@pytest.mark.parametrize(
    "damage",
    [
        "update examples set messages = replace(messages, 'ok', 'no')",
        "update examples set messages = '{'",
        "update examples set messages = '7'",
        "update examples set messages = '[[\"user\"]]'",
        "update nights set report = '{'",
        "update examples set messages = cast(x'ff' as text)",
    ],
)
def test_a_damaged_row_is_one_line(home: Path, damage: str) -> None:
    with closing(sqlite3.connect(home / "replay.db")) as db, db:
        db.execute(damage)
    with Learner(home) as learner, pytest.raises(StoreError, match=r"replay\.db: .*; restore it or move it away") as caught:
        learner.store.rows("replay"), learner.history()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"`ole text not null", b"`\x87le text not null"])
def test_a_damaged_schema_is_one_line(home: Path, damage: bytes) -> None:
    path = home / "replay.db"
    path.write_bytes(path.read_bytes().replace(b"role text not null", damage))
    with pytest.raises(StoreError, match=r"cannot be opened: .*; restore it or move it away") as caught:
        Learner(home)
    assert "\n" not in str(caught.value)


def test_a_home_on_a_read_only_disk_is_one_line_that_says_what_to_do(home: Path) -> None:
    mount = f"mount --bind '{home}' '{home}' && mount -o remount,bind,ro '{home}'"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let a user mount (unshare -rm)")
    command = f"{mount} && exec '{sys.executable}' -m edgecl --home '{home}' status"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and one_line(done.stderr, "replay.db: cannot be opened", "make it and its folder writable")


# --- files that serve -------------------------------------------------------------------------------------------------


def test_a_damaged_model_is_not_served_and_a_rollback_to_it_writes_it_again(home: Path) -> None:
    whole = model_of(home).read_bytes()
    flip_last_bit(model_of(home))
    with Learner(home) as learner:
        learner.observe(rows(1, first=50))
        for attempt in (lambda: learner.ask("say 1", 2), lambda: learner.adapt()):
            with pytest.raises(GenerationError, match=r"model-Q8_0\.gguf was changed .*; `edgecl rollback 1` writes it again"):
                attempt()
        assert learner.rollback(1).number == 1
        learner.ask("say 1", 2)
        assert model_of(home).read_bytes() == whole
        flip_last_bit(model_of(home)), flip_last_bit(home / "generations/0001/adapter.gguf")
        with pytest.raises(GenerationError, match=r"adapter\.gguf was changed .*; restore it, or `edgecl rollback N`"):
            learner.rollback(1)
        assert learner.rollback().number == 0
        learner.ask("say 1", 2)


def test_a_base_that_rots_on_disk_is_not_served_whatever_its_time_stamp_says(made: Path, tmp_path: Path) -> None:
    base = Path(shutil.copy(made.parent / "tiny.gguf", tmp_path))
    with Learner.init(base, tmp_path / "home") as learner:
        stat = base.stat()
        flip_last_bit(base)
        os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(GenerationError, match=r"base .*tiny\.gguf has sha256"):
            learner.ask("say 1", 2)


def test_a_model_that_llama_cpp_cannot_load_is_no_base(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "odd.gguf"
    base.write_bytes((made.parent / "tiny.gguf").read_bytes().replace(b"blk.0.ffn_norm.weight", b"blk.0.ffn_nork.weight"))
    done = CliRunner().invoke(cli, ["--home", str(tmp_path / "home"), "init", str(base)])
    assert done.exit_code == 1 and one_line(str(done.exception), "odd.gguf", "llama.cpp could not load this model")
    assert not (tmp_path / "home/edgecl.toml").exists()


def test_a_model_that_is_damaged_while_it_serves_is_noticed_at_the_next_switch(home: Path) -> None:
    with Learner(home) as learner:
        learner.ask("say 1", 2)
        learner.rollback(0), learner.ask("say 1", 2)
        learner.rollback(1)
        flip_last_bit(model_of(home))
        with pytest.raises(GenerationError, match="was changed"):
            learner.ask("say 1", 2)


def test_a_night_does_not_go_on_from_a_damaged_adapter(home: Path) -> None:
    flip_last_bit(home / "generations/0001/adapter.gguf")
    with Learner(home) as learner:
        learner.observe(rows(1, first=50))
        learner.ask("say 1", 2)  # the merged model serves
        with pytest.raises(GenerationError, match=r"adapter\.gguf was changed"):
            learner.adapt()
        (home / "generations/0001/adapter.gguf").unlink()
        with pytest.raises(GenerationError, match=r"adapter\.gguf is gone \(No such file or directory\); restore it, or"):
            learner.adapt()


def test_a_damaged_asker_asks_nothing_and_a_damaged_adapter_teaches_nothing(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf")[0]
    with Learner.init(base, tmp_path / "home", replay=ReplaySettings(written=4), train=TRAIN) as learner:
        learner.observe(rows(4))
        learner.adapt(gate="report")
        first = learner.generations.current()
        adapter, asker = (str(first.folder / name) for name in ("adapter.gguf", "asker.gguf"))

        def writers() -> list[tuple[str | None, str | None]]:
            writers = Writers(learner.store, learner.generations, learner.settings.base, {}, at_most=8)
            return [(writer["adapter"], writer["asker"]) for writer in writers.request(first, [])["writers"]]

        assert writers() == [(None, None), (adapter, asker)]
        flip_last_bit(Path(asker))
        assert writers() == [(None, None), (adapter, adapter)]
        flip_last_bit(Path(adapter))
        assert writers() == [(None, None)]


def name_base(home: Path, base: Path) -> None:
    with Learner(home) as learner:
        before = learner.settings.base
    config = home / "edgecl.toml"
    config.write_text(config.read_text().replace(before, str(base)))


def test_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    name_base(home, tiny.build(tmp_path / "other.gguf", seed=1)[0])
    with Learner(home) as learner:
        learner.observe(rows(1, first=50))
        for attempt in (lambda: learner.ask("say 1", 2), lambda: learner.adapt()):
            with pytest.raises(GenerationError, match=r"other\.gguf has sha256 .*, it was .* at init"):
                attempt()


def test_a_base_that_was_moved_serves_once_edgecl_toml_names_it(home: Path, made: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(made.parent / "tiny.gguf", tmp_path / "moved.gguf"))
    name_base(home, moved)
    with Learner(home) as learner:
        learner.ask("say 1", 2)
        assert learner.rollback(0).model == moved
        learner.ask("say 1", 2)


def test_a_model_whose_path_is_not_utf8_is_loaded(home: Path, tmp_path: Path) -> None:
    strange = tmp_path / "m\udcff.gguf"
    shutil.copy(model_of(home), strange)
    with Engine(strange, n_threads=1) as engine:
        engine.set_adapter(shutil.copy(home / "generations/0001/adapter.gguf", tmp_path / "a\udcff.gguf"))
        assert len(list(engine.generate([1, 2], 2))) <= 2


# --- manifests and the link -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "../../../precious.gguf"}, {"model": "/etc/passwd"}, {"model": ".."}, {"model": 7}, {"files": []},
        {"learned": {}}, {"learned": ["1"]}, {"kept": [[1]]}, {"base_sha256": 5}, {"created": None},
    ],
)  # fmt: skip
def test_a_manifest_with_a_value_that_it_cannot_have_is_damaged(home: Path, changed: dict[str, Any]) -> None:
    change_manifest(home, 1, **changed)
    with Learner(home) as learner:
        with pytest.raises(GenerationError, match=r"manifest\.json is damaged: .*; roll back to another"):
            learner.ask("say 1", 2)
        assert learner.rollback(0).number == 0


@pytest.mark.parametrize("target", [None, "nowhere", "/etc", "../home/generations/0001", "generations/0007"])
def test_a_rollback_mends_a_link_that_is_gone_or_leads_elsewhere(home: Path, target: str | None) -> None:
    (home / "current").unlink()
    if target:
        (home / "current").symlink_to(target)
    with Learner(home) as learner:
        with pytest.raises(GenerationError, match=r"run `edgecl rollback N`|there are: 0, 1"):
            learner.status()
        assert learner.rollback(1).number == learner.status()["generation"] == 1


def test_files_of_a_base_or_a_draft_are_not_asked_for(home: Path) -> None:
    with Learner(home) as learner:
        base = learner.generations.load(0)
        check_files(base)
        check_files(replace(base, manifest=replace(base.manifest, number=-1)))


def test_a_home_made_anew_has_nothing_of_the_old_one_and_a_lock_empties_no_file(home: Path, tmp_path: Path) -> None:
    (home / "runs/checkpoint.safetensors").write_bytes(b"of another base")
    with Learner(home) as learner:
        base = learner.settings.base
    (tmp_path / "precious").write_text("kept")
    (home / "lock").unlink()
    (home / "lock").symlink_to(tmp_path / "precious")
    with Learner.init(base, home, force=True) as learner, pytest.raises(NothingToLearn):
        learner.adapt()
    assert not (home / "runs").exists() and (tmp_path / "precious").read_text() == "kept"


def test_a_disk_that_locks_no_files_is_not_taken_for_another_night(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(SettingError, match=r"lock: cannot be locked: No locks available; move .* to a disk"), night_lock(home):
        pass


def test_half_files_of_nights_that_died_are_removed(home: Path) -> None:
    (home / ".current-99999999").symlink_to("generations/0000")
    (home / "runs").mkdir(exist_ok=True)
    (home / "runs/.checkpoint.safetensors.x.tmp").write_bytes(b"half")
    with Learner(home) as learner:
        learner.generations.draft()
    assert not [*home.glob(".current-*"), *home.glob("runs/.*.tmp")] and (home / "current").is_symlink()


# --- what is printed --------------------------------------------------------------------------------------------------


def test_markup_in_a_task_is_text(home: Path) -> None:
    with Learner(home) as learner:
        learner.observe(rows(1, first=50, task="[/b][red]:smile:"))
        learner.store.record_night(None, False, "[/x] fell", {})
    shown = CliRunner().invoke(cli, ["--home", str(home), "status"])
    assert shown.exit_code == 0 and "[/b][red]:smile:" in shown.output and "[/x] fell" in shown.output


def test_no_control_code_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"answer": "a\x1b[2J\x9b31m\x85\x7f\udcff ü"})
    line = capsys.readouterr().out
    assert json.loads(line) == {"answer": "a\x1b[2J\x9b31m\x85\x7f\udcff ü"} and "ü" in line
    assert line.strip().isprintable() and safe("\x1b[2J\udcff") == "\ufffd[2J\ufffd"


def test_an_error_prints_no_control_code(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgecl.cli import main

    monkeypatch.setattr("sys.argv", ["edgecl", "--home", str(home), "observe", "\x1b[2J\x9b.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("edgecl: \ufffd[2J\ufffd.jsonl: cannot be read")
