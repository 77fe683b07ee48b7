"""replay.db: what was accepted and is not learned yet, what is rehearsed, what is held out for measuring.

SQLite through sqlite-utils, in WAL mode, readable by its owner alone, deleted rows overwritten. Plain tables that a person can
query: `sqlite-utils rows replay.db examples`. A row has one role:

- pending: accepted, not learned yet; never lost
- replay: kept for rehearsal; at most a stated share of each night's rows
- heldout: for measuring alone, never trained on
- archive: kept after it was learned, only where the user turned that on

The newest answer to a prompt replaces older rows of that prompt whatever their role.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from .data import Example
from .errors import DataError, StoreError
from .migrations import migrations

ROLES = ("pending", "replay", "heldout", "archive")


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


class Store:
    """An open replay.db; not shared between threads or processes: each opens its own."""

    def __init__(self, path: Path | str) -> None:
        """Open or create the file and bring its schema up to date.

        Raises:
            StoreError: not a database, not writable, or written by a newer edgecl.
        """
        self.path = Path(path)
        try:
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = Database(sqlite3.connect(self.path, timeout=30))
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path}: cannot be opened: {error}; restore it or move it away") from None
        try:
            with self._translated("cannot be opened", "restore it or move it away"):
                self._prepare()
        except StoreError:
            self.close()
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.enable_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        with closing(Database(memory=True)) as empty:
            known = {migration.name for migration in migrations.pending(empty)}
        if newer := [m.name for m in migrations.applied(self._db) if m.name not in known]:
            raise StoreError(f"{self.path}: was written by a newer edgecl (it has {newer[-1]}); update edgecl")
        if migrations.pending(self._db):
            with self._transaction():  # the second of two processes that open a new file finds nothing left to do
                migrations.apply(self._db)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- examples -----------------------------------------------------------------------------------------------

    def add(self, examples: Iterable[Example], heldout_share: float) -> Added:
        """Store examples as pending, all or none, and set part of each task aside for measuring.

        Raises:
            DataError: a text is not Unicode; nothing was stored.
            StoreError: the disk is full, or the database failed; nothing was stored.
        """
        report = Added()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        tasks: set[str] = set()
        with self._transaction():
            for example in examples:
                self._add_one(example, now, report)
                tasks.add(example.task)
            for task in sorted(tasks):
                report.heldout += self._hold_out(task, heldout_share)
        if report.replaced:
            self._empty_log()
        return report

    def _add_one(self, example: Example, now: str, report: Added) -> None:
        table = self._db.table("examples")
        if self._count("hash = ?", [example.hash]):
            report.duplicates += 1
            return
        report.added += 1
        if self._count("prompt_hash = ?", [example.prompt_hash]):
            report.replaced += 1
            table.delete_where("prompt_hash = ?", [example.prompt_hash])
        table.insert(
            {
                "role": "pending",
                "task": example.task,
                "messages": json.dumps(example.messages, ensure_ascii=False),
                "final": example.final,
                "program": json.dumps(example.program) if example.program else None,
                "source": example.source,
                "hash": example.hash,
                "prompt_hash": example.prompt_hash,
                "created": now,
            }
        )

    def _hold_out(self, task: str, share: float) -> int:
        """Move pending rows of a task to heldout until its quota is met; which ones is decided by their hash."""
        n_pending = self._count("task = ? and role = 'pending'", [task])
        n_heldout = self._count("task = ? and role = 'heldout'", [task])
        missing = heldout_quota(n_pending + n_heldout, share) - n_heldout
        if missing <= 0:
            return 0
        self._db.execute(
            "update examples set role = 'heldout' where id in "
            "(select id from examples where task = ? and role = 'pending' order by hash limit ?)",
            [task, missing],
        )
        return missing

    def rows(self, role: str, task: str | None = None) -> list[Stored]:
        """Return the rows of a role, oldest first."""
        where, arguments = "role = ?", [role]
        if task is not None:
            where, arguments = where + " and task = ?", [role, task]
        with self._reading():
            return [
                Stored(row["id"], row["role"], _example(row), row["generation"])
                for row in self._db.table("examples").rows_where(where, arguments, order_by="id")
            ]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of rows by task and role."""
        out: dict[str, dict[str, int]] = {}
        with self._reading():
            for task, role, n in self._db.execute("select task, role, count(*) from examples group by 1, 2 order by 1, 2"):
                out.setdefault(task, dict.fromkeys(ROLES, 0))[role] = n
        return out

    def claim(self, learned: Collection[int], generation: int) -> None:
        """Write down, before a generation is published, which pending rows it has learned.

        Only what was claimed may leave `pending` after a crash: in a store that was restored or begun anew, the ids of a
        manifest are those of other rows.
        """
        with self._transaction():
            for row_id in learned:
                self._db.execute("update examples set generation = ? where id = ? and role = 'pending'", [generation, row_id])

    def claimed(self, generation: int) -> set[int]:
        """Return the ids of rows that a generation has claimed and that are pending still."""
        with self._reading():
            found = self._db.execute("select id from examples where role = 'pending' and generation = ?", [generation])
            return {int(row_id) for (row_id,) in found}

    def settle(self, learned: Collection[int], keep: Collection[int], generation: int, archive: bool) -> None:
        """After a published night: learned rows become replay (those in `keep`), archive, or are deleted; all or none.

        Safe to call again: rows that are no longer pending are left alone.
        """
        with self._transaction():
            for row_id in learned:
                role = "replay" if row_id in keep else "archive" if archive else None
                if role is None:
                    self._db.execute("delete from examples where id = ? and role = 'pending'", [row_id])
                else:
                    self._db.execute(
                        "update examples set role = ?, generation = ? where id = ? and role = 'pending'",
                        [role, generation, row_id],
                    )
        self._empty_log()

    def drop(self, role: str) -> None:
        """Delete every row of a role."""
        with self._transaction():
            self._db.table("examples").delete_where("role = ?", [role])
        self._empty_log()

    # --- nights and scores --------------------------------------------------------------------------------------

    def record_night(self, generation: int | None, accepted: bool, reason: str, report: dict[str, Any]) -> None:
        """Write down what a night did."""
        with self._transaction():
            self._db.table("nights").insert(
                {
                    "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "generation": generation,
                    "accepted": int(accepted),
                    "reason": reason,
                    "report": json.dumps(report),
                }
            )

    def nights(self) -> list[dict[str, Any]]:
        """Return every night, oldest first."""
        with self._reading():
            return [
                row | {"accepted": bool(row["accepted"]), "report": json.loads(row["report"])}
                for row in self._db.table("nights").rows_where(order_by="id")
            ]

    def scores(self, generation: str, hashes: Sequence[str]) -> dict[str, Scored]:
        """Return the scores of a generation (by its manifest's hash) on rows, for those that have one."""
        wanted = set(hashes)
        with self._reading():
            rows = list(self._db.table("scores").rows_where("generation = ?", [generation]))
        return {
            row["hash"]: Scored(row["hash"], row["task"], bool(row["correct"]), row["loss_nats"], row["n_tokens"])
            for row in rows
            if row["hash"] in wanted
        }

    def add_scores(self, generation: str, scores: Iterable[Scored]) -> None:
        """Write down how a generation did on rows."""
        with self._transaction():
            self._db.table("scores").upsert_all(
                [
                    {
                        "generation": generation,
                        "hash": s.hash,
                        "task": s.task,
                        "correct": int(s.correct),
                        "loss_nats": s.loss_nats,
                        "n_tokens": s.n_tokens,
                    }
                    for s in scores
                    if math.isfinite(s.loss_nats)
                ],
                pk=("generation", "hash"),
            )

    def rename_scores(self, draft: str, generation: str) -> None:
        """Let a published generation have the scores that its draft got; those of other drafts are dropped."""
        with self._transaction():
            self._db.execute("update or replace scores set generation = ? where generation = ?", [generation, draft])
        self.drop_draft_scores()

    def drop_draft_scores(self) -> None:
        """Forget the scores of drafts: the next night's draft may have the same name and is another model."""
        with self._transaction():
            self._db.execute("delete from scores where generation like 'draft %'")

    # --- helpers ------------------------------------------------------------------------------------------------

    def _count(self, where: str, arguments: Sequence[Any]) -> int:
        return int(self._db.table("examples").count_where(where, arguments))

    def _empty_log(self) -> None:
        """Empty the write-ahead log, where deleted text would stay; if a reader is in the way, a later call does it."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write all or nothing. The lock is taken at once: a transaction that has read could not wait for its turn."""
        with self._translated("failed", "nothing was stored"):
            self._db.conn.execute("BEGIN IMMEDIATE")
            with self._db.conn:  # commits, or rolls back
                yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._translated("cannot be read", "restore it or move it away"):
            try:
                yield
            except (ValueError, TypeError) as error:  # what a damaged row holds is no JSON, or other JSON
                raise StoreError(f"{self.path}: a row is damaged: {error}; restore it or move it away") from None

    @contextmanager
    def _translated(self, what: str, then: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error).split("\n")[0]  # a damaged schema is quoted whole
            raise StoreError(f"{self.path}: {what}: {reason}; {then}") from None
        except UnicodeDecodeError:  # SQLite quotes what it cannot read
            raise StoreError(f"{self.path}: {what}: its schema is damaged; {then}") from None
        except UnicodeEncodeError:
            raise DataError("a text has half a character (a lone surrogate); nothing was stored") from None


def _example(row: dict[str, Any]) -> Example:
    messages = tuple((role, content) for role, content in json.loads(row["messages"]))
    program = tuple(json.loads(row["program"])) if row["program"] else None
    example = Example(messages, row["task"], row["source"] or "", row["final"], program)
    if example.hash != row["hash"]:
        raise ValueError(f"example {row['id']} is not the one that was stored")
    return example
