"""Forgetting: rows out of every part of a home, then out of what serves.

`forget` deletes rows, and everything in the home that holds their text or was computed from it, except the adapters and
models of published generations. Those that learned from the rows, or descend from one that did, teach no later night. Their
askers, which know what was asked by heart, go; their other files may still say what they learned. `retrain` rebuilds without
them: the newest ancestor that learned nothing forgotten serves, what the store still holds of later nights is learned again
in one night, and the others are deleted with all their files.

*Does not cover*: what left the home (exports, backups, a terminal's history), and blocks that the disk has not written over.
The name of a task stays in the report.json of generations that were measured on it, which is hashed, and goes with them.
Rows that a night learned and did not keep, or that a newer answer replaced, are gone from the store: they can be named by id,
but not found by their text.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace

from .child import Progress
from .data import Example
from .errors import DataError, GenerationError, NothingToLearn, translated
from .generations import ASKER, Manifest
from .learner import Learner
from .lock import night_lock
from .night import AdaptReport
from .rebuild import restore
from .rows import ROLES, Stored, without_task
from .tries import clear_try


@dataclass
class Rebuild:
    """What it takes to have a model that learned nothing forgotten.

    Attributes:
        start: the generation to go on from.
        deleted: those that learned from a forgotten row, or descend from one that did.
        n_again: rows of theirs that the store still holds; n_lost: rows that they learned and nobody has any more.
        night: in which the rows were learned again; None where there was nothing to learn, or it has not been run.
    """

    start: int
    deleted: list[int]
    n_again: int
    n_lost: int
    night: AdaptReport | None = None


def find(learner: Learner, contains: str | None = None, task: str | None = None) -> list[Stored]:
    """Return the rows of the store, of every role, that hold a text in capitals or not, or are of a task.

    Raises:
        DataError: the text is empty.
    """
    if contains is not None and not contains.strip():
        raise DataError("the text to forget is empty; `--task T` forgets all rows of a task")
    rows = [row for role in ROLES for row in learner.store.rows(role, task)]
    return [row for row in rows if contains is None or contains.casefold() in _text(row.example).casefold()]


def forget(learner: Learner, ids: Collection[int], task: str = "") -> list[int]:
    """Delete rows by id, and let no generation teach that learned from them; return the numbers of these.

    Args:
        task: whose name is taken out of the history, too, where no row is of it any more.

    Raises:
        DataError: an id that no row has or had; nothing was deleted. A row that is gone already may be forgotten again.
        NotNow: a night is running.
        StoreError: the database failed, or is being read and must be cleaned again.
    """
    with night_lock(learner.home):
        learner.finish_last_night()
        held = {row.id: row.generation for row in find(learner)}
        by_night = {manifest.number: set(manifest.learned) for manifest in _manifests(learner)}
        last = learner.store.last_id()
        known = set(held).union(*by_night.values())
        if unknown := sorted(row_id for row_id in set(ids) - known if not 0 < row_id <= last):
            raise DataError(f"there is no row {unknown[0]}; `edgecl forget --contains TEXT --dry-run` shows rows and their ids")
        learned = {number for number, rows in by_night.items() if rows.intersection(ids)}
        learned |= {number for row_id in ids if (number := held.get(row_id))}
        numbers = _trained_from(learner, learned)
        if ids:
            shutil.rmtree(learner.home / "runs", ignore_errors=True)
            clear_try(learner.home)  # an error may quote a row
            learner.generations.clear_drafts()
        learner.store.forget(ids, [learner.generations.hash_of(n) for n in numbers], task)
        for number in _silent_askers(learner):  # with those of an earlier call that was cut short
            learner.generations.delete_asker(number)
    return numbers


def left_over(learner: Learner, task: str = "") -> list[str]:
    """Return in words what the home holds of rows that are gone, which `forget` takes out: an earlier call was cut short.

    Args:
        task: as for `forget`.
    """
    found = [] if learner.store.is_clean else ["text in replay.db"]
    found += [f"the asker of generation {number}" for number in _silent_askers(learner)]
    is_named = task and any(without_task(night, task) != night for night in learner.store.nights())
    return [*found, "the task's name in the history"] if is_named else found


def _silent_askers(learner: Learner) -> list[int]:
    """Return the numbers of generations that learned from a forgotten row and have an asker still."""
    generations, silent = learner.generations, learner.store.forgotten()
    asking = (number for number in generations.numbers() if (generations.folder / f"{number:04d}" / ASKER).is_file())
    return [number for number in asking if generations.hash_of(number) in silent]


def going_on(learner: Learner, rows: Collection[Stored]) -> list[int]:
    """Return the ids of further rows whose chat begins with that of one of these: they hold its text, too."""
    chats = {row.example.messages for row in rows}
    ids = {row.id for row in rows}
    return [
        row.id
        for row in find(learner)
        if row.id not in ids and any(row.example.messages[:n] in chats for n in range(1, len(row.example.messages)))
    ]


def plan(learner: Learner) -> Rebuild | None:
    """Return what `retrain` would do and cost; None where no generation learned from a forgotten row.

    Raises:
        GenerationError: the generation that serves is damaged.
    """
    generations, silent = learner.generations, learner.store.forgotten()
    deleted: list[Manifest] = []
    for manifest in _manifests(learner):
        own = generations.hash_of(manifest.number)
        if own in silent or manifest.parent in silent:
            silent.add(own)
            deleted.append(manifest)
    if not deleted:
        return None
    start = next(night for night in generations.lineage(generations.current()) if night.hash not in silent)
    learned = {row_id for manifest in deleted for row_id in manifest.learned}
    held = {row.id for row in find(learner)}
    return Rebuild(start.number, [manifest.number for manifest in deleted], len(learned & held), len(learned - held))


def retrain(learner: Learner, progress: Progress | None = None) -> Rebuild:
    """Serve the newest ancestor that learned nothing forgotten, learn again what is left of later nights, delete the rest.

    The rows wait as pending ones: where the night is refused or fails, any later one learns them. Called again after a crash,
    it goes on.

    Raises:
        NothingToLearn: no generation learned from a forgotten row.
        NotNow: a night is running.
        EdgeclError: the night failed; the earlier generation serves, and no row is lost.
    """
    with night_lock(learner.home):
        learner.finish_last_night()
        rebuild = plan(learner)
        if rebuild is None:
            raise NothingToLearn("no generation learned from a forgotten row; there is nothing to rebuild")
        with translated():
            restore(learner.generations.load(rebuild.start), learner.settings.base, learner.limits(), progress)
        learner.store.learn_again(rebuild.deleted)
        learner.generations.point(rebuild.start)
    try:
        with contextlib.suppress(NothingToLearn):
            rebuild.night = learner.adapt(progress=progress)
    finally:  # after the night: its number is then a new one
        for number in reversed(rebuild.deleted):  # a call that goes on finds the later ones by the earlier
            learner.generations.delete(number)
    return rebuild


def _trained_from(learner: Learner, learned: Collection[int]) -> list[int]:
    """Return these generations and those that were trained from one, on rows that it kept and what it wrote.

    Where a damaged manifest hides what one was trained from, it may be any earlier one.
    """
    generations, found = learner.generations, set[int]()
    numbers = {generations.hash_of(number): number for number in generations.numbers()}
    parents = {manifest.number: numbers.get(manifest.parent) for manifest in _manifests(learner)}
    for number in generations.numbers():
        parent = parents.get(number)
        is_hidden = number and parent is None
        if number in learned or parent in found or (is_hidden and any(n < number for n in learned)):
            found.add(number)
    return sorted(found)


def _manifests(learner: Learner) -> list[Manifest]:
    """Return the manifests of all generations that have a sound one, in order; without ids that are those of another store."""
    found, own = [], learner.store.number
    for number in learner.generations.numbers():
        with contextlib.suppress(GenerationError):
            manifest = learner.generations.load(number).manifest
            found.append(manifest if manifest.store in (0, own) else replace(manifest, learned=[], kept=[]))
    return found


def _text(example: Example) -> str:
    parts = [content for _, content in example.messages]
    return "\n".join([*parts, example.source, example.final or "", *(example.program or ())])
