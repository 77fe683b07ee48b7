"""Files appear whole or not at all: private, in one step, and a full disk leaves what was there."""

from pathlib import Path

import pytest
from gguf_helpers import child_with_small_files, shapes, write_model

from edgecl_convert import ConvertError, GgufFile, atomic_file, write_atomic


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    path.chmod(0o644)
    return path


def assert_untouched(old: Path) -> None:
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert old.read_text() == "old" and old.stat().st_mode & 0o777 == 0o644


def test_a_new_file_is_private_and_replaces_the_old_one(old: Path) -> None:
    write_model(old)
    assert old.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    with GgufFile(old) as model:
        assert {name: info.shape for name, info in model.tensors.items()} == shapes(64, 2)


def test_a_reader_keeps_the_file_it_opened_until_the_end_and_after(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    before = path.read_bytes()
    with GgufFile(path) as reader:
        weights = reader.weights("output_norm.weight")
        with atomic_file(path) as out:
            out.write(b"new")
            out.flush()
            assert path.read_bytes() == before
        assert path.read_bytes() == b"new"
        assert (reader.weights("output_norm.weight") == weights).all()


def test_the_mode_is_the_one_asked_for(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "unit", mode=0o644) as out:
        out.write(b"x")
    assert (tmp_path / "unit").stat().st_mode & 0o777 == 0o644


def test_text_and_bytes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "naïve\n")
    write_atomic(tmp_path / "b", b"\0")
    assert (tmp_path / "a").read_bytes() == "naïve\n".encode() and (tmp_path / "b").read_bytes() == b"\0"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file(error: type[BaseException], old: Path) -> None:
    with pytest.raises(error), atomic_file(old) as out:
        out.write(b"half")
        raise error
    assert_untouched(old)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "m.gguf", tmp_path):
        with pytest.raises(ConvertError, match=r"cannot be written: (No such file|Is a directory)"):
            write_atomic(path, "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit_bytes", [0, 1000, 100_000])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(limit_bytes: int, old: Path) -> None:
    code = """
from pathlib import Path
from gguf_helpers import write_model
try:
    write_model(Path(sys.argv[1]))
except ValueError as error:
    print(type(error).__name__, error)
"""
    done = child_with_small_files(code, limit_bytes, old)
    assert done.stdout == f"ConvertError {old}: cannot be written: File too large\n", done.stderr
    assert_untouched(old)
