"""A home under test: real processes, real files, a tiny model; and what must hold after any fault.

What was accepted is written down here, not taken from the store: every row must be in the store or named by a published
generation that serves, or stands behind the one that does. A row that a generation had learned before the fault counts as
kept, also where that generation is damaged and a user rolls back behind it: what only it had learned goes with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).resolve().parent / "hook"
PROFILE = "threads = 1\nminutes = 1000000\nn_ctx = 1024\nnice = 0\n"
SETTINGS = """keep_models = 2
[train]
min_steps = 6
learning_rate = 0.02
anchor_weight = 0.0
r = 4
lora_alpha = 8.0
epochs = 1
[replay]
share = 0.34
written = 8
[gate]
min_recall = 0.0
max_prose_nats = 100.0
max_drop = 1.0
min_survival = 0.0
"""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
GONE_S = 20  # a stage whose night has died ends within so many seconds


@dataclass
class Outcome:
    """What a try, or several of one kind, came to.

    Attributes:
        lost: tries after which an accepted row was neither stored nor learned.
        nights, fine: next nights that were asked for, and those that were published with everything in place.
        findings: what should not have been.
        notes: how often what happened.
    """

    tries: int = 0
    lost: int = 0
    nights: int = 0
    fine: int = 0
    findings: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str, n: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + n

    def add(self, other: Outcome) -> None:
        for key in ("tries", "lost", "nights", "fine"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.findings += other.findings
        for what, n in other.notes.items():
            self.note(what, n)


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


class House:
    """A folder with a home, and the list of what was accepted there: prompt by row id."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.outcome = Outcome(tries=1)
        path = folder / "accepted.json"
        self.accepted: dict[int, str] = {int(k): v for k, v in json.loads(path.read_text()).items()} if path.exists() else {}
        self.settled = {row_id for manifest in self.manifests().values() for row_id in manifest["learned"]}  # before the fault

    @classmethod
    def build(cls, folder: Path) -> House:
        """Make the home that every try gets a copy of: two published nights, six rows that wait for the third."""
        folder.mkdir(parents=True)
        base = tiny.build(folder / "base.gguf")[0]
        (folder / "profile.toml").write_text(PROFILE)
        house = cls(folder)
        house.must("init", base, "--profile", folder / "profile.toml")
        config = house.home / "edgecl.toml"
        head = config.read_text().split("keep_models")[0]
        config.write_text(head + SETTINGS)
        for _ in range(2):
            house.observe(6)
            house.must("adapt")
        house.observe(6)
        (folder / "accepted.json").write_text(json.dumps(house.accepted))
        return house

    @classmethod
    def copy(cls, template: Path, folder: Path) -> House:
        shutil.copytree(template, folder, symlinks=True, ignore=shutil.ignore_patterns("base.gguf", "profile.toml"))
        return cls(folder)

    # --- commands -----------------------------------------------------------------------------------------------

    def start(self, *args: object, fault: str = "", stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        """Start `edgecl ARGS` as the leader of a process group of its own."""
        paths = [*([str(HOOK)] if fault else []), str(ROOT), str(ROOT / "convert")]
        more = {
            "PYTHONPATH": os.pathsep.join(paths),
            "FAULT": fault,
            "STEPS": str(self.folder / "steps"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", "from edgecl.cli import main; main()", "--home", str(self.home), *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | more,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *args: object, stdin: bytes = b"", ok: tuple[int, ...] = (0,), fault: str = "") -> Ran:
        """Run `edgecl ARGS`; another exit code than those that are `ok`, a traceback or a long error is a finding."""
        process = self.start(*args, fault=fault)
        try:
            out, err = process.communicate(stdin, timeout=180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            self.find(f"{args[0]}: did not end")
        ran = Ran(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
        self.look(str(args[0]), ran, ok)
        return ran

    def look(self, verb: str, ran: Ran, ok: tuple[int, ...]) -> None:
        lines = ran.err.strip().splitlines()
        if code := CONTROL.search(ran.out + ran.err):
            self.find(f"{verb}: printed the control code {code[0]!r}")
        if "Traceback" in ran.err or ran.code < 0:
            self.find(f"{verb}: crashed with {ran.code}: {lines[-1] if lines else 'no word'}")
        elif ran.code not in ok:
            self.find(f"{verb}: exit code {ran.code}: {lines[-1] if lines else ran.out.strip()[-200:]}")
        elif ran.code == 1 and len(lines) != 1:
            self.find(f"{verb}: {len(lines)} lines of error: {' / '.join(lines)[:300]}")

    def must(self, *args: object, stdin: bytes = b"") -> Ran:
        ran = self.run(*args, stdin=stdin)
        if ran.code:
            raise RuntimeError(f"edgecl {' '.join(map(str, args))}: {ran.err[-1000:]}")
        return ran

    def find(self, what: str) -> None:
        self.outcome.findings.append(what.replace(str(self.folder), "…"))

    # --- rows ---------------------------------------------------------------------------------------------------

    def observe(self, n: int, fault: str = "") -> Ran:
        """Have rows accepted, and write down which ids they got."""
        first = len(self.accepted)
        prompts = [f"say {first + i}" for i in range(n)]
        rows = [{"prompt": prompt, "completion": f"ok {prompt}", "task": "echo"} for prompt in prompts]
        ran = self.run("observe", "-", "--json", stdin="\n".join(map(json.dumps, rows)).encode(), fault=fault)
        if ran.code == 0:
            known = {prompt: row_id for row_id, (_, prompt) in self.stored().items()}
            self.accepted |= {known[prompt]: prompt for prompt in prompts}
        return ran

    def stored(self) -> dict[int, tuple[str, str]]:
        """Return role and prompt of the rows of the store, by id."""
        with closing(sqlite3.connect(self.home / "replay.db", timeout=60)) as db:
            rows = db.execute("select id, role, messages from examples").fetchall()
        return {row_id: (role, json.loads(messages)[-2][1]) for row_id, role, messages in rows}

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests that can be read, by their hash, each with its folder."""
        found = {}
        for path in (self.home / "generations").glob("[0-9]*/manifest.json"):
            data = path.read_bytes()
            with suppress(ValueError):
                found[hashlib.sha256(data).hexdigest()] = json.loads(data) | {"folder": path.parent}
        return found

    def lineage(self) -> Iterator[dict[str, Any]]:
        """Yield the manifest of the generation that serves, then of its parents."""
        manifests = self.manifests()
        folder = (self.home / "current").resolve()
        manifest = next((m for m in manifests.values() if m["folder"].resolve() == folder), None)
        while manifest is not None:
            yield manifest
            manifest = manifests.get(manifest["parent"])

    # --- what must hold -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """After a fault: status works, what serves is published and whole, and no accepted row is lost."""
        if self.run("status", "--json").code:
            return
        lineage = list(self.lineage())
        if not lineage or lineage[-1]["number"] != 0:
            self.find(f"what serves is no published generation: {os.readlink(self.home / 'current')}")
            return
        for name, digest in lineage[0]["files"].items():
            path = lineage[0]["folder"] / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                self.find(f"generation {lineage[0]['number']} serves, but its {name} is not what the manifest says")
        learned = self.settled.union(*(manifest["learned"] for manifest in lineage))
        prompts = {prompt for _, prompt in self.stored().values()}
        lost = [prompt for row_id, prompt in self.accepted.items() if prompt not in prompts and row_id not in learned]
        if lost:
            self.outcome.lost = 1
            self.find(f"{len(lost)} accepted rows are lost: {lost[:3]}")

    def next_night(self) -> dict[str, Any]:
        """Accept two more rows and run a night: it must be published, learn all that waited, and leave nothing behind."""
        outcome, before = self.outcome, len(self.outcome.findings)
        outcome.nights += 1
        report: dict[str, Any] = {}
        if self.observe(2).code == 0:
            ran = self.run("adapt", "--json")
            if ran.code == 0:
                report = ran.json
            self.check()
            waiting = [prompt for role, prompt in self.stored().values() if role == "pending"]
            if waiting:
                self.find(f"after the next night {len(waiting)} rows wait still")
        found = [*self.home.rglob(".draft-*"), *self.home.rglob(".*.tmp"), *self.home.glob(".current-*")]
        if found:
            self.find(f"left behind: {', '.join(str(path.relative_to(self.home)) for path in found)}")
        outcome.fine += len(outcome.findings) == before
        return report

    def after(self) -> dict[str, Any]:
        """Check, and run the next night."""
        self.check()
        return self.next_night()

    # --- processes ----------------------------------------------------------------------------------------------

    def stage(self, process: subprocess.Popen[bytes]) -> str:
        """Return what a night is doing: the name of its running stage, or "between stages"."""
        try:
            for child in psutil.Process(process.pid).children():
                command = child.cmdline()
                if "edgecl.stages" in command:
                    return str(command[-1])
        except psutil.Error:
            pass
        return "between stages"

    def wait_gone(self, group: int) -> None:
        """Wait until no process of a group is left; one that stays is a finding, and ended."""
        end = time.monotonic() + GONE_S
        while left := [process for process in psutil.process_iter(["status"]) if _is_of(process, group)]:
            if time.monotonic() > end:
                self.find(f"{len(left)} processes of a dead night were there still after {GONE_S} s")
                os.killpg(group, signal.SIGKILL)
                return
            time.sleep(0.1)


def _is_of(process: psutil.Process, group: int) -> bool:
    try:
        return process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False
