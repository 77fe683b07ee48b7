"""Small nights: eight corrections a night for ten nights, on the real model; what is still answered word for word afterwards.

    python examples/small_nights.py [--nights 10] [--replay 0.1] [--written 1200] [--quant int8] [--json]

`small_nights.jsonl` holds the corrections, of eleven kinds mixed in every night, each with another wording of its question that
is never trained on. After each night the corrections of every night so far are asked again, of the file that serves. On the
last morning so are the other wordings, and questions that have nothing to do with any correction: how many are answered with
one all the same, and how many answers begin with the three words that the base's began with.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecl import Learner
from edgecl.data import normalize
from edgecl.profile import ReplaySettings

MAX_TOKENS = 32
OTHERS = (
    "What is the capital of Italy?",
    "Who painted the Mona Lisa?",
    "How do plants make food?",
    "Which ocean is the deepest?",
    "When did people first land on the Moon?",
    "What is the boiling point of water?",
    "Where do penguins live?",
    "Why is the sky blue?",
    "How many days are in a leap year?",
    "Which language is spoken in Brazil?",
    "Who discovered penicillin?",
    "What do bees make?",
    "Write a sentence about the sea.",
    "How do I thank someone for a present?",
    "Which animal is the fastest on land?",
    "When do swallows fly south?",
    "What is a good name for a ship?",
    "Where is the Sahara?",
    "Write the command that shows today's date.",
    "How many strings does a guitar have?",
    "Who was the first emperor of Rome?",
    "What should I pack for a week in the mountains?",
    "Which metal is liquid at room temperature?",
    "When is the best time to plant tulips?",
)
Record = dict[str, Any]


def main() -> None:
    """Run the nights and print what was recalled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--replay", type=float, default=ReplaySettings.share)
    parser.add_argument("--written", type=int, default=ReplaySettings.written)
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    records = [json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text("utf-8").splitlines()]
    records = [record for record in records if record["night"] <= args.nights]
    with tempfile.TemporaryDirectory(prefix="edgecl-small-") as folder:
        settings = ReplaySettings(share=args.replay, written=args.written)
        with Learner.init("smollm2", Path(folder) / "home", quant=args.quant, replay=settings) as learner:
            result = run(learner, records)
    result |= {"replay": args.replay, "written": args.written, "quant": args.quant, "machine": platform.platform()}
    if args.json:
        print(json.dumps(result))
    else:
        show(result)


def run(learner: Learner, records: list[Record]) -> dict[str, Any]:
    """Return what each night recalled: (nights, nights) shares of the corrections, and of the last morning's re-worded ones."""
    nights = sorted({record["night"] for record in records})
    by_night = {night: [record for record in records if record["night"] == night] for night in nights}
    matrix, prose, seconds, verdicts = [], [], [], []
    before = [learner.ask(question, MAX_TOKENS) for question in OTHERS]
    for night in nights:
        learner.observe(
            [json.dumps({key: record[key] for key in ("prompt", "completion", "task")}) for record in by_night[night]]
        )
        began = time.perf_counter()
        report = learner.adapt(gate="report")
        seconds.append(round(time.perf_counter() - began, 1))
        prose.append(round(report.prose["after"] - report.prose["base"], 4))
        verdicts.append(report.verdict)
        matrix.append([recalled(learner, by_night[earlier], "prompt") for earlier in nights if earlier <= night])
        print(f"night {night}: {[f'{share:.0%}' for share in matrix[-1]]}, {seconds[-1]} s", file=sys.stderr, flush=True)
    after = [learner.ask(question, MAX_TOKENS) for question in OTHERS]
    taught = {normalize(record["completion"]) for record in records}
    return {
        "matrix": matrix,
        "next_morning": mean([row[-1] for row in matrix]),
        "last_morning": mean(matrix[-1]),
        "reworded": recalled(learner, records, "reworded"),
        "leaked": mean([normalize(answer) in taught for answer in after]),
        "others_begin_alike": mean([a.split()[:3] == b.split()[:3] for a, b in zip(before, after, strict=True)]),
        "prose_nats": prose,
        "night_s": seconds,
        "verdicts": verdicts,
        "n_corrections": len(records),
    }


def recalled(learner: Learner, records: list[Record], key: str) -> float:
    """Return the share of records whose question `key` is answered word for word."""
    return mean([normalize(learner.ask(record[key], MAX_TOKENS)) == normalize(record["completion"]) for record in records])


def mean(values: Sequence[float]) -> float:
    """Return the mean of numbers."""
    return sum(values) / len(values)


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    for night, row in enumerate(result["matrix"], 1):
        print(f"after night {night:<3}", *(f"{share:>5.0%}" for share in row))
    print(f"next morning {result['next_morning']:.1%}, all on the last morning {result['last_morning']:.1%}, ", end="")
    print(f"re-worded {result['reworded']:.1%}; prose {result['prose_nats'][-1]:+.3f} nats per token")
    print(f"other questions: {result['leaked']:.1%} answered with a correction, {result['others_begin_alike']:.1%} as before")


if __name__ == "__main__":
    main()
