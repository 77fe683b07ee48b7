"""The training stage in a real child: what it does with what an earlier try left, and what its errors name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgecl.child import ROOM, Limits, run_stage
from edgecl.data import Example
from edgecl.errors import EdgeclError, StageError
from edgecl.measure import record_of
from edgecl.profile import Profile, TrainSettings
from edgecl.train.checkpoint import VERSION, Facts, write_checkpoint
from tests import tiny

pytestmark = pytest.mark.alone

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=6, learning_rate=0.02, anchor_weight=0.0)
LIMITS = Profile(threads=1, ram_bytes=1_500_000_000)
PLENTY = Limits(ram_bytes=LIMITS.ram_bytes, seconds=120)
ROWS = [Example((("user", q), ("assistant", a))) for q, a in (("anne", "left"), ("a hen", "in"), ("tea", "on"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("stage") / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]


@pytest.fixture
def request_of(base: Path, tmp_path: Path) -> dict[str, Any]:
    """A request as a night makes it, in whose folder nothing was tried yet."""
    return {
        "base": str(base),
        "base_sha256": "base",
        "start": None,
        "new": [record_of(row) for row in ROWS[:2]],
        "replay": [record_of(row) for row in ROWS[2:]],
        "written": [],
        "reworded": [],
        "heldout": [],
        "settings": asdict(TRAIN),
        "quant": "Q8_0",
        "limits": asdict(LIMITS),
        "runs": str(tmp_path),
        "adapter_gguf": str(tmp_path / "adapter.gguf"),
        "asker_gguf": str(tmp_path / "asker.gguf"),
    }


def test_a_checkpoint_of_another_version_is_kept_aside_and_training_begins_anew(
    request_of: dict[str, Any], tmp_path: Path
) -> None:
    left = {}
    for name in ("checkpoint", "asker"):
        path = tmp_path / f"{name}.safetensors"
        write_checkpoint(path, Facts("base", "", VERSION + 1), {}, {})
        left[name] = path.read_bytes()
    result, _ = run_stage("train", request_of, PLENTY)
    assert result["steps"] == 6 and result["resumed_at"] == 0 and not result["no_asker"] and result["ask_s"] > 0
    said = f"; from the start: its checkpoint is damaged or of another version, and kept as {tmp_path / 'checkpoint.old'}"
    assert result["plan"].endswith(said)
    assert {name: (tmp_path / f"{name}.old").read_bytes() for name in left} == left


def test_after_a_try_that_took_too_much_memory_it_is_planned_with_less(request_of: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"took more than 0\.1 GB .*; the next try is planned with less$"):
        run_stage("train", request_of, replace(PLENTY, ram_bytes=100_000_000))
    assert json.loads((tmp_path / ROOM).read_text()) == [100_000_000, 0.85]
    assert run_stage("train", request_of, PLENTY)[0]["steps"] == 6, "what was too little says nothing of what is enough"
    (tmp_path / ROOM).write_text(json.dumps([PLENTY.ram_bytes, 0.05]))
    with pytest.raises(EdgeclError, match=r"training needs \d+ MB of memory at least, ram_bytes is 1500 MB; raise it"):
        run_stage("train", request_of, PLENTY)


def test_a_row_that_makes_a_night_diverge_is_named_as_the_store_names_it(request_of: dict[str, Any]) -> None:
    wild = replace(TRAIN, learning_rate=1e30, max_grad_norm=0.0)
    written = {"asked": [5, 6], "answer": [7], "likely": [[[7, 0.9], [8, 0.1]]]}
    made = request_of | {"settings": asdict(wild), "ids": [[17, 23], [4]], "written": [written], "asker_gguf": None}
    with pytest.raises(EdgeclError, match=r"at step \d of 6 \(rows: (17|23|4|written), ") as caught:
        run_stage("train", made, PLENTY)
    names = str(caught.value).split("(rows: ")[1].split("); lower")[0]
    assert set(names.split(", ")) == {"17", "23", "4", "written"}
