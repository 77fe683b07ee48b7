"""Checkpoints: an interrupted run ends where an uninterrupted one ends, bit for bit; what does not fit is refused and kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import build, random_adapter, random_tokens

from edgecl.errors import NotNow
from edgecl.profile import Profile, TrainSettings
from edgecl.train import LatentStore, Night, TrainRow, train
from edgecl.train.checkpoint import CheckpointError, Facts, read_checkpoint, write_checkpoint
from edgecl.train.latents import Latents
from edgecl_convert import Adapter, GgufFile

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = TrainSettings(epochs=3, depth=1.0, min_steps=1, learning_rate=5e-3, batch_rows=4, replay_rows=2)
ONE = Profile(threads=1)
FACTS = Facts("base", "run")


class Interrupted(Exception):
    """What the test throws into a run."""


def rows(n: int, seed: int) -> list[TrainRow]:
    return [TrainRow(random_tokens(12, 100 * seed + i), [False] * 9 + [True] * 3) for i in range(n)]


NEW, REPLAY, HELDOUT, ANCHOR = rows(14, 1), rows(5, 2), rows(4, 3), [random_tokens(16, i) for i in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with GgufFile(build(tmp_path_factory.mktemp("checkpoint") / "base.gguf")[0]) as gguf:
        yield gguf


def night(path: Path, **more) -> Night:
    return Night(anchor=ANCHOR, heldout=HELDOUT, checkpoint=path, checkpoint_every_s=0.0, base_sha256="base", **more)


def interrupted(base, path: Path, at: int, settings=SETTINGS, **more) -> None:
    """Train until `at` steps are done; the checkpoint is then of that step or the one before."""

    def stop(done: int, total: int, loss: float) -> None:
        if done == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(base, NEW, REPLAY, settings, ONE, night(path, **more), stop)


def same(one: Adapter, other: Adapter) -> bool:
    return one.pairs.keys() == other.pairs.keys() and all(
        np.array_equal(x, y) for name in one.pairs for x, y in zip(one.pairs[name], other.pairs[name], strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, ema_decay=0.9, schedule="oscillating"),
        replace(SETTINGS, patience=2, eval_every=2),
        replace(SETTINGS, depth=0.5, weight_decay=0.1),
    ],
    ids=["plain", "averaged", "early stop", "half depth"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(base, tmp_path, settings):
    start = random_adapter(base, size=0.1, r=8, lora_alpha=16.0)
    whole, report = train(base, NEW, REPLAY, settings, ONE, Night(start=start, anchor=ANCHOR, heldout=HELDOUT))
    path = tmp_path / "checkpoint.safetensors"
    for at in (3, 5):  # interrupted twice
        interrupted(base, path, at, settings, start=start)
        assert path.is_file()
    resumed, again = train(base, NEW, REPLAY, settings, ONE, night(path, start=start))
    assert again.resumed_at == 4 and report.resumed_at == 0
    assert same(resumed, whole)
    assert (again.losses, again.heldout, again.steps) == (report.losses, report.heldout, report.steps)
    other, _ = train(base, NEW, REPLAY, replace(settings, seed=1), ONE, Night(start=start, anchor=ANCHOR, heldout=HELDOUT))
    assert not same(other, whole)


KILLED = """
import json, os, signal, sys
from edgecl.profile import Profile, TrainSettings
from edgecl.train import Night, TrainRow, train
from edgecl_convert import GgufFile
asked = json.load(sys.stdin)
new, replay, heldout = ([TrainRow(*row) for row in asked[key]] for key in ("new", "replay", "heldout"))
def progress(done, total, loss):
    print(done, flush=True)
    if done == asked["at"]:
        os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
path = Path(asked["path"])
night = Night(anchor=asked["anchor"], heldout=heldout, checkpoint=path, checkpoint_every_s=0.0, base_sha256="base")
train(GgufFile(asked["base"]), new, replay, TrainSettings(**asked["settings"]), Profile(threads=1), night, progress)
"""


def test_a_killed_run_loses_at_most_the_steps_since_its_checkpoint(base, tmp_path):
    whole, report = train(base, NEW, REPLAY, SETTINGS, ONE, Night(anchor=ANCHOR, heldout=HELDOUT))
    path = tmp_path / "checkpoint.safetensors"
    asked = {"new": NEW, "replay": REPLAY, "heldout": HELDOUT}
    asked = {key: [(row.ids, row.supervised) for row in part] for key, part in asked.items()}
    asked |= {"anchor": ANCHOR, "path": str(path), "base": str(base.path), "settings": asdict(SETTINGS)}
    first = 1
    for at in (2, 7, 11):
        done = subprocess.run(
            [sys.executable, "-c", KILLED], input=json.dumps(asked | {"at": at}), capture_output=True, text=True, timeout=120,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [int(line) for line in done.stdout.split()] == list(range(first, at + 1))
        first = at  # the checkpoint of step at - 1 was written before step at
    resumed, again = train(base, NEW, REPLAY, SETTINGS, ONE, night(path))
    assert again.resumed_at == 10 and again.steps == report.steps
    assert same(resumed, whole)


def test_a_run_that_is_told_to_stop_saves_first_and_one_that_has_ended_stays_ended(base, tmp_path):
    settings = replace(SETTINGS, patience=1, eval_every=1, learning_rate=0.0)  # nothing gets better after the first step
    path, told = tmp_path / "checkpoint.safetensors", iter([False, True])
    with pytest.raises(NotNow, match="told to stop after 1 of 12 steps"):
        train(base, NEW, REPLAY, settings, ONE, night(path, stop=lambda: next(told)))
    for resumed_at in (1, 2):
        _, report = train(base, NEW, REPLAY, settings, ONE, night(path))
        assert (report.resumed_at, report.steps, report.stopped_early) == (resumed_at, 2, True)


def test_a_row_that_came_after_the_best_of_held_out_rows_was_not_learned(base):
    settings = replace(SETTINGS, patience=1, eval_every=1, learning_rate=0.0, batch_rows=7)
    _, report = train(base, NEW, REPLAY, settings, ONE, Night(anchor=ANCHOR, heldout=HELDOUT))
    assert report.steps == 2 and len(report.unmet) == len(NEW) - 7, "the adapter is that of the first step"


def test_a_run_that_time_has_ended_goes_on_where_it_is_given_more(base, tmp_path):
    path, few, done = tmp_path / "checkpoint.safetensors", replace(ONE, minutes=0.02), []
    for _ in range(2):  # the second has spent as much as it has when it begins
        _, report = train(base, NEW, REPLAY, SETTINGS, few, night(path), lambda *_: time.sleep(0.5))
        assert report.stopped_early and 0 < report.steps < 12
        done.append(report.steps)
    assert done[0] == done[1]
    whole, _ = train(base, NEW, REPLAY, SETTINGS, ONE, Night(anchor=ANCHOR, heldout=HELDOUT))
    resumed, report = train(base, NEW, REPLAY, SETTINGS, ONE, night(path))
    assert (report.resumed_at, report.steps, report.stopped_early) == (done[0], 12, False) and same(resumed, whole)


def test_a_checkpoint_of_another_night_is_not_gone_on_from(base, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    interrupted(base, path, 4)
    alone, _ = train(base, NEW, [], SETTINGS, ONE, Night(anchor=ANCHOR))
    other, report = train(base, NEW, [], SETTINGS, ONE, replace(night(path), heldout=()))
    assert report.resumed_at == 0 and same(other, alone)


def test_whatever_decides_a_run_makes_its_checkpoint_another_ones(base, tmp_path):
    path, settings = tmp_path / "checkpoint.safetensors", replace(SETTINGS, patience=9, eval_every=9)
    interrupted(base, path, 4, settings)
    unsure = [replace(row, likely=[[(token, 0.5), (token + 1, 0.5)] for token in row.answer]) for row in REPLAY]
    began = []
    for replay, changed in ((REPLAY, {}), (unsure, {}), (REPLAY, {"anchor": ANCHOR[::-1]}), (REPLAY, {"heldout": NEW[:2]})):
        told = iter([True])
        with pytest.raises(NotNow, match=r"after \d of 12") as caught:
            train(base, NEW, replay, settings, ONE, replace(night(tmp_path / "none", stop=lambda told=told: next(told)),
                  **changed, checkpoint=shutil.copy(path, tmp_path / "copy")))  # fmt: skip
        began.append(int(str(caught.value).split("after ")[1].split(" of")[0]))
    assert began == [3, 0, 0, 0]


@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_a_run_resumed_where_rows_are_dealt_again_computes_the_same_states_together(base, tmp_path, monkeypatch, depth):
    """A product of other rows may differ in its last bits, and whether it does depends on the machine: so does a run."""
    settings, replay = replace(SETTINGS, epochs=4, depth=depth, anchor_weight=0.0), rows(60, 4)
    long = TrainRow(random_tokens(200, 5), [False] * 197 + [True] * 3)  # a part then holds the rows of several other steps
    together: dict[str, list[list[bytes]]] = {"whole": [], "broken": []}
    compute = Latents._compute

    def run(name: str, told: Callable[[], bool]) -> Adapter:
        def noted(latents: Latents, parts: Sequence[dict[bytes, Sequence[int]]]) -> dict[bytes, torch.Tensor]:
            together[name] += map(list, parts)
            return compute(latents, parts)

        monkeypatch.setattr(Latents, "_compute", noted)
        with LatentStore(tmp_path / f"{name}.db", "base") as store:
            path = tmp_path / f"{name}.safetensors"
            return train(base, [*NEW[1:], long], replay, settings, ONE, replace(night(path), store=store, stop=told))[0]

    asked = iter(range(100))
    with pytest.raises(NotNow, match="told to stop after 10 of 16"):  # between two looks ahead
        run("broken", lambda: next(asked) == 10)
    assert same(run("broken", bool), run("whole", bool))
    assert together["whole"] == together["broken"] and len(together["whole"]) >= 4


@pytest.mark.parametrize("damage", ["base", "version", "truncated", "empty", "not one", "facts", "key", "bits"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(base, tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    interrupted(base, path, 4)
    data = path.read_bytes()
    contents = {
        "base": data.replace(b'base_sha256\\": \\"base', b'base_sha256\\": \\"easb'),
        "version": data.replace(b'version\\": 2', b'version\\": 1'),
        "key": data.replace(b'run\\": ', b'ruin\\":'),
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "not one": b"hello, this is no checkpoint",
        "facts": save({"flat": torch.zeros(3)}, {"facts": "{"}),
        "bits": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    }
    path.write_bytes(contents[damage])
    with pytest.raises(CheckpointError) as caught:
        train(base, NEW, REPLAY, SETTINGS, ONE, night(path))
    message = str(caught.value)
    assert str(path) in message and "move it away" in message and "\n" not in message
    assert path.read_bytes() == contents[damage]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    assert read_checkpoint(path, FACTS) is None
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}
    write_checkpoint(path, FACTS, tensors, {"steps": 3, "losses": [1.5]})
    found = read_checkpoint(path, FACTS)
    assert found is not None
    assert found[1] == {"steps": 3, "losses": [1.5]} and all(torch.equal(found[0][name], tensors[name]) for name in tensors)
    assert read_checkpoint(path, replace(FACTS, run="another")) is None
    assert b"pickle" not in path.read_bytes() and path.read_bytes()[8:9] == b"{"
