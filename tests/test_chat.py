"""A chat apart from any terminal: what is stored and learned, what is taken back, what the context holds, what is computed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parrot import make_home, publish_parrot
from tiny import END, build, random_tokens

from edgecl import Example, Learner
from edgecl.chat import Chat
from edgecl.engine import GGML_TYPE_F32, Engine, VocabFile
from edgecl.errors import DataError, GenerationError
from edgecl.measure import record_of
from edgecl.stages import example_from
from edgecl.template import chat_format
from edgecl_convert import GgufFile

ANSWER = "yes ☃!"


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    with Learner(make_home(tmp_path, ANSWER)) as one:
        yield one


def say(chat: Chat, text: str) -> str:
    return "".join(chat.turn(text))


def rows(learner: Learner) -> list[tuple[str, str]]:
    """The answers that are stored, with their roles."""
    return [(role, row.example.answer) for role in ("pending", "replay", "heldout") for row in learner.store.rows(role)]


def is_on_disk(learner: Learner, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in learner.home.glob("replay.db*"))


# --- turns ------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_in_pieces_and_nothing_is_stored(learner: Learner) -> None:
    chat = Chat(learner)
    pieces = list(chat.turn("hello"))
    assert pieces == ["y", "e", "s", " ☃", "!"]  # three bytes of one character, and a space that was not the end
    assert "".join(pieces) == ANSWER == learner.ask("hello")
    assert chat.turns[0].is_whole and chat.turns[0].n_tokens == 8
    assert say(chat, "and again?") == ANSWER
    assert rows(learner) == [] and not is_on_disk(learner, "hello")


def test_streamed_text_is_that_of_the_whole_answer(tmp_path: Path) -> None:
    with VocabFile(build(tmp_path / "tiny.gguf")[0]) as vocab:
        for text in ("  a  b \n", "é☃😀", " ", "", "\n\tx"):
            ids = vocab.encode(text)
            for cut in range(len(ids) + 1):  # also in the middle of a character
                assert "".join(vocab.stream(ids[:cut])) == vocab.text_of(ids[:cut])
            assert not any("\ufffd" in piece for piece in vocab.stream(ids))
            assert "".join(vocab.stream([*ids, END, *vocab.encode("b")])) == text.strip()


def test_a_turn_computes_its_own_tokens_however_long_the_chat_is(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    n_computed, forward = [0], Engine.forward

    def counted(engine: Engine, items: Any) -> Any:
        n_computed[0] += len(items)
        return forward(engine, items)

    monkeypatch.setattr(Engine, "forward", counted)
    chat, costs = Chat(learner), []
    for _ in range(6):
        n_computed[0] = 0
        next(chat.turn("x" * 40))
        costs.append(n_computed[0])
        chat.turns[-1].answer, chat.turns[-1].is_whole = ANSWER, True
    assert max(costs[1:]) - min(costs[1:]) == 0 and costs[1] < 100
    n_computed[0] = 0
    chat.correct("no")
    say(chat, "x" * 40)
    assert n_computed[0] < 120  # a corrected answer is computed again, and nothing before it


def test_what_is_in_the_cache_already_changes_no_answer(tmp_path: Path) -> None:
    path, options = build(tmp_path / "tiny.gguf")[0], {"n_ctx": 512, "n_threads": 1, "kv_type": GGML_TYPE_F32}
    first, second, other = random_tokens(40, 1), random_tokens(30, 2), random_tokens(50, 3)
    with Engine(path, **options) as used:
        answer = list(used.generate(first, 20))
        prompts = [[*first, *answer, *second], [*first, *answer[:7], *other], first, other, [*other, 65]]
        for prompt in prompts:
            with Engine(path, **options) as fresh:
                assert list(used.generate(prompt, 20)) == list(fresh.generate(prompt, 20))
        half = used.generate(prompts[0], 20)
        assert [next(half), next(half)] == list(used.generate(prompts[0], 2))  # left in the middle
        used.logits(other)
        with Engine(path, **options) as fresh:
            assert list(used.generate(first, 20)) == list(fresh.generate(first, 20))


def test_the_oldest_turns_are_left_out_where_the_context_would_be_full(tmp_path: Path) -> None:
    with Learner(make_home(tmp_path, ANSWER, n_ctx=512)) as learner:
        chat, n_left_out = Chat(learner), []
        for _ in range(12):
            assert say(chat, "x" * 60) == ANSWER
            n_left_out.append(chat.n_left_out)
        assert n_left_out[0] == 0 and 0 < n_left_out[-1] < 12 and n_left_out == sorted(n_left_out)
        assert len(set(n_left_out)) < 6  # several at once
        chat.accept()
        (row,) = learner.store.rows("pending")
        assert len(row.example.messages) == 2 * (12 - n_left_out[-1])  # as the model saw it
        with pytest.raises(DataError, match=r"takes \d+ tokens, the context has room for 384; shorten it"):
            say(chat, "x" * 600)
        assert len(chat.turns) == 12 and chat.n_left_out == n_left_out[-1]


def test_an_answer_stops_at_some_number_of_tokens_and_is_not_accepted_then(tmp_path: Path) -> None:
    with Learner(make_home(tmp_path, "abc", is_endless=True, n_ctx=256)) as learner:
        chat = Chat(learner)
        assert say(chat, "hello") == ("abc" * 22)[:64]
        with pytest.raises(DataError, match="cut off"):
            chat.accept()
        assert rows(learner) == []
        assert chat.correct("abc").added == 1
        assert chat.accept().duplicates == 1  # the user wrote it: it is whole


def test_an_interrupted_answer_is_what_came_of_it(learner: Learner) -> None:
    chat = Chat(learner)
    pieces = chat.turn("hello")
    assert next(pieces) + next(pieces) == "ye"
    pieces.close()
    assert (chat.turns[0].answer, chat.turns[0].is_whole) == ("ye", False)
    with pytest.raises(DataError, match="cut off"):
        chat.accept()
    assert say(chat, "again") == ANSWER


# --- what is learned --------------------------------------------------------------------------------------------------


def test_an_accepted_answer_is_the_whole_chat_and_only_that_answer_is_learned(learner: Learner) -> None:
    chat = Chat(learner, "garden")
    say(chat, "one")
    say(chat, "two")
    chat.accept()
    (row,) = learner.store.rows("pending", "garden")
    example = row.example
    assert example.messages == (("user", "one"), ("assistant", ANSWER), ("user", "two"), ("assistant", ANSWER))
    assert example.last_only and example_from(record_of(example)).last_only
    with GgufFile(learner.settings.base) as base, VocabFile(base.path) as vocab:
        chats = chat_format(base, vocab)
        for what, wanted in ((example, [ANSWER]), (replace(example, last_only=False), [ANSWER, ANSWER])):
            encoded = chats.encode(what)
            learned = [token if yes else END for token, yes in zip(encoded.ids, encoded.supervised, strict=True)]
            texts = vocab_texts(vocab, learned)
            assert texts == wanted


def vocab_texts(vocab: Any, ids: list[int]) -> list[str]:
    """The texts between end-of-turn tokens."""
    out, part = [], []
    for token in [*ids, END]:
        if token == END:
            out.append(vocab.text_of(part))
            part = []
        else:
            part.append(token)
    return [text for text in out if text]


def test_a_correction_takes_the_answers_place_in_the_chat_and_undo_gives_it_back(learner: Learner) -> None:
    chat = Chat(learner)
    say(chat, "zebra")
    chat.correct("  no, two\nlines ")
    say(chat, "two")
    chat.accept()
    answers = [row.example.messages for row in learner.store.rows("pending")]
    assert answers[0][-1] == ("assistant", "no, two\nlines") and answers[1][1] == ("assistant", "no, two\nlines")
    assert chat.undo().row is not None
    assert chat.undo().row is not None
    assert rows(learner) == [] and [turn.answer for turn in chat.turns] == [ANSWER, ANSWER]
    assert not is_on_disk(learner, "two\\nlines") and not is_on_disk(learner, "zebra")
    with pytest.raises(DataError, match="nothing was accepted"):
        chat.undo()


def test_what_is_redacted_is_found_again_to_be_taken_back(learner: Learner) -> None:
    chat = Chat(learner)
    say(chat, "who is jo@example.com?")
    report = chat.correct("the one of +49 170 1234567, from next door")
    assert report.added == 1 and report.redacted == {"e-mail": 1, "phone": 1}
    (row,) = learner.store.rows("pending")
    assert row.example.messages == (("user", "who is [e-mail]?"), ("assistant", "the one of [phone], from next door"))
    assert chat.correct("a neighbour").replaced == 1
    assert chat.undo().is_put_back and rows(learner) == [("pending", "the one of [phone], from next door")]
    assert chat.undo().row is not None and rows(learner) == []
    with pytest.raises(DataError, match="nothing is left to learn"):
        chat.correct("jo@example.com")
    assert rows(learner) == [] and chat.turns[0].answer == ANSWER


@pytest.mark.parametrize("role", ["pending", "replay", "heldout", "archive"])
def test_undo_puts_back_the_row_that_was_replaced_as_it_was(learner: Learner, role: str) -> None:
    old = Example((("user", "one"), ("assistant", "an older answer")), "garden", "notes.jsonl", final="7", program=("a", "b"))
    learner.observe([old])
    with closing(sqlite3.connect(learner.home / "replay.db")) as db, db:
        db.execute("update examples set role = ?, generation = 3", [role])
    before = learner.store.find(old.prompt_hash)
    chat = Chat(learner)
    say(chat, "one")
    assert chat.accept().replaced == 1
    assert chat.correct("an even newer one").replaced == 1
    assert not is_on_disk(learner, "an older answer")
    assert chat.undo().is_put_back and rows(learner) == [("pending", ANSWER)]
    assert chat.undo().is_put_back
    assert learner.store.find(old.prompt_hash) == before
    assert not is_on_disk(learner, "an even newer one") and not is_on_disk(learner, ANSWER)


def test_undo_leaves_what_was_stored_before(learner: Learner) -> None:
    learner.observe([Example((("user", "one"), ("assistant", "known")))])
    chat = Chat(learner)
    say(chat, "one")
    assert chat.correct("known").duplicates == 1
    done = chat.undo()
    assert not done.was_added and rows(learner) == [("pending", "known")] and chat.turns[0].answer == ANSWER
    chat.accept()
    chat.accept()  # nothing new: nothing to take back
    chat.undo()
    assert rows(learner) == [("pending", "known")]


def test_undo_says_what_a_night_did_meanwhile_and_brings_back_nothing_that_is_gone(learner: Learner) -> None:
    learner.observe([Example((("user", "one"), ("assistant", "old")))])
    chat = Chat(learner)
    for text, is_kept in (("one", True), ("two", False)):
        say(chat, text)
        chat.accept()
        (row,) = learner.store.rows("pending")
        learner.store.settle([row.id], [row.id] if is_kept else [], 5, archive=False)
    assert chat.undo().row is None
    done = chat.undo()
    assert done.row is not None and (done.row.role, done.row.generation, done.is_put_back) == ("replay", 5, True)
    assert rows(learner) == [("pending", "old")]


def test_what_cannot_be_accepted(learner: Learner) -> None:
    chat = Chat(learner)
    for attempt in (chat.accept, lambda: chat.correct("x")):
        with pytest.raises(DataError, match="ask something first"):
            attempt()
    say(chat, "one")
    with pytest.raises(DataError, match="empty"):
        chat.correct(" \n")
    chat.turns[-1].answer = ""
    with pytest.raises(DataError, match="empty"):
        chat.accept()
    assert say(chat, "two") == ANSWER
    chat.accept()
    assert [len(row.example.messages) for row in learner.store.rows("pending")] == [2]  # what had no answer is no part of it
    with pytest.raises(DataError, match="task must be"):
        chat.task = "a\nb"
    assert chat.task == "default"


# --- generations ------------------------------------------------------------------------------------------------------


def test_a_generation_that_is_published_meanwhile_answers_the_next_turn(learner: Learner) -> None:
    chat = Chat(learner)
    assert say(chat, "one") == ANSWER and chat.generation == 0
    publish_parrot(learner.home, "no")
    assert say(chat, "two") == "no" and chat.generation == 1
    learner.rollback(0)
    assert say(chat, "three") == ANSWER and chat.generation == 0


def test_a_chat_can_have_a_generation_of_its_own(learner: Learner) -> None:
    publish_parrot(learner.home, "no")
    chat = Chat(learner)
    chat.pin(0)
    assert say(chat, "one") == ANSWER and chat.is_pinned and learner.generations.current().number == 1
    publish_parrot(learner.home, "why?")
    assert say(chat, "two") == ANSWER
    with pytest.raises(GenerationError, match="there is no generation 9"):
        chat.pin(9)
    learner.generations.load(1).model.unlink()
    with pytest.raises(GenerationError, match="generation 1 keeps its adapter but no model file"):
        chat.pin(1)
    assert say(chat, "three") == ANSWER and chat.generation == 0
    chat.pin(None)
    assert say(chat, "four") == "why?" and chat.generation == 2
