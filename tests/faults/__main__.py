"""The faults suite: `make faults`, or `python -m tests.faults [KIND ...]`; about 40 minutes on two cores.

Every try gets its own copy of a home with two published nights and six rows that wait; a fault; and then must be true: `status`
works or says in one line what the user is to decide, what serves is a published generation with the hashes of its manifest, no
accepted row is lost, and the next night is published. Seeds are fixed. The results of a kind are written to OUT/KIND.json when
it is done, so that kinds can be run one by one; the table is of all kinds that were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from . import damage, disk, kills, together
from .house import ROOT, House, Outcome

N_KILLS, N_SIGNALS = 200, 15  # instants
N_FILES = 8  # damages of one file that are followed by a whole night
N_GGUF, N_OTHER, PART = 2000, 300, 50  # mutations, and how many of them a process forks

Try = Callable[[House, int], None]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        n: tries, or chains of them.
        run: one of them by its number, in a folder of its own.
    """

    title: str
    n: int
    run: Callable[[int, Path], Outcome]


class Ground:
    """The homes that tries are copies of, and an undisturbed night to look at: made when first asked for, left in `work`."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @cached_property
    def template(self) -> Path:
        folder = self.work / "template"
        return folder if (folder / "accepted.json").exists() else House.build(folder).folder

    @cached_property
    def unfinished(self) -> Path:
        return damage.interrupted(self.template, self._fresh("unfinished"))

    def n_steps(self, *command: str) -> int:
        return len(kills.steps_of(self.template, self._fresh("steps"), *command))

    @cached_property
    def night_s(self) -> float:
        """How long a night takes beside another."""
        with ThreadPoolExecutor(2) as both:
            return max(both.map(partial(kills.night_seconds, self.template), (self._fresh("one"), self._fresh("two"))))

    def _fresh(self, name: str) -> Path:
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name

    # --- ways to run a try ---------------------------------------------------------------------------------------

    def copy(self, title: str, n: int, run: Try) -> Kind:
        """Tries that each get a copy of the home."""
        return Kind(title, n, partial(_in_copy, self.template, run))

    def steps(self, what: str, run: Try, *command: str) -> Kind:
        """A try for each step that makes something durable of a command, which is killed before it."""
        return self.copy(f"`kill -9` before each durable step of {what}", self.n_steps(*command), run)

    def signals(self, title: str, n: int, chain: int, who: str, how: int) -> Kind:
        """Nights that get a signal at `n` instants, so many in a row, and then one that is left alone."""
        return self.copy(title, n // chain, lambda house, i: kills.signalled(house, i, n, chain, self.night_s, who, how))

    def bulk(self, title: str, what: str, n: int) -> Kind:
        """Mutations of a file, each opened in a forked process."""
        home = self.unfinished if what == "checkpoint" else self.template
        return Kind(title, -(-n // PART), partial(_in_bulk, home, what, n))


def _in_copy(template: Path, run: Try, i: int, folder: Path) -> Outcome:
    house = House.copy(template, folder)
    run(house, i)
    return house.outcome


def _in_bulk(template: Path, what: str, n: int, i: int, folder: Path) -> Outcome:
    first, last = i * PART, min((i + 1) * PART, n)
    command = [sys.executable, "-m", "tests.faults.mutants", what, str(first), str(last), str(template), str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if ran.returncode:
        return Outcome(tries=last - first, findings=[f"the suite failed: {ran.stderr[-800:]}"])
    return Outcome(**json.loads(ran.stdout.splitlines()[-1]))


KINDS: dict[str, Callable[[Ground], Kind]] = {
    "kill": lambda g: g.signals("`kill -9` of the whole night at random instants, five in a row", N_KILLS, 5, "group", 9),
    "step": lambda g: g.steps("a night", kills.killed_at_step, "adapt", "--json"),
    "rollback": lambda g: g.steps("`rollback`", kills.killed_in_rollback, *kills.ROLLBACK),
    "forget": lambda g: g.steps("`forget`", kills.killed_in_forget, *kills.FORGET),
    "observe": lambda g: g.copy("`kill -9` before each durable step of `observe`", 2, kills.killed_while_observing),
    "alone": lambda g: g.signals("`kill -9` of the night's first process alone, three in a row", N_SIGNALS, 3, "alone", 9),
    "term": lambda g: g.signals("SIGTERM, three in a row", N_SIGNALS, 3, "alone", signal.SIGTERM),
    "full": lambda g: Kind("disk full (tmpfs), of every size", len(disk.FREE_KB), partial(disk.outside, "full", g.template)),
    "readonly": lambda g: Kind("home read-only (mount)", 2, partial(disk.outside, "readonly", g.template)),
    "clock": lambda g: g.copy("clock set back or forward", len(together.CLOCKS), together.clock),
    "together": lambda g: g.copy("two nights and a chat at once", 4, together.at_once),
    "names": lambda g: g.copy("links and paths that lead elsewhere", len(together.NAMES), together.names),
    "codes": lambda g: g.copy("control codes and markup in texts", 4, together.control_codes),
    "store": lambda g: g.copy("replay.db damaged, restored", N_FILES, damage.store),
    "anew": lambda g: g.copy("replay.db damaged, moved away", 2, damage.store_begun_anew),
    "model": lambda g: g.copy("model that serves damaged, written again", N_FILES, damage.serving("model-*.gguf")),
    "adapter": lambda g: g.copy("adapter of what serves damaged, rolled back", N_FILES, damage.serving("adapter.gguf")),
    "earlier": lambda g: g.copy("adapter of an earlier generation damaged", 4, damage.earlier),
    "manifest": lambda g: g.copy("manifest damaged, rolled back or restored", 12, damage.manifest),
    "settings": lambda g: g.copy("edgecl.toml damaged, restored", N_FILES, damage.settings),
    "current": lambda g: g.copy("`current` damaged or gone, rolled back", len(damage.LINKS) + 2, damage.link),
    "checkpoint": lambda g: Kind("checkpoint damaged", N_FILES, partial(_in_copy, g.unfinished, damage.checkpoint)),
    "gguf": lambda g: g.bulk("GGUF mutations, as a model and in place of what serves", "gguf", N_GGUF),
    **{
        f"read-{what}": lambda g, what=what: g.bulk(f"{what} mutations, read", what, N_OTHER)
        for what in ("replay.db", "manifest", "edgecl.toml", "adapter.gguf", "checkpoint")
    },
}


def run_kind(kind: Kind, folder: Path, jobs: int, most: int) -> Outcome:
    """Run every try of a kind; a folder with a finding is left to be looked at."""

    def one(i: int) -> Outcome:
        mine = folder / f"{i:03d}"
        try:
            outcome = kind.run(i, mine)
        except Exception:  # the suite's own fault: said, and the rest is gone on with
            outcome = Outcome(tries=1, findings=[f"the suite failed: {traceback.format_exc()[-800:]}"])
        outcome.findings = [f"{i}: {finding}" for finding in outcome.findings]
        if not outcome.findings:
            shutil.rmtree(mine, ignore_errors=True)
        return outcome

    total, n = Outcome(), min(most, kind.n)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(one, [i * kind.n // n for i in range(n)]):
            total.add(outcome)
            for finding in outcome.findings:
                print(f"  finding {finding}", file=sys.stderr)
    return total


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| fault | tries | nothing lost | next night fine | findings | what happened |", "|---|---|---|---|---|---|"]
    for result in results.values():
        nights = f"{result['fine']} of {result['nights']}" if result["nights"] else ""
        notes = ", ".join(f"{what} {n}" for what, n in sorted(result["notes"].items(), key=lambda pair: -pair[1]))
        lines.append(
            f"| {result['title']} | {result['tries']} | {result['tries'] - result['lost']} | {nights} "
            f"| {len(result['findings'])} | {notes} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("faults-out"))
    parser.add_argument("--work", type=Path, help="keeps the homes that tries are copies of, for another call")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tries", type=int, default=10_000, help="at most so many of each kind, spread evenly")
    arguments = parser.parse_args()
    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}", "OMP_NUM_THREADS": "1"}  # of every process: this checkout
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="edgecl-faults-"))
    work.mkdir(exist_ok=True)
    arguments.out.mkdir(exist_ok=True)
    ground, n_findings = Ground(work), 0
    for name in arguments.kinds or KINDS:
        if name in ("full", "readonly") and not disk.allowed():
            print(f"{name}: left out, mount namespaces are not permitted here", file=sys.stderr)
            continue
        began = time.monotonic()
        kind = KINDS[name](ground)
        outcome = run_kind(kind, work / name, arguments.jobs, arguments.tries)
        took = time.monotonic() - began
        n_findings += len(outcome.findings)
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"kind": name, "title": kind.title, "seconds": round(took), "machine": platform.machine(), "when": when}
        (arguments.out / f"{name}.json").write_text(json.dumps(about | asdict(outcome), indent=1) + "\n")
        print(f"{name}: {outcome.tries} tries, {len(outcome.findings)} findings, {took:.0f} s", file=sys.stderr)
    found = {name: json.loads(path.read_text()) for name in KINDS if (path := arguments.out / f"{name}.json").exists()}
    print(table(found))
    print(f"\n{sum(result['seconds'] for result in found.values()) / 60:.1f} minutes in all; written: {arguments.out}/*.json")
    if n_findings:
        print(f"homes with findings: {work}", file=sys.stderr)
    elif not arguments.work:
        shutil.rmtree(work)
    sys.exit(n_findings > 0)


if __name__ == "__main__":
    main()
