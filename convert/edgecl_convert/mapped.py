"""Weight files as memory maps whose pages go back to the system once a tensor is done."""

from __future__ import annotations

import mmap
from pathlib import Path


def map_file(path: Path) -> mmap.mmap:
    """Return a read-only map of a whole file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """
    with open(path, "rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def release(mapped: mmap.mmap, offset: int, n_bytes: int) -> None:
    """Let go of the pages of `n_bytes` from `offset`: they are read again if they are wanted again."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    if n_bytes and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, start, offset + n_bytes - start)
