"""Where a home is made, and where not: where `init` fails, a folder that was there is as it was, its mode and its files."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
from pathlib import Path

import gguf
import pytest

from edgecl import Learner, home
from edgecl.errors import EdgeclError, SettingError
from edgecl.home import NEW_BASE
from edgecl.places import default_home
from tests import tiny
from tests.test_cli import one_line, run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("base") / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def folder_of(path: Path) -> Path:
    path.mkdir()
    path.chmod(0o755)
    return path


# --- what is in the folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [(), ("--force",)])
def test_a_folder_with_other_files_in_it_is_refused_and_left_as_it_was(
    tmp_path: Path, base: Path, option: tuple[str, ...]
) -> None:
    place = folder_of(tmp_path / "documents")
    for name in ("lock", "base-notes.txt", "will.txt"):
        (place / name).write_text("mine")
    code, _, error = run(place, "init", base, *option)
    assert code == 1 and one_line(error, "documents has other files in it and no edgecl.toml; choose another --home"), error
    assert mode(place) == 0o755 and sorted(os.listdir(place)) == ["base-notes.txt", "lock", "will.txt"]


def test_an_empty_folder_becomes_a_home_and_its_owners_alone(tmp_path: Path, base: Path) -> None:
    Learner.init(base, folder_of(tmp_path / "home")).close()
    assert mode(tmp_path / "home") == 0o700


@pytest.mark.parametrize("is_there", [True, False])
def test_an_init_that_fails_leaves_a_folder_as_it_was(tmp_path: Path, base: Path, is_there: bool) -> None:
    (tmp_path / "tight.toml").write_text("ram_bytes = 1_000_000\n")
    place = folder_of(tmp_path / "home") if is_there else tmp_path / "home"
    with pytest.raises(EdgeclError, match="raise ram_bytes"):
        Learner.init(base, place, precision="f16", profile=str(tmp_path / "tight.toml"))
    assert place.exists() is is_there
    if is_there:
        assert mode(place) == 0o755 and not os.listdir(place)


def test_an_init_that_is_interrupted_takes_back_what_it_made(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(home, "write_atomic", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Learner.init(base, tmp_path / "home", precision="f16")
    assert not (tmp_path / "home").exists()


def test_an_init_that_was_killed_is_run_again(tmp_path: Path, base: Path) -> None:
    place = folder_of(tmp_path / "home")
    for name in ("lock", f".{NEW_BASE}.killed.tmp", "base-F16.gguf"):
        (place / name).touch()
    with Learner.init(base, place, precision="f16") as learner:
        assert learner.ask("anne", 2) is not None
    assert not list(place.glob(".*"))


def test_a_home_that_was_half_replaced_can_be_replaced_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = tmp_path / "home"
    Learner.init(base, place).close()
    (place / "runs").mkdir()  # of a night
    monkeypatch.setattr("edgecl.home.shutil.rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        Learner.init(base, place, force=True)
    monkeypatch.undo()
    with Learner.init(base, place, force=True) as learner:
        assert learner.generations.numbers() == [0] and learner.ask("anne", 2) is not None


# --- where it is ------------------------------------------------------------------------------------------------------


def test_without_a_home_of_the_user_the_default_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise KeyError

    for name in ("HOME", "EDGECL_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(SettingError, match=r"^~/\.local/share/edgecl/default: .* give --home DIR without it$"):
        default_home()
    monkeypatch.setenv("EDGECL_HOME", "/srv/learner")
    assert default_home() == Path("/srv/learner")


def test_a_tilde_that_the_shell_left_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGECL_HOME", "~/x")
    assert default_home() == tmp_path / "x"
    code, _, error = run(Path("~/y"), "status")
    assert code == 1 and one_line(error, f"{tmp_path}/y is not a learner's home"), error
    code, _, error = run(Path("~nobody-has-this-name/y"), "status")
    assert code == 1 and one_line(error, "~nobody-has-this-name/y: nothing says which folder ~ is"), error


# --- profiles and bases ------------------------------------------------------------------------------------------------


def test_init_says_which_profile_it_took_and_takes_its_quant(tmp_path: Path, base: Path) -> None:
    code, out, error = run(tmp_path / "one", "init", base)
    assert code == 0 and "proposed for this machine" in out, error
    code, out, error = run(tmp_path / "two", "init", base, "--profile", "raspberry-pi-5", "--json")
    facts = json.loads(out)
    assert code == 0 and (facts["profile"], facts["quant"]) == ("raspberry-pi-5", "int4"), error
    code, out, _ = run(tmp_path / "three", "init", base, "--profile", "raspberry-pi-5", "--quant", "int8")
    assert code == 0 and "will serve int8" in out and "its profile is raspberry-pi-5\n" in out


def test_a_profile_of_ones_own_is_found_from_every_folder(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text("ram_bytes = 1_234_000_000\n")
    monkeypatch.chdir(tmp_path)
    Learner.init(base, tmp_path / "home", profile="mine.toml").close()
    monkeypatch.chdir("/")
    with Learner(tmp_path / "home") as learner:
        assert learner.profile.ram_bytes == 1_234_000_000


def test_a_home_that_was_not_replaced_after_all_is_as_it_was(tmp_path: Path, base: Path) -> None:
    (tmp_path / "tight.toml").write_text("ram_bytes = 1_000_000\n")
    Learner.init(base, tmp_path / "home", precision="f16").close()
    (written,) = (tmp_path / "home").glob("base-*.gguf")
    before = written.stat()
    other = tiny.build(tmp_path / "other.gguf", seed=7)[0]
    with pytest.raises(EdgeclError, match=r"other\.gguf cannot be used: .*raise ram_bytes"):
        Learner.init(other, tmp_path / "home", precision="f16", force=True, profile=str(tmp_path / "tight.toml"))
    with Learner(tmp_path / "home") as learner:
        assert learner.ask("anne", max_tokens=2) is not None
    assert (written.stat().st_ino, written.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list((tmp_path / "home").glob(".base*"))


def test_a_base_that_nights_could_not_train_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "scaled.gguf", "gemma3", fields={"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})[0]
    with pytest.raises(EdgeclError, match=r"rope\.scaling\.type = linear is not supported for training"):
        Learner.init(base, tmp_path / "home")
    assert not (tmp_path / "home/edgecl.toml").exists()


def test_a_home_is_not_replaced_with_a_model_of_its_own(tmp_path: Path, base: Path) -> None:
    home = tmp_path / "home"
    Learner.init(base, home).close()
    model = home / "generations/0001/model-Q8_0.gguf"
    model.parent.mkdir()
    shutil.copy(base, model)
    with pytest.raises(SettingError, match=r"model-Q8_0\.gguf is of the home that it would replace; copy it elsewhere first"):
        Learner.init(model, home, force=True)
    assert model.is_file() and Learner(home).ask("anne", max_tokens=2) is not None
    Learner.init(model, home, force=True, precision="f16").close()  # a base of its own is written of it first
    assert Learner(home).ask("anne", max_tokens=2) is not None and not model.exists()
