"""What commands share: printing a result as JSON or as text, progress bars, byte counts."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

F = TypeVar("F", bound=Callable[..., Any])
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # surrogates: of a path that is not UTF-8


def json_option(function: F) -> F:
    """Add `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Let the app end as its contract says; rich would end it with an error."""
        raise BrokenPipeError


def console() -> Console:
    """Return stdout as rich sees it: no colour where it is not a terminal or NO_COLOR is set; brackets in a text are text.

    At a terminal lines break between words; elsewhere they stay whole, for what searches them.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return _Output(highlight=False, soft_wrap=not is_terminal, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; numbers that JSON does not have become null, control codes are escaped."""
    text = json.dumps(_finite(value), ensure_ascii=False)
    click.echo(_CONTROL.sub(lambda code: f"\\u{ord(code[0]):04x}", text))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def safe(text: str) -> str:
    """Return text without the control codes that could drive a terminal; line breaks and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class WordWrap:
    """Breaks a text that comes in pieces between its words; a word wider than a line is left to the terminal.

    Args:
        columns: of the terminal.
    """

    def __init__(self, columns: int) -> None:
        self._columns, self._at, self._word = columns, 0, ""  # a word has the blanks before it
        self._is_begun = False  # whether part of the word has been shown

    def feed(self, piece: str) -> str:
        """Return what can be printed now; the last word may go on in the next piece and waits for it."""
        shown = []
        for character in piece:
            if character == "\n":
                shown.append(self.rest() + "\n")
                self._at = 0
                continue
            if character == " " or cell_len(character) > 1:  # Chinese has no blanks
                if self._word.strip():
                    shown.append(self.rest())
                self._is_begun = False
            self._word += character
            if cell_len(self._word) > self._columns:
                shown.append(self.rest())
                self._is_begun = True
        return "".join(shown)

    def rest(self) -> str:
        """Return the word that waits."""
        word, self._word = self._word, ""
        if self._at and not self._is_begun and self._at + cell_len(word) > self._columns:
            self._at, word = 0, "\n" + word.lstrip(" ")
        self._is_begun = False
        self._at += cell_len(word.lstrip("\n"))
        return word


def note(text: str) -> None:
    """Print a dim line on stderr; plain where that is no terminal, or colour is not wanted."""
    click.echo(text if os.environ.get("NO_COLOR") or is_dumb() else click.style(text, dim=True), err=True)


def is_dumb() -> bool:
    """Return whether the terminal, if there is one, knows no control codes."""
    return os.environ.get("TERM", "dumb") == "dumb"


def local_time(at: str) -> str:
    """Return a time, in UTC as the home has it, as the clock here has it, to the minute."""
    with suppress(ValueError, OverflowError):  # it is damaged
        return f"{datetime.fromisoformat(at).astimezone():%Y-%m-%d %H:%M}"
    return safe(at[:16])


def size(n_bytes: float) -> str:
    """Return a byte count as people read it."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int, str], None] | None]:
    """Yield a progress function that draws a bar for each stage on stderr; None where that is not a terminal."""
    target = Console(stderr=True)
    if not target.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:<8}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"))
    text_column = TextColumn("{task.fields[text]}", markup=False)
    with Progress(*columns, TimeElapsedColumn(), text_column, console=target, transient=True) as bars:
        current: list[tuple[str, TaskID]] = []

        def update(stage: str, done: int, total: int, text: str) -> None:
            if not current or current[-1][0] != stage or done < (bars.tasks[-1].completed if bars.tasks else 0):
                for _, task in current:
                    bars.update(task, visible=False)
                current.append((stage, bars.add_task(stage, total=total, text="")))
            bars.update(current[-1][1], completed=done, total=total, text=safe(text)[:30])

        yield update


def redaction(counts: dict[str, int]) -> str:
    """Return in words what was redacted, by kind."""
    found = ", ".join(f"{n} [{kind}]" for kind, n in counts.items())
    return f"redacted before storing: {found} (privacy.redact in edgecl.toml)"
