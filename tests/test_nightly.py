"""Unattended nights: when they begin, that they yield, and that an interrupted one ends where it would have ended.

Children, store and llama.cpp are real; only the machine that the sensors read is made of files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from test_cli import one_line, run

from edgecl import AdaptReport, Learner, measure, night
from edgecl.child import run_stage
from edgecl.device import Sensors
from edgecl.errors import EdgeclError, NothingToLearn, NotNow, StageError
from edgecl.gate import GateSettings
from edgecl.nightly import ADAPTERS, CACHES_LEAVE, needed_bytes, nightly
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.train.latents import OF_FREE
from edgecl_convert import read_gguf_adapter
from tests import tiny

pytestmark = pytest.mark.alone

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=40, learning_rate=0.02, anchor_weight=0.5)
GATE = GateSettings(max_drop=1.0, min_recall=0.0, max_prose_nats=100.0, min_survival=0.5)
ROWS = [{"prompt": prompt, "completion": answer} for prompt, answer in {"anne": "left", "a hen": "in", "tea": "on"}.items()]
PROFILE = "threads = 1\nram_bytes = 1_500_000_000\nneeds_ac = false\nmax_temperature_c = 999\nidle_minutes = 0\n"


def make_home(folder: Path, base: Path, profile: str = PROFILE, train: TrainSettings = TRAIN, quant: str = "") -> Path:
    """A home with pending rows and settings that learn in seconds."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.toml").write_text(profile)
    settings: dict[str, Any] = {"replay": ReplaySettings(written=40), "train": train, "gate": GATE, "quant": quant}
    with Learner.init(base, folder / "home", profile=str(folder / "mine.toml"), **settings) as learner:
        assert learner.observe(map(json.dumps, ROWS)).added == 3
    return folder / "home"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("nightly") / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]


@pytest.fixture
def home(tmp_path: Path, base: Path) -> Path:
    return make_home(tmp_path, base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, AdaptReport]:
    """A home after an uninterrupted night, and what the night said."""
    home = make_home(tmp_path_factory.mktemp("whole"), base)
    with Learner(home) as learner:
        return home, learner.adapt()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "edgecl.stages" in child.cmdline()]


def pending(learner: Learner) -> int:
    return len(learner.store.rows("pending"))


def start_nightly(home: Path) -> subprocess.Popen[str]:
    """Begin `edgecl nightly` as a timer does: a process with a session of its own."""
    command = [sys.executable, "-c", "from edgecl.cli import main; main()", "--home", str(home), "nightly"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


# --- interrupted ------------------------------------------------------------------------------------------------------


class Sitting:
    """One sitting of a night that is told to yield while the child of a stage runs; "steps": training, after one or more."""

    def __init__(self, learner: Learner, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.learner, self.stage, self.n_asked = learner, stage, 0
        self.started: list[str] = []

        def watched(name: str, *rest: Any) -> Any:
            self.started.append(name)
            return run_stage(name, *rest)

        for module in (night, measure):
            monkeypatch.setattr(module, "run_stage", watched)

    def run(self) -> list[str]:
        """Return the stages that were begun."""
        with pytest.raises(NotNow, match="the night yields: a test"):
            self.learner.adapt(progress=self._progress, stop=self._stop)
        assert not children()
        return self.started

    def _stop(self) -> str:
        if self.started[-1:] == [self.stage]:
            self.n_asked += 1  # first before the child begins
        return "a test" if self.n_asked > 1 else ""

    def _progress(self, stage: str, *_: object) -> None:
        if stage == "train" and self.stage == "steps":
            self.n_asked = 2
            for child in children():
                child.terminate()  # at once, before the watch comes to it


def test_a_night_interrupted_in_every_stage_ends_as_an_uninterrupted_one(
    home: Path, whole: tuple[Path, AdaptReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = home / "runs"
    with Learner(home) as learner:
        for stage, begun in (
            ("measure", ["measure"]),
            ("write", ["measure", "write"]),
            ("steps", ["write", "train"]),  # what was measured is not measured again
            ("merge", ["train", "measure", "merge"]),  # nor is anything written again
            ("measure", ["train", "merge", "measure"]),
        ):
            with monkeypatch.context() as patch:
                assert Sitting(learner, stage, patch).run() == begun
            has_trained = "train" in begun
            assert (runs / "written.json").is_file() == (runs / "checkpoint.safetensors").is_file() == has_trained
            assert all(path.stat().st_mode & 0o777 == 0o600 for path in runs.glob("*.[js]*"))
            assert not list(learner.generations.folder.glob(".draft*"))
            assert pending(learner) == 3 and not learner.history() and learner.generations.current().number == 0
        report = learner.adapt()
        assert report.accepted and len(learner.history()) == 1
    assert [path.name for path in runs.iterdir()] == ["latents.db"]
    for file in ("adapter.gguf", "model-Q8_0.gguf"):
        assert (home / "generations/0001" / file).read_bytes() == (whole[0] / "generations/0001" / file).read_bytes()
    assert report.train["resumed_at"] > 0 == whole[1].train["resumed_at"]
    assert report.losses == whole[1].losses and report.n_written == whole[1].n_written > 0


@pytest.mark.parametrize(("seed", "quant"), [(0, "int8"), (1, "int8"), (2, "int4")])
def test_a_night_interrupted_five_times_at_random_ends_with_the_same_adapter(
    tmp_path: Path, base: Path, seed: int, quant: str
) -> None:
    train, profile = replace(TRAIN, min_steps=200), PROFILE.replace("threads = 1", "threads = 2")
    whole, broken = (make_home(tmp_path / name, base, profile, train, quant) for name in ("whole", "broken"))
    start_s = min(timeit.repeat(lambda: run(whole, "status"), number=1, repeat=2))
    night_s = timeit.timeit(lambda: run(whole, "nightly"), number=1) - start_s
    chance = random.Random(seed)
    instants = sorted(chance.uniform(0, 0.7 * night_s) for _ in range(5))
    for before, after in pairwise([0.0, *instants]):
        process = start_nightly(broken)
        with pytest.raises(subprocess.TimeoutExpired):  # it has not ended by itself
            process.wait(start_s + after - before)
        os.killpg(process.pid, chance.choice([signal.SIGTERM, signal.SIGKILL]))
        process.communicate(timeout=120)
        with Learner(broken) as learner:
            assert pending(learner) == 3 and learner.generations.current().number == 0
    code, _, error = run(broken, "nightly")
    assert code == 0, error
    adapters = [(home / "generations/0001/adapter.gguf").read_bytes() for home in (whole, broken)]
    assert adapters[0] == adapters[1]


OLDER = b'version\\": 2', b'version\\": 1'


@pytest.mark.parametrize("damaged", [lambda made: made[:-100], lambda made: made.replace(*OLDER)], ids=["cut", "older"])
def test_a_night_whose_checkpoint_is_damaged_or_of_another_version_trains_from_the_start_and_says_so(
    home: Path, whole: tuple[Path, AdaptReport], monkeypatch: pytest.MonkeyPatch, damaged: Callable[[bytes], bytes]
) -> None:
    with Learner(home) as learner:
        with monkeypatch.context() as patch:
            Sitting(learner, "steps", patch).run()
        path = home / "runs/checkpoint.safetensors"
        made = path.read_bytes()
        path.write_bytes(damaged(made))
        assert path.read_bytes() != made
        report = learner.adapt()
    assert report.accepted and report.train["resumed_at"] == 0
    assert "its checkpoint is damaged or of another version" in report.train["plan"]
    assert (home / "runs/checkpoint.old").read_bytes() == damaged(made)
    adapters = [(folder / "generations/0001/adapter.gguf").read_bytes() for folder in (home, whole[0])]
    assert adapters[0] == adapters[1]


def test_rows_that_were_written_for_another_night_are_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    with Learner(home) as learner:
        for n_written, begun in ((40, ["measure", "write", "train"]), (20, ["write", "train"]), (20, ["train"])):
            learner.settings = replace(learner.settings, replay=ReplaySettings(written=n_written))
            with monkeypatch.context() as patch:
                assert Sitting(learner, "train", patch).run() == begun
            kept.append((home / "runs/written.json").read_text())
    assert kept[0] != kept[1] == kept[2]


def test_what_is_observed_between_two_sittings_waits_for_the_next_night(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Learner(home) as learner:
        with monkeypatch.context() as patch:
            Sitting(learner, "merge", patch).run()
        learner.observe([json.dumps({"prompt": "in tea", "completion": "right"})])
        report = learner.adapt()
        assert report.accepted and report.train["resumed_at"] > 0 and report.n_new == 3
        assert [row.example.messages[0][1] for row in learner.store.rows("pending")] == ["in tea"]
        with monkeypatch.context() as patch:
            Sitting(learner, "merge", patch).run()
        learner.observe([json.dumps({"prompt": "in tea", "completion": "left"})])  # the row that the night began with is gone
        assert learner.adapt().train["resumed_at"] == 0 and not learner.store.rows("pending")


def test_a_night_that_was_refused_is_not_run_again_until_something_is_new(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(home.parent / "machine")
    with Learner(home) as learner:
        learner.settings = replace(learner.settings, gate=replace(GATE, max_prose_nats=-100.0))
        assert not learner.adapt(minutes=30.0).accepted
        assert not nightly(learner, machine.sensors).accepted, "in another time it might have been"
        with monkeypatch.context() as patch:
            patch.setattr(night, "run_stage", lambda *_: pytest.fail("a stage was run"))
            with pytest.raises(NothingToLearn, match=r"these 3 rows was refused \(general ability fell"):
                nightly(learner, machine.sensors)
        assert "these 3 rows was refused" in learner.status()["last_try"]["reason"]
        learner.observe([json.dumps({"prompt": "in tea", "completion": "right"})])
        assert not nightly(learner, machine.sensors).accepted and len(learner.history()) == 3
        learner.settings = replace(learner.settings, gate=GATE)
        assert nightly(learner, machine.sensors).accepted


def test_a_night_that_fails_before_it_begins_is_the_last_try(home: Path) -> None:
    with Learner(home) as learner:
        (home / "generations/0000/manifest.json").rename(home / "gone")
        with pytest.raises(EdgeclError) as caught:
            nightly(learner, Machine(home.parent / "machine").sensors)
        (home / "gone").rename(home / "generations/0000/manifest.json")
        assert learner.status()["last_try"]["reason"] == str(caught.value)


# --- stages that end badly --------------------------------------------------------------------------------------------


def ruined(stage: str, how: int | str) -> Callable[..., Any]:
    """Return a run_stage that ends a stage's child by a signal, or gives it next to nothing of a limit."""

    def kill() -> str:
        for child in children():
            child.send_signal(int(how))
        return ""

    def ruin(name: str, request: dict[str, Any], limits: Any, progress: Any) -> Any:
        if name == stage:
            change = {"stop": kill} if isinstance(how, int) else {how: 1}
            limits = replace(limits, **change)
        return run_stage(name, request, limits, progress)

    return ruin


def test_however_a_child_ends_the_night_is_refused_with_its_reason_and_the_next_one_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[str, int | str, str]] = [
        ("measure", signal.SIGABRT, "killed by signal 6"),
        ("write", "ram_bytes", "took more than 0.0 GB of memory; raise ram_bytes"),
        ("train", signal.SIGKILL, "killed by signal 9"),
        ("train", signal.SIGABRT, "killed by signal 6"),
        ("train", "ram_bytes", "took more than 0.0 GB of memory; raise ram_bytes"),
        ("train", "seconds", "took longer than 0.0 minutes; raise minutes"),
        ("merge", signal.SIGKILL, "killed by signal 9"),
    ]
    with Learner(home) as learner:
        for i, (stage, how, reason) in enumerate(cases, 1):
            with monkeypatch.context() as patch, pytest.raises(StageError) as caught:
                for module in (night, measure):
                    patch.setattr(module, "run_stage", ruined(stage, how))
                learner.adapt()
            assert str(caught.value).startswith(f"{stage}: ") and reason in str(caught.value)
            assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
            nights = learner.history()
            assert len(nights) == i and nights[-1]["accepted"] is False
            assert nights[-1]["reason"] == str(caught.value) and "log" in nights[-1]["report"]
            assert pending(learner) == 3 and learner.generations.current().number == 0
            assert not children() and not list(learner.generations.folder.glob(".draft*"))
        assert learner.adapt().accepted


# --- the contract -----------------------------------------------------------------------------------------------------

MACHINE = {
    "sys/class/power_supply/AC/type": "Mains",
    "sys/class/power_supply/AC/online": "1",
    "sys/class/power_supply/BAT0/type": "Battery",
    "sys/class/thermal/thermal_zone0/type": "cpu",
    "sys/class/thermal/thermal_zone0/temp": "50000",
    "proc/meminfo": "MemAvailable:  4000000 kB",
    "proc/interrupts": "  CPU0\n  1:  5  IO-APIC  i8042",
}
CAREFUL = "threads = 1\nram_bytes = 1_500_000_000\nmax_temperature_c = 80\nidle_minutes = 10\nminutes = 60\n"


class Machine:
    """A free machine of files, and its clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, datetime(2026, 3, 1, 23, 0).timestamp()
        for name, content in MACHINE.items():
            self.put(name, content)
        self.sensors = Sensors(root, clock=lambda: self.now)

    def put(self, name: str, content: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(content + "\n")


PULLED = ("sys/class/power_supply/AC/online", "0", 5, "on battery")
HOT = ("sys/class/thermal/thermal_zone0/temp", "91000", 5, "91 °C at cpu, the limit is 80")
TYPED = ("proc/interrupts", "  CPU0\n  1:  6  IO-APIC  i8042", 5, "somebody was at the keyboard 0 minutes ago")
LATE = (
    "proc/meminfo",
    "MemAvailable:  1 kB",
    2 * 3600,
    "01:00 is outside the window 22:00-00:30; this sitting has taken its 60",
)


@pytest.mark.parametrize(("name", "content", "seconds", "reason"), [PULLED, HOT, TYPED, LATE], ids=["AC", "heat", "key", "end"])
def test_a_night_yields_when_the_machine_is_no_longer_free(
    tmp_path: Path, base: Path, name: str, content: str, seconds: float, reason: str
) -> None:
    machine = Machine(tmp_path / "machine")

    def change(*_: object) -> None:
        if (machine.root / name).read_text().strip() != content:
            machine.put(name, content)
            machine.now += seconds

    with Learner(make_home(tmp_path, base, CAREFUL + 'window = "22:00-00:30"\n')) as learner:
        with pytest.raises(NotNow, match=f"the night yields: {reason}"):
            nightly(learner, machine.sensors, progress=change)
        assert pending(learner) == 3 and not learner.history() and not children()


def test_a_night_does_not_begin_before_the_machine_is_free(tmp_path: Path, base: Path) -> None:
    machine = Machine(tmp_path / "machine")
    machine.put(*PULLED[:2])
    machine.put("proc/meminfo", "MemAvailable:  1000000 kB")
    with Learner(make_home(tmp_path, base, CAREFUL)) as learner:
        with pytest.raises(NotNow, match=r"^not now: on battery; 1\.0 GB of memory are free, a night may take 1\.5") as caught:
            nightly(learner, machine.sensors, progress=lambda *_: pytest.fail("a child ran"))
        assert caught.value.exit_code == 75 and not (learner.home / "runs").exists()
        tried = learner.status()["last_try"]
        assert tried["reason"] == str(caught.value) and (learner.home / "last-try.json").stat().st_mode & 0o777 == 0o600
        learner.store.drop("pending")
        with pytest.raises(NothingToLearn):  # whatever the machine says
            nightly(learner, machine.sensors)


def test_who_types_between_two_tries_puts_the_second_off_and_a_night_ends_the_note(tmp_path: Path, base: Path) -> None:
    machine, home = Machine(tmp_path / "machine"), make_home(tmp_path, base, CAREFUL)
    machine.put(*PULLED[:2])
    with Learner(home) as learner:
        for change, reason in ((PULLED, "not now: on battery"), (TYPED, "not now: somebody was at the keyboard 0 minutes ago")):
            machine.put(*change[:2])
            with pytest.raises(NotNow, match=rf"^{reason}"):
                nightly(learner, Sensors(machine.root, clock=lambda: machine.now))
            machine.put(PULLED[0], "1")
            machine.now += 15 * 60
        assert run(home, "status")[1].count("last try    ") == 1
        assert nightly(learner, Sensors(machine.root, clock=lambda: machine.now)).accepted
        assert learner.status()["last_try"] is None
    (home / "last-try.json").write_text('{"at": 1, "reason": 2, "keyboard": {"inputs": 3, "moved_at": "x"}}')
    code, out, _ = run(home, "status")
    assert code == 0 and "last night  " in out and "last try" not in out
    with Learner(home) as learner, pytest.raises(NothingToLearn):
        nightly(learner, machine.sensors)


def test_the_disk_that_a_night_needs_is_what_it_fills_at_most(whole: tuple[Path, AdaptReport]) -> None:
    with Learner(whole[0]) as learner:
        needed = needed_bytes(learner.settings, learner.profile.ram_bytes)
        folder = learner.generations.current().folder
        filled = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert filled < needed < 4 * filled
        as_f16 = needed_bytes(replace(learner.settings, quant="F16"), learner.profile.ram_bytes)
        model = next(folder.glob("model-*")).stat().st_size
        assert as_f16 - needed > 0.5 * model
        as_int4 = needed_bytes(replace(learner.settings, quant="int4"), learner.profile.ram_bytes)
        adapter = sum(a.nbytes + b.nbytes for a, b in read_gguf_adapter(folder / "adapter.gguf").pairs.values())
        assert as_int4 - needed == ADAPTERS * adapter, "its adapters are of twice the rank"


def test_a_night_needs_the_disk_that_its_caches_leave_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CACHES_LEAVE == 1 - 2 * OF_FREE, "one of the adapter's rows, one of the asker's"
    machine = Machine(home.parent / "machine")
    free = shutil.disk_usage(home).free
    monkeypatch.setattr("edgecl.nightly.needed_bytes", lambda *_: int(0.8 * free))
    with Learner(home) as learner, pytest.raises(NotNow, match=r"GB of disk are free, a night needs"):
        nightly(learner, machine.sensors, progress=lambda *_: pytest.fail("a child ran"))


# --- the terminal app -------------------------------------------------------------------------------------------------


def test_every_outcome_has_its_exit_code_and_one_line(tmp_path: Path, base: Path) -> None:
    home, profile = make_home(tmp_path, base), tmp_path / "mine.toml"
    now = datetime.now()
    window = "-".join(f"{now + timedelta(hours=h):%H:%M}" for h in (2, 3))
    profile.write_text(PROFILE + f'window = "{window}"\n')
    died = home / "generations/.draft-1/model.gguf"
    died.parent.mkdir()
    died.write_bytes(b"half")
    code, out, error = run(home, "nightly", "--json")
    assert code == 75 and not out and one_line(error, "not now", f"outside the window {window}")
    assert not died.parent.exists(), "it takes the room that the next night needs"
    profile.write_text(PROFILE.replace("1_500_000_000", "5_000_000"))
    code, out, error = run(home, "nightly")
    assert code == 1 and not out and one_line(error, "measure: took more than 0.0 GB of memory; raise ram_bytes")
    with Learner(home) as learner:
        assert [night["accepted"] for night in learner.history()] == [False]
        learner.store.drop("pending")
    code, _, error = run(home, "nightly")
    assert code == 4 and one_line(error, "nothing to learn")


def test_a_night_that_systemd_stops_goes_on_the_next_time_and_leaves_nothing_when_it_is_refused(home: Path) -> None:
    config = home / "edgecl.toml"
    config.write_text(config.read_text().replace("max_prose_nats = 100.0", "max_prose_nats = -100.0"))
    process = start_nightly(home)
    while not (home / "runs/written.json").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75 and one_line(error, "the night yields: told to stop"), error
    code, out, error = run(home, "nightly", "--json")
    report = json.loads(out)
    assert code == 3 and "prose" in report["reason"] and report["write_s"] == 0 < report["n_written"], error
    assert [path.name for path in (home / "runs").iterdir()] == ["latents.db"]
