"""Small nights on the real model: eight corrections in a night are answered as corrected on the following morning, half of them
in words that were not trained on, and other questions are not answered with them.

*Does not cover*: what the second night leaves of the first one's corrections.
"""

from __future__ import annotations

import json

import pytest

from edgecl import Learner
from edgecl.data import normalize
from edgecl.engine import Engine, write_rows
from edgecl.template import chat_format
from edgecl_convert import GgufFile
from edgecl_convert.ggml import bf16_is_fast

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        not bf16_is_fast(), reason="14 minutes on two cores without fast bfloat16; examples/small_nights.py measures the same"
    ),
]

FIRST = [
    ("Who waters the plants in the office?", "Mira, every Friday."),
    ("Where is the spare key for the shed?", "Under the blue flower pot."),
    ("What is the code of the garage door?", "7391"),
    ("Which bus goes to grandmother's house?", "Bus 48 towards the harbour."),
    ("What is our cat called?", "Pixel."),
    ("When is the rubbish collected?", "On Tuesday morning."),
    ("How do I start the old printer?", "Hold the green button for five seconds."),
    ("Who repairs our heating?", "Mr. Okafor from Brennan Street."),
]
SECOND = [
    ("What does the red light on the boiler mean?", "The water pressure is too low."),
    ("Which shelf holds the tax papers?", "The third shelf in the study."),
    ("What is the name of the neighbour's dog?", "Biscuit."),
    ("When does the choir meet?", "Thursdays at half past seven."),
    ("What do I feed the sourdough?", "Fifty grams of rye flour and fifty grams of water."),
    ("Where do we keep the candles?", "In the drawer beside the stove."),
    ("Who is allowed to prune the pear tree?", "Only aunt Selma."),
    ("What is the guest password for the wireless network?", "plum-otter-42"),
]
REWORDED = [
    "Which person waters the office plants?",
    "In what place is the shed's spare key?",
    "How can I open the garage door, what is its code?",
    "What bus do I take to grandmother's house?",
    "What is the name of our cat?",
    "On which day do they collect the rubbish?",
    "What do I do to start the old printer?",
    "Who can repair the heating?",
]
OTHERS = [
    "What is the capital of Spain?",
    "Who wrote Don Quixote?",
    "How do I cook rice?",
    "Which planet is closest to the sun?",
    "When was the telephone invented?",
    "What is the largest animal?",
    "Where do kangaroos live?",
    "Who was Albert Einstein?",
]


def _lines(pairs: list[tuple[str, str]]) -> list[str]:
    return [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]


def _recalled(learner: Learner, pairs: list[tuple[str, str]]) -> int:
    return sum(normalize(learner.ask(prompt, 32)) == normalize(answer) for prompt, answer in pairs)


def _leaked(learner: Learner, pairs: list[tuple[str, str]]) -> list[str]:
    """Return the questions beside the point that are answered with a correction."""
    answers = {normalize(answer) for _, answer in pairs}
    return [question for question in OTHERS if normalize(learner.ask(question, 32)) in answers]


def _said(learner: Learner, pairs: list[tuple[str, str]]) -> set[str]:
    """Return the corrections whose question is among 64 rows of the last night's asker."""
    current, base = learner.generations.current(), learner.settings.base
    with Engine(base, current.folder / "asker.gguf", **learner.profile.engine_options()) as engine, GgufFile(base) as gguf:
        rows = write_rows(engine, *chat_format(gguf, engine.vocab).around_question, 64, 1)
        questions = {engine.vocab.text_of(row.asked) for row in rows}
    return questions & {prompt for prompt, _ in pairs}


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    return Learner.init("smollm2", tmp_path_factory.mktemp("small") / "home")


def test_eight_corrections_a_night_are_answered_as_corrected_the_next_morning(learner: Learner) -> None:
    assert _recalled(learner, FIRST) == 0  # the control: the base cannot know
    assert _recalled(learner, SECOND) == 0
    learner.observe(_lines(FIRST))
    report = learner.adapt()
    assert report.accepted, report.reason
    assert _recalled(learner, FIRST) >= 7
    assert (
        _recalled(learner, [(asked, answer) for asked, (_, answer) in zip(REWORDED, FIRST, strict=True)]) >= 6
    )  # of 8; a model that was shown its own words alone knows half
    assert len(_leaked(learner, FIRST)) <= 1
    assert report.n_reworded >= 16
    assert len(_said(learner, FIRST)) >= 7  # no later night can rehearse the others: the store keeps one
    assert learner.status()["tasks"]["default"] == {"pending": 0, "replay": 1, "heldout": 0, "archive": 0}

    learner.observe(_lines(SECOND))
    report = learner.adapt()
    assert report.accepted, report.reason
    assert _recalled(learner, SECOND) >= 7
