"""Two trainings that take turns after every step: what a change costs on a machine whose speed changes within minutes.

``python examples/lab/step_by_step.py A B`` trains the default of ``examples/compare_training.py`` (seed 0) with the checkouts
A and B of this repository, each in a process of its own that waits while the other one works. One may have less memory:
``A A:790`` is the same checkout with all memory and in 790 MB. It prints the plan of each and its largest resident set, and
for planning (with the first step), for each third of the steps and for all of it, the seconds of both and their ratio.

Taking turns costs both what the other one drives out of the caches. The same checkout against itself came out at 1.02.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgecl.child import BRIEF_WAITS

RAM_MB = 8_000


def train(ram_bytes: int) -> None:
    """Train, waiting for a line before the first step and after each, then print the facts as JSON."""
    from examples.compare_training import SHIPPED, chats, encoded, run_edgecl

    def wait(*_: object) -> None:
        print(flush=True)
        sys.stdin.readline()

    request = {"rows": encoded(chats(None, 0)[0]), "heldout": [], "settings": asdict(SHIPPED), "ram_bytes": ram_bytes}
    wait()
    facts = run_edgecl(request, wait)
    print(json.dumps({name: facts[name] for name in ("plan", "peak_rss_bytes")}))


class Side:
    """A training in a process of its own.

    Attributes:
        seconds: of its turns: planning with the first step, every other step, and what is left to do.
        facts: what it printed in the end, None while it works.
    """

    def __init__(self, checkout: str) -> None:
        folder, _, megabytes = checkout.partition(":")
        tree = Path(folder).resolve()
        paths = os.pathsep.join(str(path) for path in (tree, tree / "convert"))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--ram", str(int(megabytes or RAM_MB) * 1_000_000)],
            env=BRIEF_WAITS | os.environ | {"PYTHONPATH": paths},  # as a night's process has it
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seconds: list[float] = []
        self.facts: dict[str, Any] | None = None
        self._read()

    def take_turn(self) -> None:
        """Let it work until it waits again, or ends."""
        if self.facts is None:
            assert self._process.stdin
            began = time.perf_counter()
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            self._read()
            self.seconds.append(time.perf_counter() - began)

    def _read(self) -> None:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a training ended before its time; see above")
        if line.strip():
            self.facts = json.loads(line)

    def parts(self) -> list[float]:
        """Return the seconds of planning, of each third of the steps, and of all."""
        planning, *steps, _ = self.seconds
        third = len(steps) / 3
        thirds = [sum(steps[round(i * third) : round((i + 1) * third)]) for i in range(3)]
        return [planning, *thirds, sum(self.seconds)]


def main() -> None:
    """Train both, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkouts", nargs="*", metavar="CHECKOUT[:MB]", help="two folders, each with its memory in MB")
    parser.add_argument("--ram", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ram:
        train(arguments.ram)
        return
    if len(arguments.checkouts) != 2:
        parser.error(f"{len(arguments.checkouts)} checkouts; give two, such as `../main .`")
    sides = [Side(checkout) for checkout in arguments.checkouts]
    turn = 0
    while any(side.facts is None for side in sides):
        for side in sides if turn % 2 else reversed(sides):
            side.take_turn()
        turn += 1
    for name, side in zip(arguments.checkouts, sides, strict=True):
        assert side.facts
        print(f"{name}: {side.facts['plan']}; {side.facts['peak_rss_bytes'] / 1e6:.0f} MB")
    print(f"{'':<14}{'first':>8}{'second':>8}{'ratio':>8}")
    for what, first, second in zip(
        ("planning, s", "first third", "second third", "last third", "all"), *(side.parts() for side in sides), strict=True
    ):
        print(f"{what:<14}{first:>8.2f}{second:>8.2f}{second / first:>8.3f}")


if __name__ == "__main__":
    main()
