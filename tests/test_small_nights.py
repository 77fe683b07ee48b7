"""Small nights on the real model: eight corrections in a night are answered as corrected on the following morning.

*Does not cover*: what the second night leaves of the first one's corrections.
"""

from __future__ import annotations

import json

import pytest

from edgecl import Learner
from edgecl.data import normalize

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


def _lines(pairs: list[tuple[str, str]]) -> list[str]:
    return [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]


def _recalled(learner: Learner, pairs: list[tuple[str, str]]) -> int:
    return sum(normalize(learner.ask(prompt, 32)) == normalize(answer) for prompt, answer in pairs)


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
    assert learner.status()["tasks"]["default"] == {"pending": 0, "replay": 1, "heldout": 0, "archive": 0}

    learner.observe(_lines(SECOND))
    report = learner.adapt()
    assert report.accepted, report.reason
    assert _recalled(learner, SECOND) >= 7
