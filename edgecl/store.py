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
import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from .data import Example
from .errors import DataError, StoreError
from .migrations import migrations, unknown_steps
from .rows import ROLES, Added, Scored, Stored, columns_of, heldout_quota, night_from, scored_from, stored_from, without_rows

PENDING = "id = ? and role = 'pending'"
AGAIN = "update examples set role = 'pending', generation = null"
FORGET_SCORES = "delete from scores where hash = ?"


class Store:
    """An open replay.db; threads share it, one call after another, and each process opens its own.

    Attributes:
        number: drawn at random for each file: in one that was begun anew, ids are those of other rows. 0: of an older edgecl.
    """

    def __init__(self, path: Path | str) -> None:
        """Open or create the file and bring its schema up to date.

        Raises:
            StoreError: not a database, not writable, or written by a newer edgecl.
        """
        self.path = Path(path)
        self._lock, self._is_closed = threading.RLock(), False
        try:
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = Database(sqlite3.connect(self.path, timeout=30, check_same_thread=False))
            self._opened = self.path.stat()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path}: cannot be opened: {error}; {self._way_out()}") from None
        try:
            with self._translated("cannot be opened", self._way_out()):
                self._prepare()
        except StoreError:
            self.close()
            raise

    def _way_out(self) -> str:
        """Return what to do about a file that cannot be opened."""
        if all(os.access(path, os.R_OK | os.W_OK) for path in (self.path, self.path.parent)):
            return "restore it or move it away"
        return "make it and its folder writable for this user"

    def _prepare(self) -> None:
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.enable_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        if newer := unknown_steps(self._db):
            raise StoreError(f"{self.path}: was written by a newer edgecl (it has {newer[-1]}); update edgecl")
        if migrations.pending(self._db):
            with self._transaction():  # the second of two processes that open a new file finds nothing left to do
                if not migrations.applied(self._db):
                    self._db.execute(f"PRAGMA application_id = {secrets.randbelow(2**31 - 1) + 1}")
                migrations.apply(self._db)
        self.number = int(self._db.execute("PRAGMA application_id").fetchone()[0])

    def close(self) -> None:
        """Close the connection; whatever uses the store afterwards raises StoreError."""
        with self._lock:
            self._is_closed = True
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- examples -----------------------------------------------------------------------------------------------

    def add(
        self, examples: Iterable[Example], heldout_share: float, replace: bool = True, undone: Callable[[], set[int]] = set
    ) -> Added:
        """Store examples as pending, all or none, and set part of each task aside for measuring, where many come at once.

        What comes one by one is all for learning: a held-out row becomes pending then, an archived one always.

        Args:
            replace: whether an answer replaces an older one to the same prompt; else it counts as a duplicate.
            undone: asked where a row is known: which generations were rolled back. What they had learned is added again.

        Raises:
            DataError: a text is not Unicode; nothing was stored.
            StoreError: the disk is full, or the database failed; nothing was stored.
        """
        report = Added()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        given: Counter[str] = Counter()
        known: dict[int, tuple[dict[str, Any], str]] = {}
        with self._transaction():
            last = self.last_id()
            for example in examples:
                known |= {row["id"]: (row, example.task) for row in self._add_one(example, now, report, replace)}
                given[example.task] += 1
            report.heldout = sum(self._hold_out(task, last, heldout_share) for task in sorted(given))
            gone = undone() if known and replace else set()
            for row_id, (row, task) in known.items() if replace else ():
                is_single = row["role"] == "heldout" and not heldout_quota(given[task], heldout_share)
                if is_single or row["role"] == "archive" or row["generation"] in gone:
                    n = self._db.execute(f"{AGAIN} where id = ?", [row_id]).rowcount
                    report.added, report.duplicates = report.added + n, report.duplicates - n
        if report.replaced:
            self._empty_log()
        return report

    def _add_one(self, example: Example, now: str, report: Added, replace: bool) -> list[dict[str, Any]]:
        """Add an example; return the row that is the same, where there is one."""
        table = self._db.table("examples")
        same = list(table.rows_where("hash = ?", [example.hash]))
        is_asked = self._count("prompt_hash = ?", [example.prompt_hash])
        if same or (is_asked and not replace):
            report.duplicates += 1
            columns = columns_of(example)
            judged = {key: columns[key] for key in ("final", "program") if columns[key] is not None}
            for row in same if replace else ():
                if judged.items() - row.items():  # its tests may have been wrong before
                    table.update(row["id"], judged)
                    self._db.execute(FORGET_SCORES, [example.hash])
            return same
        report.added += 1
        if is_asked:
            report.replaced += 1
            table.delete_where("prompt_hash = ?", [example.prompt_hash])
        table.insert(columns_of(example) | {"role": "pending", "created": now})
        self._db.execute(FORGET_SCORES, [example.hash])  # of when a night learned it and did not keep it
        return []

    def _hold_out(self, task: str, last: int, share: float) -> int:
        """Move rows of a task that came after id `last` to heldout until its quota is met; their hash decides which."""
        n_added = self._count("task = ? and id > ?", [task, last])
        n_heldout = self._count("task = ? and role = 'heldout'", [task])
        missing = max(0, heldout_quota(n_added + n_heldout, share) - n_heldout)
        chosen = "select id from examples where task = ? and id > ? order by hash limit ?"
        self._db.execute(f"update examples set role = 'heldout' where id in ({chosen})", [task, last, missing])
        return missing

    def rows(self, role: str, task: str | None = None) -> list[Stored]:
        """Return the rows of a role, oldest first."""
        with self._reading():
            found = self._db.table("examples").rows_where("role = ? and task = coalesce(?, task)", [role, task], order_by="id")
            return [stored_from(row) for row in found]

    def find(self, prompt_hash: str) -> dict[str, Any] | None:
        """Return the row of a prompt as the table has it, whatever its role: what `take_back` puts back."""
        with self._reading():
            rows = list(self._db.table("examples").rows_where("prompt_hash = ?", [prompt_hash]))
        return rows[0] if rows else None

    def take_back(self, example: Example, before: dict[str, Any] | None) -> Stored | None:
        """Delete an example that was added, and put back the row that it replaced, with its id and role; all or nothing.

        Returns:
            The deleted row; None where it was gone: learned and dropped, replaced by a newer answer, or forgotten. Nothing is
            put back then, for what is forgotten stays so.
        """
        table = self._db.table("examples")
        with self._transaction():
            found = list(table.rows_where("hash = ?", [example.hash]))
            table.delete_where("hash = ?", [example.hash])
            if found and before:
                table.insert(before)
        self._empty_log()
        return stored_from(found[0]) if found else None

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of rows by task and role."""
        out: dict[str, dict[str, int]] = {}
        with self._reading():
            for task, role, n in self._db.execute("select task, role, count(*) from examples group by 1, 2 order by 1, 2"):
                out.setdefault(task, dict.fromkeys(ROLES, 0))[role] = n
        return out

    def claim(self, learned: Collection[int], generation: int) -> None:
        """Write down, before a generation is published, which rows it has learned.

        Only what was claimed may leave `pending` after a crash: in a store that was restored, ids are those of other rows.
        """
        self._for_each(f"update examples set generation = ? where {PENDING}", ((generation, row_id) for row_id in learned))

    def claimed(self, generation: int) -> set[int]:
        """Return the ids of rows that a generation has claimed and that are not settled yet."""
        with self._reading():
            found = self._db.execute("select id from examples where role = 'pending' and generation = ?", [generation])
            return {int(row_id) for (row_id,) in found}

    def settle(self, learned: Collection[int], keep: Collection[int], generation: int, archive: bool) -> None:
        """After a published night: learned rows become replay (those in `keep`), archive, or are deleted; all or none.

        Safe to call again: rows that are kept or archived are left alone.
        """
        with self._transaction():
            for row_id in learned:
                if row_id in keep or archive:
                    kept = f"update examples set role = ?, generation = ? where {PENDING}"
                    self._db.execute(kept, ["replay" if row_id in keep else "archive", generation, row_id])
                else:
                    self._db.execute(f"delete from examples where {PENDING}", [row_id])
        self._empty_log()

    def set_aside(self, ids: Collection[int]) -> None:
        """Archive rows that no night can learn, so that they are not lost and no later night meets them."""
        self._for_each(f"update examples set role = 'archive' where {PENDING}", ((row_id,) for row_id in ids))

    def drop(self, role: str, keep: Collection[int] = ()) -> None:
        """Delete every row of a role whose id is not in `keep`."""
        with self._transaction():
            for row in list(self._db.table("examples").rows_where("role = ?", [role], select="id")):
                if row["id"] not in keep:
                    self._db.table("examples").delete(row["id"])
        self._empty_log()

    # --- forgetting ---------------------------------------------------------------------------------------------

    def forget(self, ids: Collection[int], generations: Iterable[str], task: str = "") -> None:
        """Delete rows, their scores, and what errors of nights may have quoted of them; all or none.

        Safe to call again: where a crash or a reader left text in the file, the next call takes it out.

        Args:
            generations: manifest hashes of those that learned from the rows; remembered, see `forgotten`.
            task: whose name goes from what nights reported, where no row is of it any more.

        Raises:
            StoreError: the database failed, or another program was reading and the text is still in its log.
        """
        with self._transaction():
            if ids:
                self._db.execute("PRAGMA user_version = 1")
            self._db.conn.executemany("delete from examples where id = ?", ((row_id,) for row_id in ids))
            # also of rows that nights did not keep, of which ids are all that is known; prose has no task
            self._db.execute("delete from scores where task != '' and hash not in (select hash from examples)")
            self._db.table("forgotten").insert_all(({"generation": hash_} for hash_ in generations), ignore=True)
            is_gone = task and not self._count("task = ?", [task])
            for night in self.nights():
                said = without_rows(night, bool(ids), task if is_gone else "")
                self._db.table("nights").update(night["id"], {"reason": said["reason"], "report": json.dumps(said["report"])})
        then = "the rows are deleted; run `edgecl forget` again to take out the last of them"
        with self._translated("is not clean yet", then):
            self._db.execute("PRAGMA temp_store = MEMORY")
            self._db.execute("VACUUM")  # joined pages may keep copies of old rows, which secure_delete does not see
            if self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise sqlite3.OperationalError("another program is reading it")
            self._db.execute("PRAGMA user_version = 0")

    @property
    def is_clean(self) -> bool:
        """Whether the last `forget` that deleted rows came to its end; else text of theirs may be in the file still."""
        with self._reading():
            return not self._db.execute("PRAGMA user_version").fetchone()[0]

    def last_id(self) -> int:
        """Return the greatest id that a row has or had."""
        with self._reading():
            return int(self._db.execute("select max(seq) from sqlite_sequence where name = 'examples'").fetchone()[0] or 0)

    def forgotten(self) -> set[str]:
        """Return the hashes of generations that learned from a row that was forgotten since."""
        with self._reading():
            return {row["generation"] for row in self._db.table("forgotten").rows}

    def learn_again(self, generations: Collection[int]) -> None:
        """Make rows that these generations learned, and the store still has, pending again."""
        self._for_each(f"{AGAIN} where generation = ?", ((number,) for number in generations))

    # --- nights and scores --------------------------------------------------------------------------------------

    def record_night(self, generation: int | None, accepted: bool, reason: str, report: dict[str, Any]) -> None:
        """Write down what a night did; when it started is in its report, but in one of earlier versions."""
        started = report.get("started") or datetime.now(timezone.utc).isoformat(timespec="seconds")
        night = {"started": started, "generation": generation, "accepted": int(accepted), "reason": reason}
        with self._transaction():
            self._db.table("nights").insert(night | {"report": json.dumps(report)})

    def nights(self) -> list[dict[str, Any]]:
        """Return every night, oldest first."""
        with self._reading():
            return [night_from(row) for row in self._db.table("nights").rows_where(order_by="id")]

    def scores(self, generation: str, hashes: Sequence[str]) -> dict[str, Scored]:
        """Return the scores of a generation (by its manifest's hash) on rows, for those that have one."""
        wanted = set(hashes)
        with self._reading():
            found = [scored_from(row) for row in self._db.table("scores").rows_where("generation = ?", [generation])]
        return {score.hash: score for score in found if score.hash in wanted}

    def add_scores(self, generation: str, scores: Iterable[Scored]) -> None:
        """Write down how a generation did on rows."""
        rows = [{"generation": generation} | asdict(score) for score in scores if math.isfinite(score.loss_nats)]
        with self._transaction():
            self._db.table("scores").upsert_all(rows, pk=("generation", "hash"))

    def rename_scores(self, draft: str, generation: str, base: str) -> None:
        """Let a published generation have the scores that its draft got; all others but those of the base are dropped."""
        with self._transaction():
            self._db.execute("update or replace scores set generation = ? where generation = ?", [generation, draft])
            self._db.execute("delete from scores where generation not in (?, ?)", [generation, base])

    def drop_draft_scores(self) -> None:
        """Forget the scores of drafts: their night is over."""
        with self._transaction():
            self._db.execute("delete from scores where generation like 'draft %'")

    # --- helpers ------------------------------------------------------------------------------------------------

    def _count(self, where: str, arguments: Sequence[Any]) -> int:
        return int(self._db.table("examples").count_where(where, arguments))

    def _for_each(self, statement: str, arguments: Iterable[Sequence[Any]]) -> None:
        """Run a statement with each of many arguments, all or none."""
        with self._transaction():
            self._db.conn.executemany(statement, arguments)

    def _empty_log(self) -> None:
        """Empty the write-ahead log, where deleted text would stay; if a reader is in the way, a later call does it."""
        with self._lock, suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write all or nothing. The lock is taken at once: a transaction that has read could not wait for its turn."""
        with self._translated("failed", "nothing was stored"):
            self._db.conn.execute("BEGIN IMMEDIATE")
            with self._db.conn:  # commits, or rolls back
                if self._is_replaced():
                    raise StoreError(f"{self.path}: was replaced; open it again, nothing was stored")
                yield

    def _is_replaced(self) -> bool:
        """Return whether another file has the name of this one, or none: nobody would ever read what is written here."""
        try:
            return not os.path.samestat(self.path.stat(), self._opened)
        except OSError:
            return True

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._translated("cannot be read", "restore it or move it away"):
            try:
                yield
            except UnicodeEncodeError:  # of what is asked for
                raise
            except (ValueError, TypeError) as error:  # what a damaged row holds is no JSON, or other JSON
                raise StoreError(f"{self.path}: a row is damaged: {error}; restore it or move it away") from None

    @contextmanager
    def _translated(self, what: str, then: str) -> Iterator[None]:
        """Hold the connection, and turn its errors into StoreError."""
        try:
            with self._lock:
                if self._is_closed:
                    raise StoreError(f"{self.path}: is closed; open it again")
                yield
        except sqlite3.Error as error:
            reason = str(error).split("\n")[0]  # a damaged schema is quoted whole
            raise StoreError(f"{self.path}: {what}: {reason}; {then}") from None
        except UnicodeDecodeError:  # SQLite quotes what it cannot read
            raise StoreError(f"{self.path}: {what}: its schema is damaged; {then}") from None
        except UnicodeEncodeError:
            raise DataError("a text has half a character (a lone surrogate); nothing was stored") from None
