"""The schema of replay.db, one small named step after another; a step is never edited once it has shipped."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("edgecl")


@migrations()
def m001_examples(db: Database) -> None:
    """Every row the learner holds; `role` is pending, replay, heldout or archive."""
    db.table("examples").create(
        {
            "id": int,
            "role": str,
            "task": str,
            "messages": str,  # JSON: [[role, content], ...]
            "final": str,
            "source": str,
            "hash": str,
            "prompt_hash": str,
            "created": str,  # UTC, ISO 8601
            "generation": int,  # that learned it; NULL while pending or held out
        },
        pk="id",
        not_null={"role", "task", "messages", "hash", "prompt_hash", "created"},
    )
    db.table("examples").create_index(["hash"], unique=True)
    db.table("examples").create_index(["prompt_hash"], unique=True)
    db.table("examples").create_index(["role", "task"])


@migrations()
def m002_nights(db: Database) -> None:
    """What each night did: published or refused, and why."""
    db.table("nights").create(
        {"id": int, "started": str, "generation": int, "accepted": int, "reason": str, "report": str},
        pk="id",
        not_null={"started", "accepted", "reason", "report"},
    )


@migrations()
def m003_scores(db: Database) -> None:
    """How each generation did on each measuring row: a row of a generation is scored once."""
    db.table("scores").create(
        {"generation": str, "hash": str, "task": str, "correct": int, "loss_nats": float, "n_tokens": int},
        pk=("generation", "hash"),
    )
