"""Clocks that were set, several processes at once, names that lead elsewhere, and text that would drive a terminal."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from .house import CONTROL, House, Ran

YEAR = 365 * 24 * 3600
CLOCKS = (-3600, -YEAR, -55 * YEAR, YEAR, 75 * YEAR, -30 * YEAR)
CODES = "\x1b[2J\x1b]0;title\x07\x9b31m\x85[/b][red]\u202e:smile:"


def clock(house: House, i: int) -> None:
    """A day and a night under a clock that was set; the next night under the right one."""
    fault = f"clock:{CLOCKS[i]}"
    house.observe(2, fault=fault)
    house.run("adapt", "--json", fault=fault)
    house.after()


def at_once(house: House, i: int) -> None:
    """Two nights at once: one is told to come later; a chat, `status` and `observe` go on beside the other."""
    nights = [house.start("adapt", "--json") for _ in range(2)]
    n_turns = 0
    while any(night.poll() is None for night in nights):
        house.run("ask", "say 1", "--max-tokens", "3")
        house.run("status")
        house.observe(1)
        n_turns += 1
    ended = []
    for night in nights:
        out, err = night.communicate()
        ended.append(Ran(night.returncode, out.decode(), err.decode()))
    codes = sorted(ran.code for ran in ended)
    house.outcome.note(f"nights ended with {' and '.join(map(str, codes))}")
    house.outcome.note("turns of the chat meanwhile", n_turns)
    if codes[0] != 0 or codes[1] not in (0, 75):
        house.find(f"two nights at once: {[ran.err[-200:] for ran in ended]}")
    house.after()


# --- names that lead elsewhere ----------------------------------------------------------------------------------------


def _manifest(house: House, **changed: object) -> None:
    path = house.home / "generations/0002/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _precious(house: House) -> Path:
    path = house.folder / "precious.gguf"
    shutil.copy(next((house.home / "generations/0002").glob("model-*.gguf")), path)
    return path


def _refused(house: House) -> None:
    for command in (["status"], ["ask", "say 1"], ["adapt"]):
        house.run(*command, ok=(1,))
    house.run("rollback", "1")


def model_outside(house: House) -> None:
    """A manifest names a model outside of its folder: it is neither served nor, when it is old, deleted."""
    _manifest(house, model="../../../precious.gguf", files={"../../../precious.gguf": "0" * 64})
    _refused(house)
    house.next_night(), house.next_night()


def model_absolute(house: House) -> None:
    _manifest(house, model=str(house.folder / "precious.gguf"))
    _refused(house)


def files_outside(house: House) -> None:
    """A manifest lists files outside of its folder beside what serves: they are not touched."""
    path = house.home / "generations/0002/manifest.json"
    files = json.loads(path.read_text())["files"]
    _manifest(house, files=files | {"../../../precious.gguf": "0" * 64, "/etc/passwd": "0" * 64})
    house.run("ask", "say 1", "--max-tokens", "2")
    house.run("rollback", "1")


def link_outside(house: House) -> None:
    outside = house.folder / "outside/generations"
    shutil.copytree(house.home / "generations", outside)
    (house.home / "current").unlink()
    (house.home / "current").symlink_to(outside / "0001")
    _refused(house)


def home_is_a_link(house: House) -> None:
    house.home.rename(house.folder / "real")
    house.home.symlink_to(house.folder / "real")


def home_has_brackets(house: House) -> None:
    """A home whose name is markup and not even UTF-8."""
    strange = house.folder / "a [red]ü\udcff home"
    house.home.rename(strange)
    real, house.home = house.home, strange
    house.run("status")
    house.run("adapt", ok=(0,))
    house.home.rename(real)
    house.home = real


def lock_is_a_link(house: House) -> None:
    (house.home / "lock").unlink()
    (house.home / "lock").symlink_to(house.folder / "precious.gguf")
    house.run("adapt")


def draft_is_a_link(house: House) -> None:
    """A draft that is a link to a folder: the night removes the link, not what is in the folder."""
    (house.folder / "kept").mkdir()
    (house.folder / "kept/file").write_text("kept")
    (house.home / "generations/.draft-1").symlink_to(house.folder / "kept")
    house.run("adapt")
    if (house.folder / "kept/file").read_text() != "kept":
        house.find("a night emptied a folder outside")
    (house.home / "generations/.draft-1").unlink(missing_ok=True)


def folders_with_strange_names(house: House) -> None:
    for name in ("9999", "12 ", "²", "0x10", "-1", "٣", "00000000003"):
        (house.home / "generations" / name).mkdir()
    house.run("status")
    house.run("rollback", "3", ok=(1,))


def tasks_that_are_paths(house: House) -> None:
    rows = [
        {"prompt": f"t {name}", "completion": "x", "task": name} for name in ("../../x", "/etc/passwd", "a/b", "..", "--json")
    ]
    house.run("observe", "-", stdin="\n".join(map(json.dumps, rows)).encode())
    house.run("adapt", "--task", "../../x")
    house.run("adapt", "--task", "no such task", ok=(4,))


NAMES: tuple[Callable[[House], None], ...] = (
    model_outside, model_absolute, files_outside, link_outside, home_is_a_link, home_has_brackets, lock_is_a_link,
    draft_is_a_link, folders_with_strange_names, tasks_that_are_paths,
)  # fmt: skip


def names(house: House, i: int) -> None:
    """One name that leads elsewhere; what lies there stays as it was."""
    path = _precious(house)
    before = path.read_bytes()
    NAMES[i](house)
    if not path.exists() or path.read_bytes() != before:
        house.find(f"{NAMES[i].__name__}: a file outside of the home was changed")
    house.outcome.note(NAMES[i].__name__.replace("_", " "))
    house.after()


# --- text that would drive a terminal ---------------------------------------------------------------------------------


def control_codes(house: House, i: int) -> None:
    """Prompt, answer, task and bad lines full of control codes and markup: no command prints one, none fails on it."""
    rng = random.Random(f"codes {i}")
    task = "".join(c for c in CODES if c >= " " and c != "\x7f")  # others are refused, which is looked at below
    rows = [{"prompt": f"say {CODES} {k}", "completion": f"{CODES}{rng.choice(CODES)}", "task": f"{task}{k}"} for k in range(4)]
    bad = [
        '{"prompt": "x", "completion": "y", "task": "\\u001b[2J"}',
        CODES,
        '{"\\u001b[2J": 1}',
        '{"messages": [{"role": "\x9b31m"}]}',
    ]
    lines = "\n".join([*map(json.dumps, rows), *bad]).encode()
    (house.folder / f"{CODES.replace('/', '')}.jsonl").write_bytes(lines)
    house.run("observe", house.folder / f"{CODES.replace('/', '')}.jsonl")
    house.run("observe", house.folder / f"{CODES.replace('/', '')}.missing", ok=(1,))
    house.run("observe", "-", "--json", stdin=lines)
    house.run("adapt", "--dry-run"), house.run("adapt", "--dry-run", "--json")
    (house.run if i % 2 else lambda *rest: _on_terminal(house, *rest))("adapt")
    with closing(sqlite3.connect(house.home / "replay.db")) as db, db:
        db.execute("update nights set reason = ?", [f"reason {CODES}"])
    for command in (["status"], ["history"], ["eval"], ["ask", f"say {CODES} 1", "--max-tokens", "30"]):
        house.run(*command)
        house.run(*command, "--json")
    house.after()


def _on_terminal(house: House, *args: str) -> None:
    """Run a command whose stderr is a terminal: progress is drawn there."""
    mine, its = pty.openpty()
    process = house.start(*args, stderr=its)
    os.close(its)
    drain = threading.Thread(target=lambda: [*iter(lambda: _read(mine), b"")])
    drain.start()
    out = process.communicate()[0].decode("utf-8", "replace")
    drain.join()
    os.close(mine)
    if process.returncode or CONTROL.search(out):
        house.find(f"{args[0]} on a terminal: exit code {process.returncode}, {out[-200:]!r}")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody writes to it any more
        return b""
