"""Lineage on disk: publishing, pointing, rolling back, and a kill between any two steps, which leaves a model that serves."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecl.errors import GenerationError
from edgecl.generations import Generations, Manifest, now, sha256_file
from edgecl.profile import Settings

BASE = b"the base's weights"


def home_with_base(home: Path, base: Path | None = None) -> Generations:
    """A home whose base is a small file, beside it where no other place is named."""
    base = base or home.parent / "base.gguf"
    base.write_bytes(BASE)
    stat = base.stat()
    generations = Generations(home)
    generations.create_base(
        Manifest(0, "", sha256_file(base), str(base), now(), base_bytes=stat.st_size, base_mtime_ns=stat.st_mtime_ns)
    )
    return generations


@pytest.fixture
def generations(tmp_path: Path) -> Generations:
    return home_with_base(tmp_path / "home")


def publish(generations: Generations, merged: bool = True) -> int:
    """One night that leaves a model file (or an adapter alone); return its number."""
    parent, number, draft = generations.current(), generations.next_number(), generations.draft()
    (draft / "adapter.gguf").write_bytes(b"adapter %d" % number)
    if merged:
        (draft / "model.gguf").write_bytes(b"model %d" % number)
    manifest = Manifest(number, parent.hash, parent.manifest.base_sha256, "model.gguf" if merged else "", now(), learned=[1, 2])
    assert generations.publish(draft, manifest).number == number
    return number


# --- lineage ----------------------------------------------------------------------------------------------------------


def test_the_base_serves_until_a_night_is_published(generations: Generations) -> None:
    current = generations.current()
    assert (current.number, current.adapter, current.model.read_bytes()) == (0, None, BASE)
    assert [publish(generations), publish(generations, merged=False), publish(generations)] == [1, 2, 3]
    assert generations.numbers() == [0, 1, 2, 3]
    assert os.readlink(generations.link) == "generations/0003"  # relative: a home may be moved
    assert generations.current().model.read_bytes() == b"model 3"
    for number in (1, 2, 3):
        assert generations.load(number).manifest.parent == generations.load(number - 1).hash
    unmerged = generations.load(2)
    assert unmerged.model.read_bytes() == BASE
    assert unmerged.adapter is not None and unmerged.adapter.read_bytes() == b"adapter 2"
    assert generations.load(3).manifest.learned == [1, 2]


def test_rolling_back_deletes_nothing_and_the_next_night_goes_on_from_there(generations: Generations) -> None:
    publish(generations), publish(generations)
    generations.point(1)
    assert generations.current().number == 1 and generations.numbers() == [0, 1, 2]
    assert publish(generations) == 3  # never 2 again
    assert generations.load(3).manifest.parent == generations.load(1).hash
    generations.point(2)
    assert generations.current().model.read_bytes() == b"model 2"


def test_what_was_rolled_back_is_unknown_and_where_ancestors_are_hidden_nothing_is(generations: Generations) -> None:
    assert generations.unknown(generations.current()) == set()
    for _ in range(3):
        publish(generations)
    generations.point(1)
    assert publish(generations) == 4
    assert [generations.unknown(generations.load(number)) for number in (0, 1, 3, 4)] == [{1, 2, 3, 4}, {2, 3, 4}, {4}, {2, 3}]
    publish(generations)
    (generations.folder / "0004/manifest.json").write_text("{")
    assert generations.unknown(generations.current()) == set()


def test_a_moved_home_serves_on(generations: Generations, tmp_path: Path) -> None:
    publish(generations)
    generations.home.rename(tmp_path / "elsewhere")
    assert Generations(tmp_path / "elsewhere").current().model.read_bytes() == b"model 1"


def test_a_number_is_not_used_again_while_its_folder_is_there(generations: Generations) -> None:
    publish(generations), publish(generations)
    generations.point(1)
    (generations.load(2).folder / "manifest.json").unlink()
    assert generations.numbers() == [0, 1]
    assert publish(generations) == 3


def test_publishing_over_a_generation_is_refused_and_what_served_serves(generations: Generations) -> None:
    publish(generations)
    draft = generations.draft()
    with pytest.raises(GenerationError, match="generation 1 could not be published"):
        generations.publish(draft, replace(generations.current().manifest, created="later"))
    assert generations.current().model.read_bytes() == b"model 1"
    assert generations.current().manifest.created != "later"


def test_drafts_of_nights_that_died_are_removed(generations: Generations) -> None:
    (generations.folder / ".draft-99999999").mkdir()
    (generations.folder / ".draft-99999999" / "half.gguf").write_bytes(b"x")
    draft = generations.draft()
    assert [p.name for p in generations.folder.iterdir() if p.name.startswith(".")] == [draft.name]
    assert generations.numbers() == [0]


@pytest.mark.parametrize(("keep", "left"), [(0, [5]), (1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_old_models_are_dropped_but_not_what_serves(generations: Generations, keep: int, left: list[int]) -> None:
    for _ in range(5):
        publish(generations)
    generations.drop_old_models(keep)
    assert [n for n in range(1, 6) if generations.load(n).model.exists()] == left
    generations.point(max(1, left[0]))
    generations.drop_old_models(1)
    assert generations.current().model.exists() and Path(generations.load(0).manifest.model).read_bytes() == BASE
    assert all((generations.load(n).folder / "adapter.gguf").exists() for n in range(1, 6))


def test_a_damaged_old_generation_does_not_stand_in_the_way_of_dropping_others(generations: Generations) -> None:
    for _ in range(3):
        publish(generations)
    (generations.load(1).folder / "manifest.json").write_text("{")
    generations.drop_old_models(1)
    assert not generations.load(2).model.exists() and generations.current().model.exists()


# --- a kill between any two steps -------------------------------------------------------------------------------------

STEPS = ("open", "fsync", "rename", "replace", "symlink", "unlink", "mkdir")
KILLED = f"""
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_generations import Generations, publish

def count(name, real):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == k:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, step)

root, status = Path(sys.argv[1]), signal.SIGKILL
for k in range(1, 100):
    home = root / f"killed-at-{{k:02d}}" / "home"
    shutil.copytree(root / "home", home, symlinks=True)
    if not (child := os.fork()):
        steps = 0
        for name in {STEPS!r}:
            count(name, getattr(os, name))
        publish(Generations(home))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_kill_between_any_two_steps_of_publishing_leaves_a_model_that_serves(generations: Generations) -> None:
    publish(generations)
    root = generations.home.parent
    subprocess.run([sys.executable, "-c", KILLED, str(root), str(Path(__file__).parent)], check=True, timeout=60)
    homes = sorted(root.glob("killed-at-*/home"))
    assert len(homes) > 10  # every step was reached, and the last child was not killed
    served = []
    for home in homes:
        survivor = Generations(home)
        current = survivor.current()
        served.append(current.number)
        assert current.model.read_bytes() == b"model %d" % current.number
        assert all(survivor.load(n).model.exists() for n in survivor.numbers())
        before = survivor.numbers()
        number = publish(survivor)
        assert number == before[-1] + 1
        assert survivor.current().model.read_bytes() == b"model %d" % number
        assert not list(survivor.folder.glob(".draft-*"))
    assert served == sorted(served) and served[0] == 1 and served[-1] == 2


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_home_without_generations_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="serves no generation; run `edgecl init MODEL`"):
        Generations(tmp_path).current()
    with pytest.raises(GenerationError, match="there are: none"):
        Generations(tmp_path).load(0)
    assert Generations(tmp_path).numbers() == [] and Generations(tmp_path).next_number() == 0


def test_a_generation_that_is_not_there_is_answered_with_those_that_are(generations: Generations) -> None:
    publish(generations)
    with pytest.raises(GenerationError, match=r"there is no generation 7 in .*; there are: 0, 1"):
        generations.load(7)


@pytest.mark.parametrize("target", ["generations/first", "../elsewhere", "generations", "generations/0009"])
def test_a_link_that_leads_nowhere_is_a_generation_error(generations: Generations, target: str) -> None:
    generations.link.unlink()
    generations.link.symlink_to(target)
    with pytest.raises(GenerationError):
        generations.current()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"number": 1}', '{"unknown": 1}', "\0\0\0"])
def test_a_damaged_manifest_is_a_generation_error(generations: Generations, text: str) -> None:
    publish(generations)
    (generations.current().folder / "manifest.json").write_text(text)
    with pytest.raises(GenerationError, match=r"manifest\.json is damaged: .*; roll back to another"):
        generations.current()
    generations.point(0)
    assert generations.current().number == 0


@pytest.mark.parametrize("change", [{"number": 3}, {"base_sha256": "0" * 64}])
def test_a_manifest_of_another_lineage_is_a_generation_error(generations: Generations, change: dict[str, object]) -> None:
    publish(generations)
    path = generations.current().folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(GenerationError, match="belongs to another base or number"):
        generations.current()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_byte_of_a_manifest_may_break(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "bytes"
    if not root.exists():
        root.mkdir()
        publish(home_with_base(root / "home"))
    generations = Generations(root / "home")
    path = generations.folder / "0001" / "manifest.json"
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = (
        whole[:at] if data.draw(st.booleans()) else whole[:at] + data.draw(st.binary(min_size=1, max_size=3)) + whole[at + 1 :]
    )
    try:
        path.write_bytes(broken)
        loaded = generations.load(1)
        assert loaded.number == 1
    except GenerationError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)


# --- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_the_base_must_be_the_file_that_it_was(generations: Generations, full: bool) -> None:
    base = Path(generations.load(0).manifest.model)
    generations.check_base(full)
    os.utime(base, (1, 1))
    generations.check_base(full)  # touched only: its bytes are the same
    base.write_bytes(BASE + b"!")
    with pytest.raises(GenerationError, match=r"has sha256 .*, it was .* at init; put the old file back"):
        generations.check_base(full)
    base.write_bytes(BASE.upper())
    with pytest.raises(GenerationError, match="has sha256"):
        generations.check_base(full)
    base.unlink()
    with pytest.raises(GenerationError, match=r"is gone \(No such file or directory\); put it back"):
        generations.check_base(full)
    base.mkdir()
    with pytest.raises(GenerationError, match=r"is gone \(Is a directory\)"):
        generations.check_base(full)


def test_only_a_full_check_sees_other_bytes_under_the_old_size_and_time(generations: Generations) -> None:
    manifest = generations.load(0).manifest
    Path(manifest.model).write_bytes(BASE.upper())
    os.utime(manifest.model, ns=(manifest.base_mtime_ns, manifest.base_mtime_ns))
    generations.check_base(full=False)
    with pytest.raises(GenerationError, match="has sha256"):
        generations.check_base(full=True)


def test_a_home_may_be_copied_whole(generations: Generations, tmp_path: Path) -> None:
    publish(generations)
    shutil.copytree(generations.home, tmp_path / "copy", symlinks=True)
    assert publish(Generations(tmp_path / "copy")) == 2 and generations.numbers() == [0, 1]


def naming(generations: Generations, base: Path) -> Generations:
    """The same home, whose edgecl.toml names a base."""
    (generations.home / "edgecl.toml").write_text(Settings(base=str(base)).to_toml())
    return Generations(generations.home)


@pytest.mark.parametrize("full", [False, True])
def test_a_base_may_be_moved_where_edgecl_toml_says_so_and_no_other_file_takes_its_place(
    generations: Generations, tmp_path: Path, full: bool
) -> None:
    publish(generations, merged=False)
    moved = Path(generations.load(0).manifest.model).rename(tmp_path / "moved.gguf")
    with pytest.raises(GenerationError, match=r"is gone .*; put it back, or set `base` in .*edgecl\.toml to where it is now"):
        generations.check_base(full)
    found = naming(generations, moved)
    found.check_base(full)
    assert found.load(0).model == found.load(1).model == moved
    other = tmp_path / "other.gguf"
    other.write_bytes(BASE.upper())
    shutil.copystat(moved, other)
    with pytest.raises(GenerationError, match=r"other\.gguf has sha256 .*, it was .* at init"):
        naming(generations, other).check_base(full)


def test_a_base_that_was_moved_is_hashed_once(generations: Generations, tmp_path: Path) -> None:
    moved = Path(generations.load(0).manifest.model).rename(tmp_path / "moved.gguf")
    os.utime(moved, (1, 1))
    naming(generations, moved).check_base(full=False)
    moved.write_bytes(BASE.upper())
    os.utime(moved, (1, 1))
    Generations(generations.home).check_base(full=False)
    with pytest.raises(GenerationError, match="has sha256"):
        Generations(generations.home).check_base(full=True)


def test_a_base_that_lies_in_the_home_moves_with_it(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    publish(naming(home_with_base(home, home / "base-F16.gguf"), home / "base-F16.gguf"), merged=False)
    home.rename(elsewhere)
    home.mkdir()
    (home / "base-F16.gguf").write_bytes(b"of a home that was made where this one was")
    moved = Generations(elsewhere)
    moved.check_base(full=True)
    assert moved.load(0).model == moved.current().model == elsewhere / "base-F16.gguf"
