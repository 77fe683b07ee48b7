"""Memory that is given back before training is planned: code comes back when it is run, what was written stays."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgecl.train.memory import resident_set

pytestmark = pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="only where a process can see its maps")

AFTER_IMPORT = """
import psutil, torch
from edgecl.train.memory import resident_set
x = torch.arange(12.0).view(3, 4)
product, before = (x @ x.T).tolist(), psutil.Process().memory_info().rss
after = resident_set()
assert after < before - 40_000_000, (before, after)
assert abs(psutil.Process().memory_info().rss - after) < 10_000_000
assert (x @ x.T).tolist() == product
"""


def test_code_that_only_importing_torch_needed_is_given_back_and_what_is_run_comes_back() -> None:
    subprocess.run([sys.executable, "-c", AFTER_IMPORT], check=True)


def test_pages_that_were_written_to_stay(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(b"file" * mmap.PAGESIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        pages[:4] = b"mine"
        address = ctypes.addressof(held := ctypes.c_char.from_buffer(pages))
        protected = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), 1)
        assert protected == 0, "read only, as code is after its relocation"
        resident_set()
        assert pages[:8] == b"minefile"
        del held
