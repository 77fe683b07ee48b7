"""What tests of several modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread in torch: sums are then added in one order, and tiny models run faster."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama folder as transformers saves it, 64 wide, that a test may change."""
    from hf_models import build

    build(tmp_path / "mödel", num_hidden_layers=1)
    return tmp_path / "mödel"
