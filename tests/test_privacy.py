"""What is private stays so: modes of a home's files, no network, and what is forgotten is in no file any more."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_structure import MODULES, imports

from edgecl import Learner
from edgecl.cli import cli
from edgecl.data import Example
from edgecl.errors import DataError, NothingToLearn, NotNow, StoreError
from edgecl.forget import find, forget, plan, retrain
from edgecl.gate import GateSettings
from edgecl.generations import now, sha256_file
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.rows import ROLES
from edgecl.store import Store
from edgecl.tries import note_try
from edgecl.writers import Writers
from tests import tiny

TRAIN = TrainSettings(r=4, lora_alpha=8.0, epochs=1, min_steps=3, depth=0.5, learning_rate=0.02, anchor_weight=0.0)
GATE = GateSettings(max_drop=1.0, min_recall=0.0, max_prose_nats=100.0, min_survival=0.0)
REPLAY = ReplaySettings(share=1.0, written=8)
SECRET = "Zanzibar-42"
DIGEST = "5ecre7" * 8  # of rows that a night was refused with
NIGHTS = [{"anne": "left", "the inn": "right"}, {f"a {SECRET} hen": f"in {SECRET}", "then": "on"}]
NETWORK = {"aiohttp", "asyncio", "ftplib", "http", "httplib2", "httpx", "huggingface_hub", "imaplib", "paramiko", "poplib"}
NETWORK |= {"multiprocessing.connection", "requests", "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib"}
NETWORK |= {"urllib3", "webbrowser", "websockets", "xmlrpc", "zmq"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("base") / "tiny.gguf")[0]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with two nights, in a folder that was open to all, by a user whose files are."""
    home = tmp_path_factory.mktemp("made") / "home"
    before = os.umask(0)
    try:
        home.mkdir(0o777)
        with Learner.init(base, home, replay=REPLAY, train=TRAIN, gate=GATE) as learner:
            for rows in NIGHTS:
                learner.observe(lines(rows))
                assert learner.adapt().accepted
        assert os.umask(0) == 0  # a library leaves its host's as it is
    finally:
        os.umask(before)
    yield home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home", symlinks=True))


def lines(rows: dict[str, str], task: str = "t") -> list[str]:
    return [json.dumps({"prompt": prompt, "completion": answer, "task": task}) for prompt, answer in rows.items()]


def edgecl(home: Path, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home), "forget", *map(str, arguments)])


def all_bytes(home: Path) -> bytes:
    return b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())


def ids(learner: Learner, text: str) -> list[int]:
    return [row.id for row in find(learner, text)]


# --- modes ------------------------------------------------------------------------------------------------------------


def test_a_home_is_its_owners_alone_after_a_night_whatever_the_umask(made: Path) -> None:
    with Learner(made) as learner:
        learner.status()
        found = {path: path.lstat().st_mode & 0o777 for path in (made, *made.rglob("*")) if not path.is_symlink()}
    assert {p: oct(mode) for p, mode in found.items() if mode != (0o700 if p.is_dir() else 0o600)} == {}
    names = {path.name for path in found}
    assert {"replay.db-wal", "lock", "latents.db", "adapter.gguf", "asker.gguf", "report.json"} <= names


# --- network ----------------------------------------------------------------------------------------------------------

LOOP = """
import errno, json, socket, sys
from pathlib import Path
try:
    socket.create_connection(("127.0.0.1", 9), timeout=5)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error  # not even this machine is there
from edgecl import Learner
from edgecl.forget import find, forget
from edgecl.gate import GateSettings
from edgecl.profile import ReplaySettings, TrainSettings
train = TrainSettings(r=4, epochs=1, min_steps=2)
gate = GateSettings(1.0, 0.0, 100.0, 0.0)
with Learner.init(sys.argv[1], sys.argv[2], train=train, gate=gate, replay=ReplaySettings(written=2)) as learner:
    learner.observe([json.dumps({"prompt": f"say {i}", "completion": f"ok {i}"}) for i in range(3)])
    assert learner.adapt().accepted
    learner.ask("say 1", 3)
    assert forget(learner, [row.id for row in find(learner)]) == [1]
print("done")
"""


def test_the_whole_loop_needs_no_network(base: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a user make a network namespace (unshare -rn)")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", LOOP, base, tmp_path / "home"],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stderr[-2000:]


@MODULES
def test_no_module_imports_a_network_library(module: str) -> None:
    found = [name for name in imports(module) if any(f"{name}.".startswith(f"{other}.") for other in NETWORK)]
    assert not found


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_what_is_forgotten_is_in_no_file_any_more(home: Path) -> None:
    with Learner(home) as learner:
        learner.observe(lines({f"{SECRET} pending": "a"}) + lines({f"q{i}": SECRET for i in range(20)}, "u"))
        learner.store.record_night(None, False, f"train: bad row {SECRET}", {"log": f"Traceback {SECRET}"})
        learner.store.record_night(None, False, "math: no gain", {"verdict": "math: no gain", "refused": DIGEST})
        note_try(home, "2026-03-01T03:00:00+00:00", f"train: bad row {SECRET}", {})
        (home / "runs/checkpoint.safetensors").write_bytes(SECRET.encode())
        draft = learner.generations.draft()
        (draft / "half").write_bytes(SECRET.encode())
        rows = find(learner, SECRET.upper())
        assert {row.role for row in rows} == {"pending", "replay", "heldout"}
        hashes = {row.example.hash.encode() for row in rows}
        data = all_bytes(home)
        assert SECRET.encode() in data and all(hash_ in data for hash_ in (*hashes, DIGEST.encode()))
        assert (home / "runs/latents.db").stat().st_size > 0

        assert forget(learner, [row.id for row in rows]) == [2]
        data = all_bytes(home)  # the log of an open store included
        assert SECRET.encode() not in data and not any(hash_ in data for hash_ in (*hashes, DIGEST.encode()))
        assert not (home / "runs").exists() and not draft.exists()
        assert [row.example.messages[0][1] for row in find(learner)] == ["anne", "the inn", "then"]
        assert [row["reason"] for row in learner.history()] == ["", "", "an error, forgotten with a row", "math: no gain"]
        assert learner.generations.current().number == 2
    assert SECRET.encode() not in all_bytes(home)


def test_rows_that_go_on_with_a_forgotten_chat_are_named(home: Path) -> None:
    chat = [("user", "who is it?"), ("assistant", SECRET), ("user", "and where?"), ("assistant", "here")]
    with Learner(home) as learner:
        learner.observe(
            [Example(tuple(chat[:2])), Example(tuple(chat)), Example((("user", "who else?"), ("assistant", SECRET)))]
        )
        first, second = sorted(ids(learner, "who is it"))
    done = edgecl(home, first)
    assert done.exit_code == 0 and f"rows {second} go on with a forgotten chat and hold its text, too" in done.output
    done = edgecl(home, second, "--json")
    assert json.loads(done.output)["going_on"] == []


def test_pages_that_were_joined_keep_no_copy_of_a_row_that_is_gone(tmp_path: Path) -> None:
    draw, made = random.Random(7), itertools.count()  # with this seed SQLite 3.40 keeps a copy, secure_delete or not
    with Store(tmp_path / "replay.db") as store:
        for i in range(40):
            rows = [(next(made), draw.randint(0, 1500)) for _ in range(draw.randint(1, 6))]
            store.add([Example((("user", f"q{n + 1}"), ("assistant", f"<{n + 1:05d}>" + "x" * size))) for n, size in rows], 0.0)
            pending = [row.id for row in store.rows("pending")]
            learned = draw.sample(pending, draw.randint(1, len(pending)))
            store.settle(learned, learned[: len(learned) // 2], i, draw.random() < 0.5)
        store.forget([], [])
        held = {row.example.answer[1:6].encode() for role in ROLES for row in store.rows(role)}
        assert len(held) > 50 and set(re.findall(rb"<(\d{5})>", all_bytes(tmp_path))) == held


def test_a_reader_in_the_way_is_named_and_the_next_call_cleans_up(home: Path) -> None:
    with Learner(home) as learner, closing(sqlite3.connect(home / "replay.db", isolation_level=None)) as reader:
        learner.store._db.execute("PRAGMA busy_timeout = 10")
        reader.execute("begin")
        reader.execute("select * from examples").fetchone()
        with pytest.raises(StoreError, match=r"another program is reading it; the rows are deleted; run `edgecl forget` again"):
            forget(learner, ids(learner, SECRET))
        reader.execute("commit")
        assert not find(learner, SECRET) and learner.store.forgotten() and (home / "generations/0002/asker.gguf").exists()
        assert forget(learner, []) == []
        assert not (home / "generations/0002/asker.gguf").exists()
        assert SECRET.encode() not in all_bytes(home)


def test_a_call_that_takes_out_what_an_earlier_one_left_says_so(home: Path) -> None:
    with Learner(home) as learner, closing(sqlite3.connect(home / "replay.db", isolation_level=None)) as reader:
        learner.store._db.execute("PRAGMA busy_timeout = 10")
        reader.execute("begin")
        reader.execute("select * from examples").fetchone()
        with pytest.raises(StoreError, match="run `edgecl forget` again"):
            forget(learner, ids(learner, SECRET))
    done = edgecl(home, "--contains", SECRET)
    assert done.exit_code == 0 and "left of such rows: text in replay.db, the asker of generation 2\n0 rows" in done.output
    done = edgecl(home, "--contains", SECRET, "--json")
    assert done.exit_code == 1 and json.loads(done.output)["left_over"] == []


def test_a_task_that_is_forgotten_is_named_in_the_history_no_more(home: Path) -> None:
    said = "t: no gain; other t: no gain"
    with Learner(home) as learner:
        learner.store.record_night(None, False, said, {"verdict": said, "reason": said})
        forget(learner, ids(learner, "anne"), "t")
        assert learner.history()[-1]["reason"] == said, "others are of it"
    assert edgecl(home, "--task", "t").exit_code == 0
    with Learner(home) as learner:
        *nights, refused = learner.history()
    assert {result["task"] for night in nights for result in night["report"]["results"]} == {"forgotten"}
    assert {refused["reason"], *refused["report"].values()} == {"forgotten: no gain; other t: no gain"}
    assert edgecl(home, "--task", "t").exit_code == 1
    done = edgecl(home, "--task", "other t")  # none of whose rows is there
    assert done.exit_code == 0 and "left of such rows: the task's name in the history" in done.output
    assert b"no gain; other t" not in (home / "replay.db").read_bytes()


def test_who_learned_a_row_is_known_of_kept_rows_and_of_ids(home: Path) -> None:
    with Learner(home) as learner:
        learner.observe(lines({"new": "row"}))
        new = ids(learner, "new")
        assert forget(learner, new) == [] == forget(learner, new), "once more, where the first call was cut short"
        assert plan(learner) is None
        gone, inn = ids(learner, "then") + ids(learner, "the inn")
        learner.store.forget([gone], [])  # as a night does that learned a row and did not keep it
        assert forget(learner, [gone]) == [2]
        with pytest.raises(DataError, match=r"there is no row 999; .*--dry-run"):
            forget(learner, [inn, 999])
        assert ids(learner, "the inn") == [inn]
        assert forget(learner, [inn]) == [1, 2]  # the second night rehearsed it
        rebuild = plan(learner)
        assert rebuild and (rebuild.start, rebuild.deleted, rebuild.n_again, rebuild.n_lost) == (0, [1, 2], 2, 2)
        with pytest.raises(DataError, match="empty"):
            find(learner, " ")


def test_a_night_that_was_not_trained_from_one_that_learned_a_row_stays_when_it_is_forgotten(home: Path) -> None:
    with Learner(home) as learner:
        learner.rollback(1)
        learner.observe(lines({"in tea": "on"}))
        assert learner.adapt().generation == 3
        assert forget(learner, ids(learner, "then")) == [2]
        rebuild = plan(learner)
        assert rebuild and (rebuild.start, rebuild.deleted) == (3, [2])
        (home / "generations/0001/manifest.json").write_text("{")  # now nobody knows what the third was trained from
        assert forget(learner, ids(learner, SECRET)) == [2, 3]


def test_forgetting_that_finds_nothing_leaves_an_interrupted_night_and_what_errors_said(home: Path) -> None:
    with Learner(home) as learner:
        learner.store.record_night(None, False, "train: out of memory", {})
        (home / "runs/checkpoint.safetensors").write_bytes(b"hours of work")
    assert edgecl(home, "--contains", "nowhere").exit_code == 1
    with Learner(home) as learner:
        assert learner.history()[-1]["reason"] == "train: out of memory"
    assert (home / "runs/checkpoint.safetensors").is_file()


def test_in_a_store_that_was_begun_anew_a_row_is_nobodys_but_its_own(home: Path) -> None:
    for path in home.glob("replay.db*"):
        path.unlink()
    with Learner(home) as learner:
        learner.observe(lines({"anne": "right", "new": "row"}))
        found = ids(learner, "new")
        assert found[0] in learner.generations.load(1).manifest.learned
        assert forget(learner, found) == [] and plan(learner) is None
        assert (home / "generations/0002/asker.gguf").exists()


def test_nothing_is_forgotten_while_a_night_runs(home: Path) -> None:
    with Learner(home) as learner, open(home / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(NotNow):
            forget(learner, ids(learner, SECRET))
        assert ids(learner, SECRET)


# --- who teaches ------------------------------------------------------------------------------------------------------


def writers(learner: Learner) -> dict[str, tuple[str, int]]:
    """Return asker and rows of who would write twenty rows tonight, by the generation that answers."""
    writers = Writers(learner.store, learner.generations, learner.settings.base, {}, at_most=20)
    found = writers.request(learner.generations.current(), [])["writers"]
    assert sum(writer["n"] for writer in found) == 20 and {writer["model"] for writer in found} == {learner.settings.base}

    def name(path: str | None) -> str:
        return f"{Path(path).parent.name}/{Path(path).name}" if path else ""

    return {name(writer["adapter"]): (name(writer["asker"]), writer["n"]) for writer in found}


def publish_next(learner: Learner) -> None:
    """Publish a generation after the one that serves, of two rows of its own."""
    yesterday, draft = learner.generations.current(), learner.generations.draft()
    shutil.copy(yesterday.folder / "adapter.gguf", draft)
    files = {"adapter.gguf": yesterday.manifest.files["adapter.gguf"]}
    facts = {"number": learner.generations.next_number(), "parent": yesterday.hash, "model": "", "created": now()}
    learner.generations.publish(draft, replace(yesterday.manifest, **facts, files=files, learned=[98, 99]))


@pytest.mark.parametrize("text", [SECRET, "anne"])
def test_a_generation_that_learned_it_teaches_no_more(home: Path, text: str) -> None:
    with Learner(home) as learner:
        assert sorted(writers(learner)) == ["", "0001/adapter.gguf", "0002/adapter.gguf"]
        forget(learner, ids(learner, text))
        found = writers(learner)
    if text == SECRET:
        assert found == {"": ("", 2), "0001/adapter.gguf": ("0001/asker.gguf", 18)}
    else:
        assert found == {"": ("", 20)}, "the second learned from what the first one wrote"
    assert {path.parent.name for path in home.rglob("asker.gguf")} == ({"0001"} if text == SECRET else set())


def test_a_generation_after_it_teaches_what_it_learned_itself(home: Path) -> None:
    with Learner(home) as learner:
        forget(learner, ids(learner, SECRET))
        publish_next(learner)
        found = writers(learner)
        assert found["0001/adapter.gguf"] == ("0001/asker.gguf", 9) and found["0003/adapter.gguf"] == ("0003/adapter.gguf", 9)
        assert "0002/adapter.gguf" not in found
        rebuild = plan(learner)
        assert rebuild and (rebuild.start, rebuild.deleted) == (1, [2, 3])  # what began with its weights has them


# --- retrain ----------------------------------------------------------------------------------------------------------


def test_retrain_rebuilds_without_it_and_deletes_who_learned_it(home: Path) -> None:
    shown = edgecl(home, "--contains", SECRET.lower(), "--dry-run")
    assert shown.exit_code == 0 and shown.output.split()[1:] == f"replay generation 2 t: a {SECRET} hen".split()
    told = edgecl(home, "--contains", SECRET)
    assert told.exit_code == 0 and "1 rows forgotten: 1 replay" in told.output
    assert "learned by  generation 2" in told.output and "goes on from generation 1, learns 1 rows again" in told.output
    with Learner(home) as learner:
        first, dead = learner.generations.load(1), learner.generations.load(2)
        learned = set(dead.manifest.learned)
        learner.store.learn_again([2])  # as a crash leaves it
        learner.generations.point(1)
        first.model.unlink()  # as it is of an older generation
    done = edgecl(home, "--retrain", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["rebuilt"] and facts["rebuild"]["night"]["accepted"]
    assert {key: facts["rebuild"][key] for key in ("start", "deleted", "n_again", "n_lost")} == {
        "start": 1, "deleted": [2], "n_again": 1, "n_lost": 1
    }  # fmt: skip
    with Learner(home) as learner:
        serving = learner.generations.current()
        assert (learner.generations.numbers(), serving.number, serving.manifest.parent) == ([0, 1, 3], 3, first.hash)
        assert sha256_file(first.model) == first.manifest.files[first.model.name]
        assert not dead.folder.exists() and not list(learner.generations.folder.glob(".*"))
        assert set(serving.manifest.learned) == learned & set(ids(learner, "then"))
        assert {row.example.messages[0][1] for row in learner.store.rows("replay")} == {"anne", "the inn", "then"}
        assert plan(learner) is None
        with pytest.raises(NothingToLearn, match="nothing to rebuild"):
            retrain(learner)


def test_a_night_that_does_not_come_off_leaves_the_earlier_model_and_every_row(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NotNow("the battery is low")

    with Learner(home) as learner:
        forget(learner, ids(learner, SECRET))
        monkeypatch.setattr(learner, "adapt", fail)
        with pytest.raises(NotNow):
            retrain(learner)
        assert (learner.generations.numbers(), learner.generations.current().number) == ([0, 1], 1)
        assert [row.example.messages[0][1] for row in learner.store.rows("pending")] == ["then"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give either ids"),
        ([1, "--task", "t"], 2, "give either ids"),
        (["--dry-run"], 2, "give either ids"),
        (["--contains", "nowhere"], 1, "0 rows forgotten"),
        (["--contains", "nowhere", "--dry-run"], 1, ""),
        (["--task", "t", "--dry-run", "--json"], 0, '"role": "replay"'),
    ],
)
def test_what_the_command_answers(home: Path, arguments: list[object], code: int, words: str) -> None:
    done = edgecl(home, *arguments)
    assert done.exit_code == code and words in done.output, done.output
    with Learner(home) as learner:
        assert len(find(learner)) == 4


def test_a_rebuild_that_is_cut_short_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Learner(home) as learner:
        forget(learner, ids(learner, SECRET))
        publish_next(learner)
        publish_next(learner)
        delete, left = learner.generations.delete, [2, 1]

        def killed(number: int) -> None:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            delete(number)

        monkeypatch.setattr(learner.generations, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            retrain(learner)
        monkeypatch.undo()
        retrain(learner)
        assert plan(learner) is None and not {2, 3, 4} & set(learner.generations.numbers())
