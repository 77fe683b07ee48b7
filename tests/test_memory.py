"""Memory that is given back before training is planned: code comes back when it is run, what was written stays."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tiny import build

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


WITHOUT_SYMPY = """
import sys
from edgecl.profile import TrainSettings
from edgecl.train import TrainRow, train
from edgecl.train.decoder import Decoder
from edgecl.train.lora import Lora
from edgecl.train.losses import backward
from edgecl.train.weights import placement
from edgecl_convert import GgufFile
rows = [TrainRow([5, 6, 7, 8], [False, False, True, True])] * 8
with GgufFile(sys.argv[1]) as base:
    train(base, rows, [], TrainSettings(epochs=1, min_steps=1))
    decoder = Decoder(base, placement(0))
    decoder.checkpointing = True
    backward(decoder, Lora(base, decoder.shape, 8, 16.0, 0, decoder.place), rows, None, 0.0, 768)
assert "sympy" not in sys.modules
"""


def test_training_does_without_sympy_which_torch_loads_with_a_gradient_that_it_is_handed(tmp_path: Path) -> None:
    path, _ = build(tmp_path / "base.gguf", "llama")
    subprocess.run([sys.executable, "-c", WITHOUT_SYMPY, path], check=True)


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
