"""Files that appear whole or not at all.

A file is written beside its destination under a temporary name, fsynced, renamed, and its folder fsynced: a crash or a
full disk at any point leaves the old file, or none, and never half of one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import ConvertError


def fsync_folder(folder: Path | str) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path | str, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well.

    Raises:
        ConvertError: the file cannot be created or written (full disk, missing or read-only folder).
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with open(descriptor, "wb") as out:
            os.fchmod(out.fileno(), mode)
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        temporary = None
        fsync_folder(path.parent)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a small file whole or not at all.

    Raises:
        ConvertError: the file cannot be created or written.
    """
    with atomic_file(path) as out:
        out.write(data.encode("utf-8") if isinstance(data, str) else data)
