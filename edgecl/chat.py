"""A chat: turns with the generation that serves, and what of them is accepted, corrected or taken back.

Nothing of a chat is stored, and so nothing is learned, but what was accepted or corrected. Such an example is the chat up to
that answer, as the model saw it; only that answer is learned: what else the model said there, nobody accepted.

*Does not cover*: reading and printing (`cli.chat`); a night that runs while something is taken back, and has read it already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgecl_convert import GgufFile

from .data import DEFAULT_TASK, Example, check_task, parse_example
from .errors import DataError, EdgeclError, GenerationError, translated
from .learner import Learner
from .rows import ObserveReport, Stored
from .template import chat_format

if TYPE_CHECKING:
    from .engine import Engine

ANSWER_TOKENS = 512  # at most, and at most a quarter of the context


@dataclass
class Turn:
    """What was asked and answered.

    Attributes:
        is_whole: the answer came to its end, or the user wrote it; one that was cut off is not to be learned.
        n_tokens: that the model wrote.
    """

    asked: str
    answer: str = ""
    is_whole: bool = False
    n_tokens: int = 0


@dataclass(frozen=True)
class TakenBack:
    """What `Chat.undo` did.

    Attributes:
        row: what left the store; None where it was stored before this chat and stays, or was gone already.
        was_added: whether the chat had added it.
        is_put_back: whether an older answer to the same prompt is stored again.
    """

    row: Stored | None
    was_added: bool
    is_put_back: bool


@dataclass(frozen=True)
class _Kept:
    """What was accepted or corrected, and how things were before: the row of that prompt, the turn and its answer."""

    example: Example
    before: dict[str, Any] | None
    was_added: bool
    turn: Turn
    answer: str
    is_whole: bool


class Chat:
    """A chat with a learner; belongs to the learner's thread.

    Attributes:
        turns: all of them, the last one last.
        n_left_out: so many of the first turns no longer fit into the context.
        generation: the one that answered last, or was loaded; -1 before that.
    """

    def __init__(self, learner: Learner, task: str = DEFAULT_TASK) -> None:
        """Begin a chat; nothing is loaded yet.

        Raises:
            DataError: no such task is possible.
        """
        self.learner = learner
        self.turns: list[Turn] = []
        self.n_left_out, self.generation = 0, -1
        self.task = task
        self._pinned: int | None = None
        self._kept: list[_Kept] = []
        self._vocab: object = None

    @property
    def task(self) -> str:
        """The kind of what is accepted from here on.

        Raises:
            DataError: it is set to what cannot be a task.
        """
        return self._task

    @task.setter
    def task(self, name: str) -> None:
        self._task = check_task(name)

    @property
    def is_pinned(self) -> bool:
        """Whether one generation answers here, whichever serves."""
        return self._pinned is not None

    def pin(self, number: int | None) -> None:
        """Have one generation answer in this chat, and nowhere else; None: whichever serves.

        Raises:
            EdgeclError: there is no such generation, or it cannot be loaded; what answered before answers still.
        """
        before, self._pinned = self._pinned, number
        try:
            self.load()
        except EdgeclError:
            self._pinned = before
            raise

    def load(self) -> Engine:
        """Load the generation that is to answer, where it is not loaded: a night may have published another since.

        Raises:
            EdgeclError: it cannot be loaded.
        """
        generations, number = self.learner.generations, self._pinned
        generation = generations.current() if number is None else generations.load(number)
        if number is not None and number != self.generation and not generation.model.is_file():
            raise GenerationError(f"generation {number} keeps its adapter but no model file; choose another")
        engine = self.learner.engine(generation)
        if self._vocab is not engine.vocab:
            with translated(), GgufFile(self.learner.settings.base) as base:
                self._format = chat_format(base, engine.vocab)
            self._vocab = engine.vocab
        self.generation = generation.number
        return engine

    # --- turns ------------------------------------------------------------------------------------------------------

    def turn(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message, piece by piece; closed or interrupted early, what came is the answer.

        Raises:
            EdgeclError: the model cannot be loaded, or the message alone is longer than the context; it is no turn then.
        """
        engine = self.load()
        most = min(ANSWER_TOKENS, engine.n_ctx // 4)
        prompt = self._prompt(text, engine.n_ctx - most)
        turn = Turn(text)
        self.turns.append(turn)
        for piece in engine.vocab.stream(_counted(engine.generate(prompt, most), turn)):
            turn.answer += piece
            yield piece
        turn.is_whole = turn.n_tokens < most

    def _prompt(self, text: str, most: int) -> list[int]:
        """Return the ids of the chat with a new message, without its oldest turns where they take more than `most`.

        Half of the room is then made free at once: each time that something is left out, all the rest is computed anew.
        """
        ids = self._ids(text, self.n_left_out)
        if len(ids) <= most:
            return ids
        alone = len(self._ids(text, len(self.turns)))
        if alone > most:
            raise DataError(f"this message takes {alone} tokens, the context has room for {most}; shorten it")
        n_out = self.n_left_out
        while len(ids) > most // 2 and n_out < len(self.turns):
            n_out += 1
            ids = self._ids(text, n_out)
        self.n_left_out = n_out
        return ids

    def _ids(self, text: str, n_left_out: int) -> list[int]:
        return self._format.prompt([*_messages(self.turns[n_left_out:]), ("user", text)])

    # --- what is learned --------------------------------------------------------------------------------------------

    def accept(self) -> ObserveReport:
        """Store the chat up to the last answer, which is right, to be learned.

        Raises:
            DataError: there is no answer yet, or it is empty or was cut off.
            StoreError: the database failed; nothing was stored.
        """
        turn = self._last()
        if turn.answer and not turn.is_whole:
            raise DataError("the last answer was cut off; correct it instead")
        return self._keep(turn, turn.answer)

    def correct(self, answer: str) -> ObserveReport:
        """Store the chat up to the last message with the right answer, which also takes the place of the model's.

        Raises:
            DataError: there is no turn yet, or the answer is empty, or nothing of it is left when it is redacted.
            StoreError: the database failed; nothing was stored, and the model's answer stays.
        """
        return self._keep(self._last(), answer.strip())

    def _last(self) -> Turn:
        if not self.turns:
            raise DataError("there is no answer yet; ask something first")
        return self.turns[-1]

    def _keep(self, turn: Turn, answer: str) -> ObserveReport:
        messages = [*_messages(self.turns[self.n_left_out : -1]), ("user", turn.asked), ("assistant", answer)]
        record = {"messages": [{"role": role, "content": content} for role, content in messages]}
        example = replace(parse_example(record, self.task, "chat"), last_only=True)
        stored = self.learner.redacted(example, Counter())  # which is what can be found again
        before = self.learner.store.find(stored.prompt_hash)
        report = self.learner.observe([example])
        if report.bad:
            raise DataError(report.bad[0][1])
        if report.added or answer != turn.answer:
            self._kept.append(_Kept(stored, before, bool(report.added), turn, turn.answer, turn.is_whole))
        turn.answer, turn.is_whole = answer, True
        return report

    def undo(self) -> TakenBack:
        """Take back what was last accepted or corrected and not yet taken back: from the store, and from the chat.

        What it had replaced is as it was before: an older row of the prompt in the store, the model's answer in the chat.

        Raises:
            DataError: there is nothing to take back.
            StoreError: the database failed; nothing was changed.
        """
        if not self._kept:
            raise DataError("nothing was accepted or corrected in this chat that could be taken back")
        kept = self._kept[-1]
        row = self.learner.store.take_back(kept.example, kept.before) if kept.was_added else None
        self._kept.pop()
        kept.turn.answer, kept.turn.is_whole = kept.answer, kept.is_whole
        return TakenBack(row, kept.was_added, bool(row and kept.before))


def _messages(turns: Iterable[Turn]) -> list[tuple[str, str]]:
    """Return turns as messages; one that was never answered is no part of what follows."""
    return [pair for turn in turns if turn.answer for pair in (("user", turn.asked), ("assistant", turn.answer))]


def _counted(tokens: Iterable[int], turn: Turn) -> Iterator[int]:
    for turn.n_tokens, token in enumerate(tokens, 1):
        yield token
