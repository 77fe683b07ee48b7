"""The schema of replay.db, one small named step after another; a step is never edited once it has shipped."""

from __future__ import annotations

from contextlib import closing

from sqlite_utils import Database, Migrations

migrations = Migrations("edgecl")


def unknown_steps(db: Database) -> list[str]:
    """Return the names of the steps that a file has had and that are not known here: a newer edgecl wrote it."""
    with closing(Database(memory=True)) as empty:
        known = {step.name for step in migrations.pending(empty)}
    return [step.name for step in migrations.applied(db) if step.name not in known]


@migrations()
def m001_examples(db: Database) -> None:
    """Every row the learner holds; `role` is pending, replay, heldout or archive."""
    # autoincrement: a manifest names the rows that a night learned by id, so no id may ever come to mean another row
    db.execute(
        """
        create table examples (
            id integer primary key autoincrement,
            role text not null,
            task text not null,
            messages text not null,    -- JSON: [[role, content], ...]
            final text,
            source text,
            hash text not null,
            prompt_hash text not null,
            created text not null,     -- UTC, ISO 8601
            generation integer         -- that learned it; NULL while pending or held out
        )
        """
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


@migrations()
def m004_programs(db: Database) -> None:
    """What stands around an answer that is code, where it is run: JSON, [before, after]."""
    db.table("examples").add_column("program", str)


@migrations()
def m005_last_only(db: Database) -> None:
    """Whether only the last answer of a chat was accepted; NULL: all of them were."""
    db.table("examples").add_column("last_only", int)


@migrations()
def m006_forgotten(db: Database) -> None:
    """The generations, by their manifest's hash, that learned from a row that was forgotten: they teach no more."""
    db.table("forgotten").create({"generation": str}, pk="generation")


@migrations()
def m007_scores_by_row(db: Database) -> None:
    """Each row that is added asks for scores of its hash, which the key does not begin with."""
    db.table("scores").create_index(["hash"])


@migrations()
def m008_scores_anew(db: Database) -> None:
    """Prose, and answers that a number or tests judge, are measured otherwise now: earlier scores are no measure for it."""
    db.execute("delete from scores")
