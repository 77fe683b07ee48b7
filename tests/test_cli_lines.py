"""What the terminal app says, line by line: at a terminal and through a pipe, with nothing on stdin, and when it fails."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from parrot import make_home

from edgecl import Learner
from edgecl.cli.day import print_status
from edgecl.cli.night import print_report
from edgecl.errors import SettingError
from edgecl.night import AdaptReport
from edgecl.train.loop import TrainReport
from edgecl.tries import note_try
from tests.test_cli import EDGECL, environment, lines, one_line, run

REASON = "the answer loss of task garden rose by more than the gate allows, so yesterday's model serves on and on"
ENDLESS = "abc"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose model says abc until it is cut off."""
    return make_home(tmp_path_factory.mktemp("made"), ENDLESS, is_endless=True)


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home", symlinks=True))


# --- when it fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "code"), [(("observe", "-"), 1), (("chat",), 0)])
def test_a_closed_stdin_is_an_empty_one(home: Path, verb: tuple[str, ...], code: int) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *EDGECL, "--home", str(home), *verb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == code and len(done.stderr.splitlines()) == code, done.stderr


def test_a_defect_is_one_line_that_says_where(home: Path) -> None:
    broken = "from edgecl.learner import Learner; Learner.status = lambda _: {}['two\\nlines']; "
    command = [sys.executable, "-c", broken + EDGECL[-1], "--home", str(home), "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr, "edgecl: KeyError: 'two\\nlines' (cli/day.py:", "please report"), done.stderr


# --- lines ------------------------------------------------------------------------------------------------------------


def test_what_was_stored_is_said_in_short_lines_and_only_what_there_is(home: Path) -> None:
    assert run(home, "observe", "-", stdin=lines(1))[1] == "1 stored, 0 known already, 0 bad\n"
    said = run(home, "observe", "-", stdin=lines(40))[1].splitlines()
    assert said == ["39 stored, 1 known already, 0 bad", "4 of the task's rows are newly held out, to measure with"]
    other = json.dumps({"prompt": "say 0", "completion": "another", "task": "echo"}).encode()
    assert "1 of them in place of an older answer" in run(home, "observe", "-", stdin=other)[1].splitlines()


def at_a_terminal(home: Path, columns: int, *args: str) -> list[str]:
    """Return the lines that a terminal of so many columns gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    size = {"COLUMNS": str(columns), "TERM": "xterm"}
    command = [*EDGECL, "--home", str(home), *args]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment() | size) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 4096):
                seen += piece
        except OSError:  # the other side is closed
            pass
        assert process.wait(300) == 0
    os.close(ours)
    return seen.decode().splitlines()


def test_lines_break_between_words_at_a_terminal_and_nowhere_in_a_pipe(home: Path) -> None:
    with Learner(home) as learner:
        learner.store.record_night(None, False, REASON, {"started": "2026-11-29T20:15:09+00:00"})
    whole = run(home, "status")[1].splitlines()
    assert any(line.endswith(f"refused: {REASON}") for line in whole)
    broken = at_a_terminal(home, 40, "status")
    assert all(len(line) <= 40 for line in broken) and REASON.split() == " ".join(broken).split("refused: ")[1].split()
    assert len(broken) > len(whole)


def test_status_has_times_of_the_clock_here_and_numbers_in_ranges(
    monkeypatch: pytest.MonkeyPatch, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Learner(home) as learner:
        learner.store.record_night(None, False, "no gain", {"started": "2026-11-29T20:15:09+00:00"})
    note_try(home, "2026-11-29T21:00:00+00:00", "on battery", {})
    monkeypatch.setenv("TZ", "JST-9")
    said = run(home, "status")[1].splitlines()
    assert "last night  2026-11-30 05:15: refused: no gain" in said and "last try    2026-11-30 06:00: on battery" in said
    facts = json.loads(run(home, "status", "--json")[1])
    assert facts["last_night"]["started"] == "2026-11-29T20:15:09+00:00" and facts["generations"] == [0]
    for numbers, words in (([0], "0"), ([*range(31)], "0-30"), ([0, 4, 5, 6, 9], "0, 4-6, 9"), ([], "")):
        print_status(facts | {"generations": numbers})
        assert f"on disk     generations {words}\n" in capsys.readouterr().out


def test_an_answer_that_is_cut_off_says_so(home: Path, tmp_path: Path) -> None:
    code, out, error = run(home, "ask", "hello", "--max-tokens", "4")
    assert (code, out, error) == (0, "abca\n", "cut off after 4 tokens\n")
    code, out, error = run(home, "ask", "hello", "--max-tokens", "4", "--json")
    assert json.loads(out) == {"answer": "abca", "generation": 0, "is_whole": False}
    assert error == "cut off after 4 tokens\n"
    (tmp_path / "whole").mkdir()
    whole = make_home(tmp_path / "whole", "yes", n_ctx=256)
    code, out, error = run(whole, "ask", "hello", "--json")
    assert json.loads(out) == {"answer": "yes", "generation": 0, "is_whole": True} and not error


def test_an_answer_that_fills_the_context_is_cut_off_too(tmp_path: Path) -> None:
    with Learner(make_home(tmp_path, ENDLESS, is_endless=True, n_ctx=64)) as learner:
        answer, n_tokens, is_whole = learner.answer("hello", 1000)
        assert answer.startswith("abcabc") and n_tokens < 64 and not is_whole


# --- nights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [(), ("--task", "echo")])
def test_a_dry_run_with_nothing_to_learn_says_what_the_night_says(home: Path, task: tuple[str, ...]) -> None:
    code, out, error = run(home, "adapt", "--dry-run", *task)
    assert (code, out) == (4, "") and one_line(error, "nothing to learn: no pending example", *task[1:])
    assert run(home, "adapt", *task) == (4, "", error)


def test_a_night_has_its_gate_always(home: Path) -> None:
    assert run(home, "adapt", "--gate", "report")[0] == 2


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"minutes": 0.0}, "minutes must be above 0, got 0.0"), ({"ram_bytes": -1}, "ram_bytes must be above 0, got -1")],
)
def test_the_limit_that_is_wrong_is_the_one_that_is_named(home: Path, limits: dict[str, Any], words: str) -> None:
    with Learner(home) as learner, pytest.raises(SettingError) as caught:
        learner.limits(**limits)
    assert str(caught.value) == words


def said(capsys: pytest.CaptureFixture[str], **train: Any) -> str:
    """Return what is printed of a night that was published, with such a training."""
    facts = asdict(TrainReport(steps=37, plan="2 of 2 layers")) | {"peak_rss_bytes": 1, "ask_s": 0.0, "no_asker": ""} | train
    prose = {"base": 1.0, "before": 1.0, "after": 1.0, "kld": 0.0}
    measured = {"losses": {"adapter": 0.25, "int8": 0.26}, "survival": {"adapter": 1.0, "int8": 0.99}}
    print_report(AdaptReport(accepted=True, generation=1, n_new=9, prose=prose, train=facts, **measured))
    return capsys.readouterr().out


def test_a_night_that_ended_early_says_where_and_why_rows_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert "survival    answer loss 0.25 nats unmerged; int8 0.26 (99% of the gain)\n" in said(capsys)
    assert "stopped" not in (out := said(capsys)) and "waiting" not in out and "asker" not in out
    out = said(capsys, stopped_early=True, unmet=[7, 8])
    assert "stopped     after 37 steps, before the last one: the time was over\n" in out
    assert "waiting     2 of 9 new rows: the time was over, a later night learns them\n" in out
    out = said(capsys, stopped_early=True, unmet=[8], heldout={"10": 0.5, "20": 0.3, "30": 0.4})
    assert "37 steps, before the last one: held-out rows were best long before, or the time was over\n" in out
    assert "waiting     1 of 9 new rows: held-out rows were best after step 20, a later night learns them\n" in out


def test_a_night_without_an_asker_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert "asker       none tonight: training loss is nan\n" in said(capsys, no_asker="training loss is nan")


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_forgetting_nothing_says_what_forgetting_says(home: Path) -> None:
    code, out, error = run(home, "forget", "--contains", "Mira", "--dry-run")
    assert (code, out) == (1, "") and one_line(error, "0 rows forgotten; rows that a night learned and did not keep")
    assert run(home, "forget", "--contains", "Mira") == (1, "", error)
    assert run(home, "forget", "--contains", "Mira", "--dry-run", "--json")[1:] == ('{"rows": []}\n', "")


def test_a_text_in_place_of_an_id_is_told_how_texts_are_searched(home: Path) -> None:
    run(home, "observe", "-", stdin=lines(1))
    for text, words in (("Mira", "got Mira; `--contains Mira`"), ("0", "got 0; "), ("the inn", "`--contains 'the inn'`")):
        code, _, error = run(home, "forget", text)
        assert code == 2 and one_line(error.splitlines()[-1], "ids are numbers from 1 on", words), error
    assert run(home, "forget", "1")[0] == 0
