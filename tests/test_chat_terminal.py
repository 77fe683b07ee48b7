"""`edgecl chat` as people meet it: typed at in a terminal of 80 by 24, with and without colour, and through a pipe."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parrot import make_home, publish_parrot

from edgecl.store import Store

pytestmark = pytest.mark.alone

MAIN = "from edgecl.cli import main; main()"
ENDLESS = "import edgecl.chat; edgecl.chat.ANSWER_TOKENS = 10**6; " + MAIN
DEADLINE_S = 90
ANSWER = "yes ☃!"


class Screen:
    """A terminal of 80 by 24 with one program in it."""

    def __init__(self, home: Path, code: str = MAIN, *options: str, **environment: str) -> None:
        self._socket = f"edgecl-{uuid.uuid4().hex[:12]}"
        self._config = home.parent / "tmux.conf"
        self._config.write_text("set -g remain-on-exit on\nset -g default-terminal screen\n")
        path = os.pathsep.join(sys.path)
        program = ["env", f"PYTHONPATH={path}", *(f"{key}={value}" for key, value in environment.items())]
        program += [sys.executable, "-c", code, "--home", str(home), "chat", *options]
        self._exit_code = home.parent / f"{self._socket}.exit"  # tmux 3.3 does not always learn it: the program stays a zombie
        then = f'trap : INT; "$@"; printf %s "$?" > {shlex.quote(str(self._exit_code))}'
        self.tmux("new-session", "-d", "-x", "80", "-y", "24", shlex.join(["sh", "-c", then, "sh", *program]))

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-L", self._socket, "-f", str(self._config), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"LC_ALL": "C.UTF-8"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def text(self, *options: str) -> str:
        """All that was printed, escape sequences included with -e."""
        return self.tmux("capture-pane", "-p", "-S", "-1000", *options)

    def key(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)
        self.key("Enter")

    def wait(self, text: str, n: int = 1) -> str:
        """Wait until `text` was printed `n` times."""
        return self._until(lambda: self.text().count(text) >= n, f"{n} times {text!r}")

    def wait_end(self) -> str:
        """Wait until the program has left; return its exit code, 128 and more where a signal ended it."""
        self._until(lambda: self._exit_code.exists() and self._exit_code.read_text(), "the end")
        return self._exit_code.read_text()

    def _until(self, is_so: Any, what: str) -> str:
        end = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < end, f"waited for {what}; the screen has:\n{self.text()}"
            time.sleep(0.02)
        return self.text()

    def close(self) -> None:
        self.tmux("kill-server")


@pytest.fixture
def screens() -> Iterator[list[Screen]]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path, ANSWER)


def stored(home: Path) -> list[tuple[str, tuple[str, ...]]]:
    """What waits to be learned: the task, and what was said."""
    with Store(home / "replay.db") as store:
        rows = store.rows("pending")
    return [(row.example.task, tuple(content for _, content in row.example.messages)) for row in rows]


def test_a_chat_from_hello_to_quit(home: Path, screens: list[Screen]) -> None:
    screen = Screen(home)
    screens.append(screen)
    screen.wait("generation 0 answers; /help")
    screen.type("hello")
    screen.wait(f"> hello\n{ANSWER}\n>")
    screen.type("/good")
    screen.wait("kept for the next night, task default\n>")
    assert stored(home) == [("default", ("hello", ANSWER))]

    screen.type("/task garden")
    screen.wait("task garden\n>")
    screen.type("who waters\\")
    screen.wait("\n.")
    screen.type("the plants?")
    screen.wait(ANSWER, 2)
    screen.type("/fix Mira,\\")
    screen.type("on Fridays.")
    screen.wait("kept for the next night, task garden")
    chat = ("hello", ANSWER, "who waters\nthe plants?", "Mira,\non Fridays.")
    assert stored(home) == [("default", chat[:2]), ("garden", chat)]
    screen.type("/undo")
    screen.wait("taken back\n>")
    assert stored(home) == [("default", chat[:2])]

    screen.type("/status")
    text = screen.wait("turns       2, of which 0")
    assert "this chat   generation 0 answers, task garden" in text and "last night  there was none yet" in text
    publish_parrot(home, "no")
    screen.type("again?")
    screen.wait("generation 1 answers from here on; it was 0\nno\n>")
    screen.type("/model 0")
    screen.wait("generation 0 answers in this chat only")
    screen.type("and now?")
    screen.wait(f"> and now?\n{ANSWER}\n>")

    screen.type("/nonsense")
    screen.wait("edgecl: /nonsense is no command; /help lists them")
    screen.type("/model 7")
    screen.wait("edgecl: there is no generation 7")
    screen.type("/help")
    screen.wait("Nothing is learned but what /good and /fix keep.")
    screen.type("/quit")
    assert screen.wait_end() == "0"
    assert stored(home) == [("default", chat[:2])]
    assert all(len(line) <= 80 for line in screen.text("-J").splitlines() if str(home) not in line)


def test_a_pasted_text_is_one_message_and_lines_can_be_edited(home: Path, screens: list[Screen]) -> None:
    screen = Screen(home)
    screens.append(screen)
    screen.wait("generation 0 answers")
    screen.tmux("set-buffer", "first line\n/good\nlast line")
    screen.tmux("paste-buffer", "-p")
    screen.wait("last line")
    assert ANSWER not in screen.text()
    screen.key("Enter")
    screen.wait(ANSWER)
    screen.key("Up")
    screen.wait("last line", 2)
    screen.key("C-u")
    screen.type("/good")
    screen.wait("kept for")
    assert stored(home) == [("default", ("first line\n/good\nlast line", ANSWER))]
    screen.key("C-d")
    assert screen.wait_end() == "0"


def test_without_colour_and_control_codes_a_paste_is_one_message_too(tmp_path: Path, screens: list[Screen]) -> None:
    home = make_home(tmp_path, "a\x1b[31mb\x07c")
    screen = Screen(home, TERM="dumb", NO_COLOR="1")
    screens.append(screen)
    screen.wait("generation 0 answers")
    screen.tmux("set-buffer", "first line\nlast line")
    screen.tmux("paste-buffer", "-p")
    screen.wait("last line")
    screen.key("Enter")
    screen.wait("a\ufffd[31mb\ufffdc")
    screen.type("/good")
    screen.wait("kept for")
    assert [messages[0] for _, messages in stored(home)] == ["first line\nlast line"]
    screen.type("/status")
    screen.wait("turns       1, of which 0")
    assert "\x1b" not in screen.text("-e")


def test_notes_are_dim_where_the_terminal_can(home: Path, screens: list[Screen]) -> None:
    screen = Screen(home)
    screens.append(screen)
    screen.wait("generation 0 answers")
    assert "\x1b[2m" in screen.text("-e")
    plain = Screen(home, NO_COLOR="1")
    screens.append(plain)
    plain.wait("generation 0 answers")
    assert "\x1b[2m" not in plain.text("-e")


def test_ctrl_c_interrupts_an_answer_and_then_leaves(tmp_path: Path, screens: list[Screen]) -> None:
    home = make_home(tmp_path, "abc", is_endless=True, n_ctx=120_000)
    screen = Screen(home, ENDLESS)
    screens.append(screen)
    screen.wait("generation 0 answers")
    screen.type("hello")
    screen.wait("abcabc")
    screen.key("C-c")
    screen.wait("interrupted; Ctrl-C again leaves")
    screen.type("/good")
    screen.wait("edgecl: the last answer was cut off")
    screen.type("/fix abc")
    screen.wait("kept for the next night, task default\n>")  # readline loses a signal before it waits for a key
    screen.key("C-c")
    screen.wait("interrupted; Ctrl-C again leaves\n>", 2)
    screen.key("C-c")
    assert screen.wait_end() == "0"
    assert [messages[-1] for _, messages in stored(home)] == ["abc"]


# --- through a pipe ---------------------------------------------------------------------------------------------------


def pipe(home: Path, data: bytes, *options: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "--home", str(home), "chat", *options],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_lines_go_in_and_answers_come_out(home: Path) -> None:
    lines = b"one\r\n\ntwo \\\nlines\n/good\n/fix no\n/undo\n /etc is a folder\n/etc/passwd too\nthe end"
    code, out, error = pipe(home, lines, "--task", "garden")
    assert (code, out) == (0, f"{ANSWER}\n" * 5)
    assert error.splitlines() == [
        "kept for the next night, task garden",
        "kept for the next night in place of an older answer, task garden",
        "taken back, the older answer is back",
    ]
    assert stored(home) == [("garden", ("one", ANSWER, "two \nlines", ANSWER))]


def test_a_row_that_a_night_has_only_claimed_is_not_said_to_be_learned(home: Path) -> None:
    command = [sys.executable, "-c", MAIN, "--home", str(home), "chat"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, **pipes) as one:
        assert one.stdin and one.stderr
        one.stdin.write(b"one\n/good\n")
        one.stdin.flush()
        assert one.stderr.readline().startswith(b"kept for the next night")
        with Store(home / "replay.db") as store:
            store.claim([row.id for row in store.rows("pending")], 1)
        assert one.communicate(b"/undo\n", timeout=DEADLINE_S)[1] == b"taken back\n"


def test_each_answer_is_an_object_with_json(home: Path) -> None:
    code, out, _ = pipe(home, b"one\n/status\ntwo\n", "--json")
    first, status, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and first == second == {"answer": ANSWER, "generation": 0, "is_whole": True}
    assert status["generation"] == 0 and status["chat"]["turns"] == 1
    code, out, error = pipe(home, b"x" * 4000 + b"\none\n", "--json")
    failed, answered = (json.loads(line) for line in out.splitlines())
    assert code == 1 and error == f"edgecl: {failed['error']}\n" and answered == first


def test_what_cannot_be_done_is_one_line_each_and_the_rest_goes_on(home: Path) -> None:
    bad = {
        b"/good": "ask something first",
        b"/Good": "ask something first",
        b"/undo": "nothing was accepted",
        b"/good morning": "/good takes nothing behind it, got morning",
        b"/fix": "the right answer is missing",
        b"/foo": "/foo is no command",
        b"/model x": "the number of a generation, got x",
        b"/model 3": "there is no generation 3",
        b"\xff\xfe": "not UTF-8",
        b"x" * 4000: "the context has room for",
    }
    code, out, error = pipe(home, b"\n".join([*bad, b"one", b"/quit", b"two"]))
    assert (code, out) == (1, f"\n\n{ANSWER}\n"), "an empty line for each message without an answer"
    lines = error.splitlines()
    assert len(lines) == len(bad) and all(line.startswith("edgecl: ") for line in lines)
    assert all(word in line for word, line in zip(bad.values(), lines, strict=True))
    assert stored(home) == []
    assert pipe(home, b"")[:2] == (0, "")
    code, _, error = pipe(home, b"one\n", "--task", "")
    assert code == 1 and error == "edgecl: task must be 1 to 100 printable characters, got ''\n"
