"""How often the gate errs: nights that are known good and nights that are known bad, on the real model.

    python examples/gate_rates.py [--seeds 4] [--json] [--out FOLDER]

Every seed begins with a good night of the first task; each kind of second night then starts from a copy of that home, with the
gate enforced. Good: the next task, the one after it, more of the first. Bad: answers shuffled among the rows of the next task,
and among more of the first; ten times the learning rate; other questions of the first task with wrong answers, under the name
of a task of their own. Nights that are done are kept in FOLDER, and are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgecl import Learner
from edgecl.demo import demo_data
from edgecl.profile import ReplaySettings, TrainSettings

N_ROWS, WRITTEN, EPOCHS, MIN_STEPS = 128, 112, 2, 24
SETTINGS = {"rows": N_ROWS, "written": WRITTEN, "epochs": EPOCHS, "min_steps": MIN_STEPS}
Record = dict[str, Any]


def rows(task: str, seed: int, name: str = "") -> list[Record]:
    """Return rows of one of the demo's tasks, under another name if one is given."""
    return [row | {"task": name or task} for row in demo_data().make_rows(task, "train", N_ROWS, seed)]


def with_answers(records: list[Record], answers: list[str]) -> list[Record]:
    """Return the same questions with other answers."""
    out = []
    for record, answer in zip(records, answers, strict=True):
        asked, answered = record["messages"]
        out.append({"messages": [asked, answered | {"content": answer}], "task": record["task"]})
    return out


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """Return rows, each with the answer of another."""
    answers = [record["messages"][1]["content"] for record in records]
    random.Random(seed).shuffle(answers)
    return with_answers(records, answers)


def poisoned(seed: int) -> list[Record]:
    """Return further questions of the first task; each answer is the next one in a ring of its answers, so always wrong."""
    records = rows("home", seed + 100, "poison")
    answers = [record["messages"][1]["content"] for record in records]
    ring = sorted(set(answers))
    return with_answers(records, [ring[(ring.index(answer) + 1) % len(ring)] for answer in answers])


KINDS: dict[str, tuple[bool, Callable[[int], list[Record]], float]] = {  # is it good, its rows, times the learning rate
    "the next task": (True, lambda seed: rows("math", seed), 1.0),
    "the task after it": (True, lambda seed: rows("code", seed), 1.0),
    "more of the first task": (True, lambda seed: rows("home", seed + 50), 1.0),
    "shuffled answers": (False, lambda seed: shuffled(rows("math", seed), seed), 1.0),
    "ten times the learning rate": (False, lambda seed: rows("math", seed), 10.0),
    "a poisoned task": (False, poisoned, 1.0),
    "more of the first task, shuffled": (False, lambda seed: shuffled(rows("home", seed + 50), seed), 1.0),
}


def main() -> None:
    """Run the nights that are missing and print how often the gate erred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgecl-gate-") as temporary:
        folder = args.out or Path(temporary)
        nights = [night for seed in range(args.seeds) for night in run_seed(seed, folder)]
    found = rates(nights)
    named = {name: {"errors": n, "nights": of, "wilson_95": between} for name, (n, of, *between) in found.items()}
    facts = {"machine": platform.platform(), "settings": SETTINGS, "rates": named, "nights": nights}
    print(json.dumps(facts) if args.json else table(nights, found))


def run_seed(seed: int, folder: Path) -> list[Record]:
    """Return what the gate said of each kind of night."""
    nights, home = [], folder / f"first-{seed}"
    for i, (kind, (is_good, make, times)) in enumerate(KINDS.items()):
        path = folder / f"night-{seed}-{i}.json"
        if not path.is_file():
            if not home.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                first_night(seed, home)
            of = {"kind": kind, "is_good": is_good, "seed": seed, "settings": SETTINGS}
            night = of | second_night(home, make(seed), times)
            path.write_text(json.dumps(night) + "\n", "utf-8")
        nights.append(json.loads(path.read_text("utf-8")))
    shutil.rmtree(home, ignore_errors=True)
    return nights


def first_night(seed: int, home: Path) -> None:
    """Make a home that has learned the first task."""
    draft = home.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    train = TrainSettings(epochs=EPOCHS, min_steps=MIN_STEPS, seed=seed)
    with Learner.init("smollm2", draft, replay=ReplaySettings(written=WRITTEN), train=train) as learner:
        learner.observe([json.dumps(row) for row in rows("home", seed)])
        learner.adapt(gate="report")
    draft.rename(home)


def second_night(first: Path, records: list[Record], times: float) -> Record:
    """Run a night on a copy of the home, with the gate enforced."""
    home = first.with_suffix(".second")
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(first, home, symlinks=True)
    with Learner(home) as learner:
        train = learner.settings.train
        learner.settings = replace(learner.settings, train=replace(train, learning_rate=times * train.learning_rate))
        learner.observe([json.dumps(record) for record in records])
        report = learner.adapt()
    shutil.rmtree(home)
    facts = report.as_dict()
    return {"accepted": report.accepted, "reason": report.reason, "prose": report.prose, "results": facts["results"]}


def rates(nights: list[Record]) -> dict[str, tuple[int, int, float, float]]:
    """Return (errors, nights, and the 95% interval of their share) of false refusals and of false acceptances."""
    out = {}
    for name, is_good in (("false refusals", True), ("false acceptances", False)):
        part = [night["accepted"] != is_good for night in nights if night["is_good"] == is_good]
        out[name] = (sum(part), len(part), *wilson_interval(sum(part), len(part)))
    return out


def wilson_interval(errors: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share of n nights (Wilson 1927): none in a few is not none in a hundred."""
    z, share = 1.96, errors / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - width) / (1 + z * z / n)), (middle + width) / (1 + z * z / n)


def table(nights: list[Record], found: dict[str, tuple[int, int, float, float]]) -> str:
    """Return what the gate said as a Markdown table, and the two rates."""
    lines = ["| night | accepted | reasons, where refused |", "|---|---|---|"]
    for kind in KINDS:
        part = [night for night in nights if night["kind"] == kind]
        reasons = "; ".join(night["reason"] for night in part if not night["accepted"])
        lines.append(f"| {kind} | {sum(night['accepted'] for night in part)} of {len(part)} | {reasons} |")
    for name, (errors, n, low, high) in found.items():
        lines.append(f"\n{name}: {errors} of {n} (95% interval {low:.0%} to {high:.0%})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
