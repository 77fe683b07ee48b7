"""What is printed piece by piece: words stay whole, lines stay within the terminal, and no word is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.cli.output import WordWrap

COLUMNS = 12


def printed(pieces: list[str]) -> str:
    wrap = WordWrap(COLUMNS)
    return "".join([wrap.feed(piece) for piece in pieces] + [wrap.rest()])


@given(st.lists(st.text("ab \n", max_size=9)))
def test_only_blanks_become_line_breaks(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = printed(pieces)
    assert found.split() == text.split() and found == printed([text])
    assert found.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    for line in found.split("\n"):
        assert len(line) <= COLUMNS or len(line.split()) <= 1 or line != line.rstrip()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a vital part of the ecosystem", ["a vital part", "of the", "ecosystem"]),
        ("  def f():\n    return 1", ["  def f():", "    return 1"]),
        ("on Fridays, please", ["on Fridays,", "please"]),
        ("incomprehensibilities are long", ["incomprehensibilities", "are long"]),
        ("雪雪雪雪雪雪雪雪 雪。", ["雪雪雪雪雪雪", "雪雪 雪。"]),  # two cells each
        ("one\n\ntwo\n", ["one", "", "two", ""]),
    ],
)
def test_lines_break_between_words(text: str, lines: list[str]) -> None:
    assert printed(list(text)) == "\n".join(lines)


def test_a_word_is_printed_as_soon_as_the_next_one_begins() -> None:
    wrap = WordWrap(COLUMNS)
    assert [wrap.feed(piece) for piece in ("Mi", "ra", ", on", " Fri")] == ["", "", "Mira,", " on"]
    assert wrap.rest() == " Fri"
    assert [wrap.feed(piece) for piece in "雪雪"] == ["", "\n雪"]


def test_a_word_wider_than_a_line_does_not_wait_for_its_end() -> None:
    wrap = WordWrap(COLUMNS)
    shown = [wrap.feed("a ")] + [wrap.feed("bcd") for _ in range(10)]
    assert "".join(shown) == "a\n" + ("bcd" * 10)[:25]
    assert wrap.rest() + wrap.feed(" ef") + wrap.rest() == "cdbcd\nef"
