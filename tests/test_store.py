"""replay.db: roles and quotas, all or nothing, old and newer schemas, what is left of deleted text, two writers at once."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from edgecl.data import Example
from edgecl.errors import DataError, StoreError
from edgecl.migrations import migrations
from edgecl.rows import Added, Scored, heldout_quota
from edgecl.store import Store

STEPS = [step.name for step in migrations.pending(Database(memory=True))]


def example(prompt: str | int, answer: str = "a", task: str = "t", **more: Any) -> Example:
    return Example((("user", f"q{prompt}"), ("assistant", answer)), task, **more)


def examples(n: int, start: int = 0, task: str = "t") -> list[Example]:
    return [example(i, task=task) for i in range(start, start + n)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replay.db"


def prompts(store: Store, role: str) -> list[str]:
    return [row.example.messages[0][1] for row in store.rows(role)]


def run_child(code: str, *arguments: object, n: int = 1) -> list[str]:
    """Run `code` in `n` processes at once; return what each wrote to stdout."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(n)]
    ends = [child.communicate(timeout=60) for child in children]
    assert all(child.returncode == 0 for child in children), [err[-800:] for _, err in ends]
    return [out for out, _ in ends]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_its_owners_alone_and_in_wal_mode(path: Path) -> None:
    with Store(path) as store:
        store.add(examples(1), 0.1)
        modes = {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()}
    assert modes == dict.fromkeys(["replay.db", "replay.db-wal", "replay.db-shm"], 0o600)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("pragma journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("stop_before", STEPS)
def test_a_file_of_every_earlier_schema_still_opens(path: Path, stop_before: str) -> None:
    has_examples = stop_before != STEPS[0]
    row = {"role": "pending", "task": "t", "messages": '[["user","old"],["assistant","a"]]', "prompt_hash": "p"}
    row["hash"] = "b5ee20fafe3c9d570467b98a80016fbf"  # what earlier versions made of these messages
    with closing(Database(path)) as old:
        migrations.apply(old, stop_before=stop_before)
        assert len(migrations.applied(old)) == STEPS.index(stop_before)
        if has_examples:
            old.table("examples").insert(row | {"created": "2025-01-01T00:00:00+00:00"})
    with Store(path) as store:
        assert prompts(store, "pending") == ["old"] * has_examples
        store.add(examples(1), 0.1)
        store.record_night(1, True, "", {})
        store.add_scores("g", [Scored("h", "t", True, 0.1, 2)])
    with Store(path) as store:
        assert len(store.nights()) == len(store.scores("g", ["h"])) == 1


def test_a_file_of_a_newer_edgecl_is_refused_and_left_as_it_is(path: Path) -> None:
    Store(path).close()
    with closing(Database(path)) as newer:
        newer.table("_sqlite_migrations").insert({"migration_set": "edgecl", "name": "m999_soon", "applied_at": ""})
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"written by a newer edgecl \(it has m999_soon\); update edgecl"):
        Store(path)
    assert path.read_bytes() == before


def test_what_is_not_a_database_is_refused_and_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"my diary, not a database. " * 100)
    with pytest.raises(StoreError, match=r"replay\.db: cannot be opened: file is not a database"):
        Store(path)
    assert path.read_bytes() == b"my diary, not a database. " * 100
    for place in (path.parent, path / "below.db", path.parent / "nowhere" / "replay.db"):
        with pytest.raises(StoreError, match="cannot be opened"):
            Store(place)


def test_a_damaged_page_is_a_store_error(path: Path) -> None:
    with Store(path) as store:
        store.add([example(i, "x" * 3000) for i in range(50)], 0.0)
    data = bytearray(path.read_bytes())
    half = len(data) // 2  # the schema lies in the first half
    data[half:] = b"\xa5" * (len(data) - half)
    path.write_bytes(data)
    with Store(path) as store, pytest.raises(StoreError, match=r"cannot be read: .*; restore it"):
        store.rows("pending")


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_nothing_is_written_to_a_file_that_nobody_would_read(path: Path, how: str) -> None:
    with Store(path) as store:
        store.add(examples(1), 0.1)
    copy = Path(shutil.copy(path, path.parent / "copy.db"))
    with Store(path) as store:
        if how == "replaced":
            copy.rename(path)
        else:
            path.unlink()
        for write in (lambda: store.add(examples(2), 0.1), lambda: store.record_night(1, True, "", {})):
            with pytest.raises(StoreError, match=r"replay\.db: was replaced; open it again, nothing was stored"):
                write()
    with Store(path) as store:
        assert store.add(examples(2), 0.1).added == (1 if how == "replaced" else 2)


# --- adding -----------------------------------------------------------------------------------------------------------


def test_what_judges_a_known_row_is_put_right(path: Path) -> None:
    wrong, right = example(0, final="6"), example(0, final="7")
    with Store(path) as store:
        store.add([wrong, example(1)], 0.1)
        store.add_scores("g", [Scored(e.hash, "t", True, 0.1, 3) for e in (wrong, example(1))])
        assert store.add([right], 0.1, replace=False) == Added(duplicates=1)
        assert store.rows("pending")[0].example == wrong
        assert store.add([right, example(1)], 0.1) == Added(duplicates=2)
        assert [row.example for row in store.rows("pending")] == [right, example(1)]
        assert store.scores("g", [right.hash, example(1).hash]).keys() == {example(1).hash}
        assert store.add([example(0)], 0.1) == Added(duplicates=1)
        assert store.rows("pending")[0].example == right, "what is not said changes nothing"
        store.drop("pending")
        store.add([example(1, final="1")], 0.1)
        assert not store.scores("g", [example(1).hash]), "nor is it judged as before when it comes back"


def test_duplicates_are_kept_once_whatever_their_task(path: Path) -> None:
    with Store(path) as store:
        assert store.add([*examples(3), example(0), example(1, task="u", source="s")], 0.1) == Added(added=3, duplicates=2)
        assert store.add(examples(4), 0.1) == Added(added=1, duplicates=3)
        assert prompts(store, "pending") == ["q0", "q1", "q2", "q3"]


@pytest.mark.parametrize("role", ["pending", "replay", "archive", "heldout"])
def test_the_newest_answer_replaces_the_older_one_in_any_role(path: Path, role: str) -> None:
    with Store(path) as store:
        store.add(examples(20), 0.1 if role == "heldout" else 0.0)
        ids = [row.id for row in store.rows("pending")]
        if role in ("replay", "archive"):
            store.settle(ids, ids if role == "replay" else [], 1, archive=True)
        victim = store.rows(role)[0].example
        corrected = Example((*victim.messages[:-1], ("assistant", "b")), "t")
        report = store.add([corrected], 0.0)
        assert (report.added, report.replaced) == (1, 1)
        assert victim not in [row.example for r in ("pending", "replay", "archive", "heldout") for row in store.rows(r)]
        assert corrected in [row.example for row in store.rows("pending")]


@pytest.mark.parametrize(
    ("n", "share", "quota"),
    [(0, 0.1, 0), (19, 0.5, 0), (20, 0.1, 2), (20, 0.001, 1), (199, 0.05, 10), (200, 0.01, 20), (200, 0.1, 20),
     (300, 0.1, 30), (1000, 0.0, 0), (20, 1.0, 20)],
)  # fmt: skip
def test_what_is_held_out_of_a_task(path: Path, n: int, share: float, quota: int) -> None:
    assert heldout_quota(n, share) == quota
    with Store(path) as store:
        report = store.add([*examples(n), *examples(5, start=5000, task="small")], share)
        assert report.heldout == quota
        counts = store.counts()
        assert counts["small"] == {"pending": 5, "replay": 0, "heldout": 0, "archive": 0}
        assert not n or counts["t"] == {"pending": n - quota, "replay": 0, "heldout": quota, "archive": 0}


def test_what_is_held_out_does_not_depend_on_the_order_and_never_becomes_pending(path: Path, tmp_path: Path) -> None:
    with Store(path) as store, Store(tmp_path / "other.db") as other:
        store.add(examples(100), 0.1)
        other.add(examples(100)[::-1], 0.1)
        held = prompts(store, "heldout")
        assert sorted(held) == sorted(prompts(other, "heldout"))
        store.add(examples(100), 0.1)  # once more
        store.add(examples(200, start=100), 0.1)
        ids = [row.id for row in store.rows("pending")]
        store.settle(ids, ids[:10], 1, archive=False)
        assert set(held) <= set(prompts(store, "heldout"))
        assert store.counts()["t"] == {"pending": 0, "replay": 10, "heldout": 21, "archive": 0}
        store.add(examples(20, start=300), 0.1)  # 20 new rows beside 21 that are held out: enough are
        assert len(prompts(store, "heldout")) == 21


def test_what_comes_one_by_one_is_all_for_learning(path: Path) -> None:
    with Store(path) as store:
        for one in examples(30):
            assert store.add([one], 0.5).heldout == 0
        assert store.add(examples(20, start=30), 0.1).heldout == 2
        assert {int(prompt[1:]) >= 30 for prompt in prompts(store, "heldout")} == {True}, "of those that came together"
        corrected = [Example((*example(i).messages[:-1], ("assistant", "b")), "t") for i in range(30, 50)]
        report = store.add([*corrected, *examples(20, start=30)], 0.1)  # each is replaced by what comes later
        assert (report.added, report.replaced, report.heldout, len(prompts(store, "heldout"))) == (40, 40, 2, 2)


def test_a_single_row_that_was_held_out_is_learned_and_taken_back_it_is_held_out_again(path: Path) -> None:
    with Store(path) as store:
        store.add(examples(20), 0.1)
        held, other = store.rows("heldout")
        before = store.find(held.example.prompt_hash)
        assert store.add([held.example], 0.1, replace=False) == Added(duplicates=1)
        assert store.add([held.example, held.example], 0.1) == Added(added=1, duplicates=1)
        assert store.rows("heldout") == [other] and held.id in [row.id for row in store.rows("pending")]
        assert store.take_back(held.example, before)
        assert store.rows("heldout") == [held, other] and len(store.rows("pending")) == 18


def test_what_a_night_learned_that_was_rolled_back_is_added_again(path: Path) -> None:
    with Store(path) as store:
        store.add(examples(4), 0.0)
        first, second, third, fourth = store.rows("pending")
        store.settle([first.id], [first.id], 1, archive=False)
        store.settle([second.id], [second.id], 2, archive=False)
        store.settle([third.id], [], 2, archive=True)
        assert store.add(examples(4), 0.0, undone=lambda: {2, 3}) == Added(added=2, duplicates=2)
        assert [row.id for row in store.rows("replay")] == [first.id]
        assert [row.generation for row in store.rows("pending")] == [None, None, None] and not store.rows("archive")
        assert fourth in store.rows("pending")
        store.settle([third.id], [third.id], 2, archive=False)
        other = Example((*third.example.messages[:-1], ("assistant", "b")), "t")
        assert store.add([third.example, other], 0.0, undone=lambda: {2}) == Added(added=1, duplicates=1, replaced=1), (
            "and corrected"
        )


def test_an_archived_row_that_is_given_again_is_added_again(path: Path) -> None:
    """A model may have lost it since; or it was too long for the context of then."""
    with Store(path) as store:
        store.add(examples(3), 0.0)
        learned, long, kept = store.rows("pending")
        store.settle([learned.id, kept.id], [kept.id], 1, archive=True)
        store.set_aside([long.id])
        assert store.add(examples(3), 0.0, replace=False) == Added(duplicates=3)
        assert store.add(examples(3), 0.0) == Added(added=2, duplicates=1)
        assert [row.id for row in store.rows("pending")] == [learned.id, long.id] and not store.rows("archive")


def test_a_store_has_a_number_of_its_own_for_good(path: Path, tmp_path: Path) -> None:
    with Store(path) as store, Store(tmp_path / "other.db") as other:
        number = store.number
        assert 0 != number != other.number != 0
        store.forget([], [])
    shutil.copy(path, tmp_path / "backup.db")
    with Store(path) as store, Store(tmp_path / "backup.db") as backup:
        assert store.number == backup.number == number


# --- settling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [False, True])
def test_learned_rows_are_kept_archived_or_deleted_and_a_second_call_changes_nothing(path: Path, archive: bool) -> None:
    with Store(path) as store:
        store.add(examples(6), 0.0)
        ids = [row.id for row in store.rows("pending")]
        for _ in range(2):
            store.settle(ids[:4], ids[:1], 7, archive)
            assert prompts(store, "pending") == ["q4", "q5"]
            assert prompts(store, "replay") == ["q0"]
            assert prompts(store, "archive") == (["q1", "q2", "q3"] if archive else [])
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("select generation from examples order by id").fetchone() == (7,)


def test_an_old_night_settled_again_never_takes_rows_that_came_later(path: Path) -> None:
    """A night that was killed is settled again the next evening; ids must not have come to mean other rows."""
    with Store(path) as store:
        store.add(examples(5), 0.0)
        learned = [row.id for row in store.rows("pending")]
        store.settle(learned, learned[:1], 1, archive=False)
        store.add(examples(5, start=50), 0.0)
        store.settle(learned, learned[:1], 1, archive=False)
        assert prompts(store, "pending") == ["q50", "q51", "q52", "q53", "q54"]


def test_a_correction_that_comes_during_the_night_is_not_settled_with_it(path: Path) -> None:
    with Store(path) as store, Store(path) as day:
        store.add(examples(3), 0.0)
        learned = [row.id for row in store.rows("pending")]
        day.add([example(2, "corrected")], 0.0)
        store.settle(learned, [], 1, archive=False)
        assert [row.example.answer for row in store.rows("pending")] == ["corrected"]


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_stores_nothing(path: Path) -> None:
    def then_fail() -> Any:
        yield example(1)
        raise KeyError("stop")

    with Store(path) as store:
        store.add(examples(1), 0.0)
        for rows, error in ((then_fail(), KeyError), ([example(2), example("\ud83d")], DataError)):
            with pytest.raises(error):
                store.add(rows, 0.0)
        assert prompts(store, "pending") == ["q0"]
        assert store.add([example(3)], 0.0).added == 1  # the store goes on


FULL_DISK = """
import resource, sys
from edgecl.data import Example
from edgecl.errors import StoreError
from edgecl.store import Store
with Store(sys.argv[1]) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        store.add([Example((("user", f"new{i}"), ("assistant", "x" * 1000))) for i in range(2000)], 0.1)
    except StoreError as error:
        print(error)
    print(len(store.rows("pending")))
"""


def test_a_full_disk_stores_nothing_and_loses_nothing(path: Path) -> None:
    with Store(path) as store:
        store.add(examples(19), 0.1)
    (out,) = run_child(FULL_DISK, path)
    message, n_pending = out.splitlines()
    assert message.startswith(f"{path}: failed: ") and message.endswith("; nothing was stored")
    assert n_pending == "19"
    with Store(path) as store:
        assert prompts(store, "pending") == [f"q{i}" for i in range(19)]
        assert store.add(examples(1, start=50), 0.1).added == 1


WRITER = """
import os, sys
from edgecl.data import Example
from edgecl.store import Store
with Store(sys.argv[1]) as store:
    for i in range(30):
        store.add([Example((("user", prompt), ("assistant", "a"))) for prompt in (f"{os.getpid()} {i}", str(i))], 0.0)
"""


def test_processes_that_open_and_write_at_once_lose_nothing(path: Path) -> None:
    run_child(WRITER, path, n=3)
    with Store(path) as store:
        assert len(store.rows("pending")) == 3 * 30 + 30


# --- what is left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["settled", "replaced", "dropped"])
@pytest.mark.parametrize("size", [40, 30_000])
def test_deleted_text_is_in_no_file_any_more(path: Path, how: str, size: int) -> None:
    secret = b"the-secret-" * (size // 11 + 1)
    with Store(path) as store:
        store.add([example("s", secret.decode()), *examples(50)], 0.0)
        assert secret[:22] in b"".join(p.read_bytes() for p in path.parent.iterdir())
        if how == "settled":
            store.settle([store.rows("pending")[0].id], [], 1, archive=False)
        elif how == "replaced":
            store.add([example("s", "a better answer")], 0.0)
        else:
            store.drop("pending")
        assert b"secret" not in b"".join(p.read_bytes() for p in path.parent.iterdir())
    assert b"secret" not in b"".join(p.read_bytes() for p in path.parent.iterdir())


# --- nights and scores ------------------------------------------------------------------------------------------------


def test_nights_and_scores_are_read_back_as_they_were(path: Path) -> None:
    good, other = Scored("h1", "t", True, 0.25, 3), Scored("h2", "t", False, 2.5, 4)
    with Store(path) as store:
        store.record_night(1, True, "", {"losses": {"before": 1.5}})
        store.record_night(None, False, "math: no gain", {})
        store.add_scores("draft a", [good, Scored("h3", "t", True, float("nan"), 1)])
        store.add_scores("draft b", [other])
        store.add_scores("base", [])
        store.rename_scores("draft a", "g1", "base")
        store.add_scores("g1", [Scored("h1", "t", False, 0.5, 3), other])  # scored again: the newest counts
        assert store.scores("g1", ["h1", "h2", "h3"]) == {"h1": Scored("h1", "t", False, 0.5, 3), "h2": other}
        assert store.scores("g1", ["h2"]) == {"h2": other}
        assert store.scores("draft b", ["h2"]) == store.scores("draft a", ["h1"]) == {}
        one, two = store.nights()
    assert (one["generation"], one["accepted"], one["report"]) == (1, True, {"losses": {"before": 1.5}})
    assert (two["generation"], two["accepted"], two["reason"]) == (None, False, "math: no gain")


def test_a_published_generation_leaves_the_scores_of_the_base_and_its_own(path: Path) -> None:
    generations = ("base", "g1", "draft a", "draft b")
    with Store(path) as store:
        for name in generations:
            store.add_scores(name, [Scored("h", "t", True, 0.5, 3)])
        store.rename_scores("draft a", "g2", "base")
        assert [name for name in (*generations, "g2") if store.scores(name, ["h"])] == ["base", "g2"]


def test_scores_of_a_row_are_found_without_reading_those_of_others(path: Path) -> None:
    Store(path).close()
    with closing(sqlite3.connect(path)) as other:
        (plan,) = other.execute("explain query plan delete from scores where hash = 'h'").fetchall()
    assert plan[-1].startswith("SEARCH")


def test_scores_of_a_refused_draft_are_not_taken_for_the_next_one(tmp_path: Path) -> None:
    with Store(tmp_path / "replay.db") as store:
        store.add_scores("draft .draft-1 model.gguf", [Scored("h", "t", True, 0.5, 3)])
        store.add_scores("published", [Scored("h", "t", True, 0.5, 3)])
        store.drop_draft_scores()
        assert store.scores("draft .draft-1 model.gguf", ["h"]) == {} and "h" in store.scores("published", ["h"])


def test_forgetting_takes_the_scores_of_rows_that_no_night_kept(path: Path) -> None:
    with Store(path) as store:
        store.add(examples(3), 0.0)
        rows = store.rows("pending")
        hashes = [row.example.hash for row in rows]
        store.add_scores("g", [Scored(hash_, "t", True, 0.1, 3) for hash_ in hashes] + [Scored("prose", "", True, 4.0, 0)])
        store.settle([rows[0].id], [], 1, archive=False)
        assert store.scores("g", hashes).keys() == set(hashes)
        store.forget([rows[0].id, rows[1].id], [])
        assert store.scores("g", [*hashes, "prose"]).keys() == {hashes[2], "prose"}
