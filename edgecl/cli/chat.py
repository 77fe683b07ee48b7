"""The chat at a terminal, over ssh or through a pipe: lines to a `Chat`, and its answers back.

A line that ends in a backslash goes on in the next one; what is pasted is one message. Answers and what was asked for go to
stdout, notes to stderr. readline, where Python has it, edits lines; nothing that was typed is written to disk.
"""

from __future__ import annotations

import re
import select
import shutil
import signal
import sys
from contextlib import closing, suppress

import click

from ..chat import Chat, Turn
from ..data import DEFAULT_TASK
from ..errors import DataError, EdgeclError
from ..learner import Learner
from ..rows import ObserveReport
from .day import print_status
from .output import WordWrap, is_dumb, json_option, note, print_json, redaction, safe

_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
PASTE_GAP_S = 0.05  # lines of a paste come closer together than this, and typed ones do not
HELP = """\
/good        the last answer is right: it is learned in the next night
/fix TEXT    the right answer to the last message; it replaces the model's
/undo        takes the last /good or /fix back; again: the one before
/task [T]    the kind of what is accepted from here on
/status      what answers, what waits to be learned, the last night
/model [N]   generation N answers in this chat only; alone: the one that serves
/quit        leaves, and so does Ctrl-D; Ctrl-C interrupts an answer
A line that ends in \\ goes on in the next one; one that begins with a space is
no command. Nothing is learned but what /good and /fix keep."""


@click.command()
@click.option("--task", default=DEFAULT_TASK, show_default=True, help="The kind of what is accepted.")
@json_option
@click.pass_context
def chat(context: click.Context, task: str, as_json: bool) -> None:
    """Talk with the generation that serves; /good, /fix TEXT and /undo feed the store.

    Where stdin is not a terminal each line is a message; --json prints an object for each answer, or its error.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to clear up, and out of llama.cpp comes no exception
    with Learner(context.obj) as learner:
        code = _Conversation(Chat(learner, task), as_json).run()
    context.exit(code)


class _Lines:
    """Messages from a terminal or a pipe.

    Attributes:
        is_terminal: a person types, and sees the prompt.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._pastes_whole = False
        if self.is_terminal:
            with suppress(ImportError):
                import readline

                self._pastes_whole = "libedit" not in (readline.__doc__ or "") and not is_dumb()
                if self._pastes_whole:
                    readline.parse_and_bind("set enable-bracketed-paste on")

    def message(self) -> str:
        """Return the next message.

        Raises:
            EOFError: there is none.
            DataError: it is not UTF-8.
        """
        try:
            text = self._line("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n"
                with suppress(EOFError):
                    text += self._line(". ")
            text.encode("utf-8")
        except UnicodeError:
            raise DataError("that was not UTF-8; nothing was sent") from None
        return safe(text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n")

    def _line(self, prompt: str) -> str:
        if not self.is_terminal:
            data = sys.stdin.buffer.readline()
            if not data:
                raise EOFError
            return data.decode("utf-8").rstrip("\r\n")
        line = input(prompt)
        while not self._pastes_whole and select.select([sys.stdin], [], [], PASTE_GAP_S)[0]:
            line += "\n" + input(". ")
        return line


class _Conversation:
    """A chat in progress: what is typed goes to it, what it says is printed."""

    def __init__(self, chat: Chat, as_json: bool) -> None:
        self._chat, self._as_json, self._lines = chat, as_json, _Lines()
        self._code, self._is_interrupted, self._has_said_left_out, self._is_owed = 0, False, False, False
        self._commands = {
            "good": self._good,
            "fix": self._fix,
            "undo": self._undo,
            "task": self._task,
            "status": self._status,
            "model": self._model,
            "help": self._help,
        }

    def run(self) -> int:
        """Talk until the user leaves; return the exit code: 1 where a line of a pipe came to nothing."""
        self._chat.load()
        if self._lines.is_terminal:
            note(f"generation {self._chat.generation} answers; /help says what else there is, Ctrl-D leaves")
        while True:
            try:
                if not self._round():
                    return self._code
            except KeyboardInterrupt:
                if not self._lines.is_terminal:
                    raise
                click.echo()
                if self._is_interrupted:
                    return 0
                self._is_interrupted = True
                note("interrupted; Ctrl-C again leaves")

    def _round(self) -> bool:
        """Read one message and do what it asks; return whether the chat goes on."""
        self._is_owed = not self._lines.is_terminal  # who reads a pipe counts on a line, or an object, for each message
        try:
            text = self._lines.message()
            self._is_interrupted = False
            if text.strip() == "/quit":
                return False
            if command := _COMMAND.fullmatch(text.rstrip()):
                self._is_owed = False
                self._obey(command[1].lower(), command[2] or "")
            elif text.strip():
                self._say(text)
        except EOFError:
            if self._lines.is_terminal:
                click.echo()
            return False
        except EdgeclError as error:
            click.echo(f"edgecl: {safe(str(error))}", err=True)
            if self._is_owed:
                print_json({"error": str(error)}) if self._as_json else click.echo()
            self._code = 0 if self._lines.is_terminal else 1
        return True

    def _obey(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise DataError(f"/{name} is no command; /help lists them")
        if argument and name not in ("fix", "task", "model"):
            raise DataError(f"/{name} takes nothing behind it, got {argument[:40]}")
        self._commands[name](argument)

    def _say(self, text: str) -> None:
        before = self._chat.generation
        self._chat.load()
        if self._chat.generation != before:
            note(f"generation {self._chat.generation} answers from here on; it was {before}")
        pieces: list[str] = []
        wrap = WordWrap(shutil.get_terminal_size().columns) if self._lines.is_terminal else None
        try:
            with closing(self._chat.turn(text)) as answer:
                for piece in answer:
                    pieces.append(safe(piece))
                    if not self._as_json:
                        self._is_owed = False
                        click.echo(wrap.feed(pieces[-1]) if wrap else pieces[-1], nl=False)
        finally:
            if pieces and not self._as_json:
                click.echo(wrap.rest() if wrap else "")
        self._tell(self._chat.turns[-1], "".join(pieces))

    def _tell(self, turn: Turn, answer: str) -> None:
        """Say what there is to know about an answer."""
        if self._as_json:
            print_json({"answer": answer, "generation": self._chat.generation, "is_whole": turn.is_whole})
        elif not answer:
            click.echo()  # it is owed a line
            note("the model says nothing; /fix TEXT gives the right answer")
        if not turn.is_whole:
            note(f"cut off after {turn.n_tokens} tokens")
        if self._chat.n_left_out and not self._has_said_left_out:
            self._has_said_left_out = True
            note("the chat is longer than the context: from here on its oldest turns are left out")

    def _help(self, _: str) -> None:
        click.echo(HELP)

    def _good(self, _: str) -> None:
        self._kept(self._chat.accept())

    def _fix(self, text: str) -> None:
        if not text.strip():
            raise DataError("the right answer is missing: /fix TEXT")
        self._kept(self._chat.correct(text))

    def _kept(self, report: ObserveReport) -> None:
        if report.redacted:
            note(redaction(report.redacted))
        if not report.added:
            note("known already")
        else:
            older = " in place of an older answer" if report.replaced else ""
            note(f"kept for the next night{older}, task {safe(self._chat.task)}")

    def _undo(self, _: str) -> None:
        done = self._chat.undo()
        if not done.was_added:
            note("taken back in this chat; it was stored before and stays so")
        elif done.row is None:
            note("no longer in the store: a night has learned it, or it was replaced or forgotten")
        else:
            older = ", the older answer is back" if done.is_put_back else ""
            is_learned = done.row.generation is not None and done.row.role != "pending"  # a night that claims it may fail
            learned = f"; generation {done.row.generation} has learned it" if is_learned else ""
            note(f"taken back{older}{learned}")

    def _task(self, name: str) -> None:
        if name:
            self._chat.task = name.strip()
        note(f"task {safe(self._chat.task)}")

    def _status(self, _: str) -> None:
        facts, chat = self._chat.learner.status(), self._chat
        here = {"answers": chat.generation, "task": chat.task, "turns": len(chat.turns), "turns_left_out": chat.n_left_out}
        if self._as_json:
            print_json(facts | {"chat": here})
            return
        print_status(facts)
        pinned = " (in this chat only)" if chat.is_pinned else ""
        click.echo(f"this chat   generation {chat.generation} answers{pinned}, task {safe(chat.task)}")
        click.echo(f"turns       {len(chat.turns)}, of which {chat.n_left_out} no longer fit into the context")

    def _model(self, text: str) -> None:
        if text and not text.strip().isdecimal():
            raise DataError(f"/model takes the number of a generation, got {text}")
        self._chat.pin(int(text) if text else None)
        note(f"generation {self._chat.generation} answers{' in this chat only' if text else ''}")


COMMANDS = (chat,)
