"""A model that was dropped to save space is written again when it is rolled back to, bit for bit or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from edgecl import Learner
from edgecl.errors import GenerationError
from edgecl.gate import GateSettings
from edgecl.generations import Manifest, sha256_file
from edgecl.profile import ReplaySettings, TrainSettings
from tests import tiny

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=5, learning_rate=0.02, anchor_weight=0.0)


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    """Two nights, of which the second alone keeps its model."""
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    replay, gate = ReplaySettings(written=0), GateSettings(max_prose_nats=100.0)
    with Learner.init(base, tmp_path / "home", keep_models=1, replay=replay, gate=gate, train=TRAIN) as one:
        for word in ("anne", "the inn"):
            one.observe([json.dumps({"prompt": word, "completion": "left"})])
            assert one.adapt(gate="report").accepted
        yield one


def test_a_rollback_writes_the_model_that_served_then(learner: Learner) -> None:
    first = learner.generations.load(1)
    assert not first.model.exists()
    assert learner.rollback().number == 1
    assert sha256_file(first.model) == first.manifest.files[first.model.name]
    assert first.model.stat().st_mode & 0o777 == 0o600
    assert learner.ask("anne", 4)
    assert learner.rollback(2).number == 2 and learner.rollback(0).number == 0


def test_what_cannot_be_written_again_as_it_was_does_not_serve(learner: Learner) -> None:
    first = learner.generations.load(1)
    path = first.folder / "manifest.json"
    files = first.manifest.files | {first.model.name: "0" * 64}
    path.write_text(json.dumps(replace(Manifest(**json.loads(path.read_text())), files=files).__dict__))
    with pytest.raises(GenerationError, match="was dropped to save space, or was damaged, and this edgecl merges another"):
        learner.rollback(1)
    assert learner.generations.current().number == 2 and not first.model.exists()
    first.model.write_bytes(b"of an earlier edgecl, or damaged")
    with pytest.raises(GenerationError, match="merges another"):
        learner.rollback(1)
    assert first.model.read_bytes() == b"of an earlier edgecl, or damaged" and not list(learner.home.rglob(".*.tmp"))
    (first.folder / "adapter.gguf").write_bytes(b"GGUF")
    with pytest.raises(GenerationError, match=r"adapter\.gguf was changed since it was published"):
        learner.rollback(1)
    assert learner.generations.current().number == 2 and learner.ask("anne", 4)
