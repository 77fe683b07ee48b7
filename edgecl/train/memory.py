"""What a process holds in memory, and giving back of it what training does not need."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

import psutil

FEW_KERNELS = 32  # that oneDNN keeps where memory is short: those of a step, instead of all


def forget_kernels() -> None:
    """Have oneDNN keep FEW_KERNELS; it reads that once, before its first product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(FEW_KERNELS))


def resident_set() -> int:
    """Return the bytes of memory that this process holds, after it has given back what its libc and kernel let it."""
    process = psutil.Process()
    with suppress(OSError, AttributeError, psutil.Error):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        _drop_code(libc, process)
    return int(process.memory_info().rss)


def _drop_code(libc: ctypes.CDLL, process: psutil.Process) -> None:
    """Have the pages of libraries dropped that only loading them needed: importing torch runs through 70 MB of it once.

    What is run again comes back from the page cache. Pages that were written to have no other copy: their maps are left alone.
    """
    for found in process.memory_maps(grouped=False):
        if found.path.startswith("/") and found.perms in ("r-xp", "r--p") and not found.anonymous:
            first, last = (int(address, 16) for address in found.addr.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
