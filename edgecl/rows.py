"""What a row of the store is, in Python and as columns of a table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from .data import Example

ROLES = ("pending", "replay", "heldout", "archive")
FORGOTTEN = "forgotten"  # stands where the name of a task was


@dataclass(frozen=True)
class Stored:
    """A row of the store.

    Attributes:
        generation: the one that learned it; None of rows that were not learned.
    """

    id: int
    role: str
    example: Example
    generation: int | None = None


@dataclass
class Added:
    """What `Store.add` did with its examples; `heldout` of the added ones are for measuring."""

    added: int = 0
    duplicates: int = 0
    replaced: int = 0
    heldout: int = 0


@dataclass
class ObserveReport(Added):
    """What `observe` did; `bad`: (line number, reason) of what was not kept; `redacted`: placeholders by kind."""

    bad: list[tuple[int, str]] = field(default_factory=list)
    redacted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """How a generation did on a row."""

    hash: str
    task: str
    correct: bool
    loss_nats: float
    n_tokens: int


def heldout_quota(n_rows: int, share: float) -> int:
    """Return how many of a task's rows are held out: none below 20, at least 20 from 200 on, else the share."""
    if n_rows < 20 or share <= 0:
        return 0
    return max(round(share * n_rows), 20 if n_rows >= 200 else 1)


def columns_of(example: Example) -> dict[str, Any]:
    """Return an example as columns of the table `examples`."""
    return {
        "task": example.task,
        "messages": json.dumps(example.messages, ensure_ascii=False),
        "final": example.final,
        "program": json.dumps(example.program) if example.program else None,
        "last_only": int(example.last_only),
        "source": example.source,
        "hash": example.hash,
        "prompt_hash": example.prompt_hash,
    }


def _example(row: dict[str, Any]) -> Example:
    messages = tuple((role, content) for role, content in json.loads(row["messages"]))
    program = tuple(json.loads(row["program"])) if row["program"] else None
    example = Example(messages, row["task"], row["source"] or "", row["final"], program, bool(row["last_only"]))
    if example.hash != row["hash"]:
        raise ValueError(f"example {row['id']} is not the one that was stored")
    return example


def stored_from(row: dict[str, Any]) -> Stored:
    """Return a row of the table; ValueError or TypeError where it is not as it was stored."""
    return Stored(row["id"], row["role"], _example(row), row["generation"])


def scored_from(row: dict[str, Any]) -> Scored:
    """Return a row of the table `scores`."""
    return Scored(row["hash"], row["task"], bool(row["correct"]), row["loss_nats"], row["n_tokens"])


def night_from(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table `nights` with its report; ValueError where that is damaged."""
    return row | {"accepted": bool(row["accepted"]), "report": json.loads(row["report"])}


def without_rows(night: dict[str, Any], has_rows: bool, task: str) -> dict[str, Any]:
    """Return a night without what it may say of rows that are forgotten now, if there are any, and of a task; "": none."""
    if has_rows and not night["accepted"] and not night["report"].get("verdict"):  # it ended in an error
        return night | {"reason": "an error, forgotten with a row", "report": {}}
    kept = {key: value for key, value in night["report"].items() if not (has_rows and key == "refused")}  # a digest of texts
    return without_task(night | {"report": kept}, task) if task else night | {"report": kept}


def without_task(night: dict[str, Any], task: str) -> dict[str, Any]:
    """Return a night without the name of a task in its results and in what the gate said."""

    def unnamed(text: str) -> str:
        return re.sub(rf"(^|; ){re.escape(task)}: ", rf"\1{FORGOTTEN}: ", text)

    report = dict(night["report"])
    report |= {key: unnamed(report[key]) for key in ("reason", "verdict") if key in report}
    if "results" in report:
        report["results"] = [result | {"task": FORGOTTEN} if result["task"] == task else result for result in report["results"]]
    return night | {"reason": unnamed(night["reason"]), "report": report}
