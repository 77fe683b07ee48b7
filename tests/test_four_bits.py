"""Nights at four bits: the base has as many, and what they learn is all in the file that serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from edgecl import Learner
from edgecl.gate import GateSettings
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl_convert import Adapter, GgufFile, read_gguf_adapter
from edgecl_convert.grid import by_block
from tests import tiny

Q = gguf.GGMLQuantizationType
TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=10, learning_rate=0.02, anchor_weight=0.0)
LOOSE = {"replay": ReplaySettings(written=0), "gate": GateSettings(max_prose_nats=100.0), "train": TRAIN}


def night(learner: Learner, prompt: str, answer: str) -> tuple[dict[str, float], Adapter]:
    """Return the answer losses that a night reports, and its adapter."""
    learner.observe([json.dumps({"prompt": prompt, "completion": answer})])
    report = learner.adapt(gate="report")
    assert report.accepted
    return report.losses, read_gguf_adapter(learner.generations.current().folder / "adapter.gguf")


def ranks(adapter: Adapter) -> set[int]:
    return {len(a) for a, _ in adapter.pairs.values()}


def test_what_nights_learn_is_all_in_the_file_and_they_go_on_at_another_width(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=Q.Q4_0, width=128)[0]
    with Learner.init(base, tmp_path / "home", quant="int4", **LOOSE) as learner:
        for prompt, answer in (("anne", "left"), ("the inn", "right")):
            losses, adapter = night(learner, prompt, answer)
            assert losses["adapter"] < 0.5 * losses["before"]
            assert losses["int4"] == pytest.approx(losses["adapter"], rel=0.05, abs=0.01)
            assert ranks(adapter) == {2 * TRAIN.r} and all(by_block(a) is not None for a, _ in adapter.pairs.values())
        with GgufFile(learner.generations.current().model) as served:
            layers = {info.qtype for name, info in served.tensors.items() if name.startswith("blk") and len(info.shape) > 1}
        assert layers == {Q.Q4_1}
        learner.settings = replace(learner.settings, quant="int8")
        _, wider = night(learner, "a hen", "left")
        assert ranks(wider) == {2 * TRAIN.r}, "a rank is never less than it was"
        assert all(by_block(a) is None for a, _ in wider.pairs.values())
        learner.settings = replace(learner.settings, quant="int4")
        _, again = night(learner, "then", "right")
        assert all(by_block(a) is None for a, _ in again.pairs.values()), "what differs within blocks is not lost"


@pytest.mark.parametrize(
    ("qtype", "quant", "written"),
    [(Q.F16, "int4", "Q4_1"), (Q.Q8_0, "int4", "Q4_1"), (Q.F16, "int8", ""), (Q.Q4_0, "int4", ""), (Q.F16, "F16", "")],
)
def test_a_model_of_more_bits_is_written_with_four_before_its_nights_are_served_with_four(
    tmp_path: Path, qtype: Q, quant: str, written: str
) -> None:
    model = tiny.build(tmp_path / "tiny.gguf", qtype=qtype, width=128)[0]
    with Learner.init(model, tmp_path / "home", quant=quant, **LOOSE) as learner:
        base = Path(learner.settings.base)
        assert base == (tmp_path / f"home/base-{written}.gguf" if written else model)
        with GgufFile(base) as file:
            assert file.tensors["blk.0.attn_q.weight"].qtype == (Q[written] if written else qtype)
        assert learner.settings.quant == quant


def test_a_mixture_learns_in_minimums_where_it_has_four_bits_and_in_codes_where_it_has_six(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "tiny.gguf", qtype=Q.F16, width=256)[0]
    with Learner.init(model, tmp_path / "home", quant="int4", **LOOSE) as learner:
        with GgufFile(learner.settings.base) as base:
            layers = {name: info.qtype for name, info in base.tensors.items() if name.startswith("blk") and len(info.shape) > 1}
        assert set(layers.values()) == {Q.Q4_K, Q.Q6_K}
        losses, adapter = night(learner, "anne", "left")
        assert losses["int4"] == pytest.approx(losses["adapter"], rel=0.05, abs=0.01)
        assert {name: by_block(a) is not None for name, (a, _) in adapter.pairs.items()} == {
            name: qtype == Q.Q4_K for name, qtype in layers.items()
        }
        with GgufFile(learner.generations.current().model) as served:
            assert {name: served.tensors[name].qtype for name in layers} == {
                name: Q.Q4_1 if qtype == Q.Q4_K else qtype for name, qtype in layers.items()
            }


@pytest.mark.parametrize(("at_most", "served"), [(0.01, "model-Q8_0.gguf"), (-1.0, "base + adapter")])
def test_a_merge_that_loses_the_night_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: float, served: str
) -> None:
    monkeypatch.setattr("edgecl.night.NEGLIGIBLE_NATS", at_most)
    model = tiny.build(tmp_path / "tiny.gguf", qtype=Q.F16, width=128)[0]
    gate = GateSettings(max_prose_nats=100.0, min_survival=1.0)
    little = replace(TRAIN, min_steps=2, learning_rate=0.002, freeze_at=1.0)
    settings = LOOSE | {"gate": gate, "train": little}
    with Learner.init(model, tmp_path / "home", quant="Q4_0", **settings) as learner:
        learner.observe([json.dumps({"prompt": "anne", "completion": "left"})])
        report = learner.adapt(gate="report")
        assert report.losses["Q4_0"] > report.losses["adapter"] + 0.01
        assert report.served == served and report.reason.startswith("Q4_0 kept ") and f"so {served} serves" in report.reason
        current = learner.generations.current()
        assert (current.adapter is None) == (served != "base + adapter") and len(list(current.folder.glob("model-*"))) <= 1
