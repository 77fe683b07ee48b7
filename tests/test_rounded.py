"""Steps on weights as they will be rounded: what such weights are, where they are asked for, and what they bring."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgecl.profile import Profile, TrainSettings
from edgecl.rounded import aware, is_coarse, rounded_base
from edgecl.train import LatentStore, Night, TrainRow, train
from edgecl_convert import Adapter, GgufFile, merge
from tests.test_train import answer_loss, facts
from tests.tiny import build, random_adapter

Q = gguf.GGMLQuantizationType
pytestmark = pytest.mark.usefixtures("one_thread")


def entries(path: Path) -> list[bytes]:
    with closing(sqlite3.connect(path)) as db:
        return [key for (key,) in db.execute("select key from latents order by key")]


def updates(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: (b * np.float32(adapter.scaling(name))) @ a for name, (a, b) in adapter.pairs.items()}


@pytest.mark.parametrize(
    ("qtype", "quant", "coarse"),
    [
        (Q.Q4_1, "keep", True),
        (Q.Q4_0, "keep_kv8", True),
        (Q.F32, "Q4_0", True),
        (Q.Q4_1, "Q8_0", False),
        (Q.Q8_0, "keep", False),
        (Q.Q4_1, "F16", False),
    ],
)
def test_rounding_is_coarse_where_weights_of_layers_get_few_bits(tmp_path: Path, qtype: Q, quant: str, coarse: bool) -> None:
    with GgufFile(build(tmp_path / "tiny.gguf", qtype=qtype, width=128)[0]) as base:
        assert is_coarse(base, quant) == coarse


@pytest.mark.parametrize("quant", ["keep", "keep_kv8"])
def test_an_adapter_on_the_rounded_base_is_the_merged_file(tmp_path: Path, quant: str) -> None:
    with GgufFile(build(tmp_path / "tiny.gguf", qtype=Q.Q4_1, width=128)[0]) as base:
        adapter = random_adapter(base, size=0.05)
        merge(base, adapter, tmp_path / "merged.gguf", quant)
        with rounded_base(base, adapter, quant, tmp_path) as rounded, GgufFile(tmp_path / "merged.gguf") as merged:
            for name, update in updates(adapter).items():
                noise = merged.weights(name) - base.weights(name) - update
                missed = rounded.weights(name) + update - merged.weights(name)
                assert np.abs(missed).max() <= np.abs(rounded.weights(name)).max() / 127
                assert (missed**2).mean() < 0.05 * (noise**2).mean() or merged.tensors[name].qtype == Q.Q8_0
            others = base.tensors.keys() - adapter.pairs.keys()
            assert all(np.array_equal(rounded.weights(name), base.weights(name)) for name in others)
        assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_rounded_base_is_gone_after_an_error_too(tmp_path: Path) -> None:
    with (
        GgufFile(build(tmp_path / "tiny.gguf", qtype=Q.Q4_1, width=128)[0]) as base,
        pytest.raises(ZeroDivisionError),
        rounded_base(base, random_adapter(base), "keep", tmp_path) as rounded,
    ):
        assert rounded.path.is_file()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_third_of_a_nights_steps_more_is_made_on_rounded_weights_and_at_least_one() -> None:
    told = aware(TrainSettings(epochs=3, min_steps=60, learning_rate=1e-3, patience=2))
    assert (told.epochs, told.min_steps, told.patience) == (1, 20, 0) and told.learning_rate == pytest.approx(3e-4)
    assert aware(TrainSettings(epochs=1, min_steps=0)).min_steps == 1


def test_steps_on_rounded_weights_leave_the_states_of_the_base_alone(tmp_path: Path) -> None:
    """States below the trained layers are another matter on rounded weights: none is taken from the cache, none put there."""
    rows: list[TrainRow] = facts(6, 1)
    settings, limits = TrainSettings(r=4, epochs=2, min_steps=1, depth=0.5), Profile(threads=1)
    anchor = [[1, 2, 3, 4, 5]]
    with (
        GgufFile(build(tmp_path / "tiny.gguf", qtype=Q.Q4_1, width=128)[0]) as base,
        LatentStore(tmp_path / "latents.db", "b") as store,
    ):
        adapter, _ = train(base, rows[:3], [], settings, limits, Night(store=store, anchor=anchor))
        kept = entries(tmp_path / "latents.db")
        assert len(kept) > len(rows[:3])
        with rounded_base(base, random_adapter(base, size=0.5), "keep", tmp_path) as rounded:
            night = Night(start=adapter, store=store, anchor=anchor, is_rounded=True)
            taught, _ = train(rounded, rows, [], settings, limits, night)
            assert entries(tmp_path / "latents.db") == kept
            alone, _ = train(rounded, rows, [], replace(settings, anchor_weight=0.0), limits, Night(start=adapter))
            night.anchor = []
            without, _ = train(rounded, rows, [], replace(settings, anchor_weight=0.0), limits, night)
    assert all(np.array_equal(without.pairs[name][1], alone.pairs[name][1]) for name in alone.pairs)
    assert any(not np.array_equal(taught.pairs[name][1], alone.pairs[name][1]) for name in alone.pairs), "the anchor counts"


@pytest.mark.parametrize(("qtype", "quant", "share"), [(Q.Q4_0, "keep", 0.5), (Q.F32, "Q4_0", 0.9)])
def test_after_steps_on_rounded_weights_the_merged_file_knows_more_of_its_rows(
    tmp_path: Path, qtype: Q, quant: str, share: float
) -> None:
    """Of what the merge at four bits had cost these rows, most comes back; as many steps on the base do not bring it."""
    rows: list[TrainRow] = facts(12, 1)
    settings = TrainSettings(r=8, epochs=40, min_steps=1, anchor_weight=0.0, learning_rate=5e-3)
    last = replace(settings, epochs=10, learning_rate=1e-3)
    limits = Profile(threads=1)

    def served(adapter: Adapter) -> float:
        merge(base, adapter, tmp_path / "merged.gguf", quant)
        with GgufFile(tmp_path / "merged.gguf") as merged:
            return answer_loss(merged, None, rows)

    with GgufFile(build(tmp_path / "tiny.gguf", qtype=qtype, width=128)[0]) as base:
        adapter, _ = train(base, rows, [], settings, limits, Night())
        with rounded_base(base, adapter, quant, tmp_path) as rounded:
            taught, _ = train(rounded, rows, [], last, limits, Night(start=adapter))
        longer, _ = train(base, rows, [], last, limits, Night(start=adapter))
        cost = served(adapter) - answer_loss(base, adapter, rows)
        assert served(adapter) - served(taught) > 0.5 * cost
        assert served(taught) < share * served(longer)
