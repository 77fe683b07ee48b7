"""The replay of good and bad nights: bad rows are bad in the way that they are said to be, and errors are counted right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples import gate_rates


def answers(records: list[dict[str, Any]]) -> list[str]:
    return [record["messages"][1]["content"] for record in records]


@pytest.mark.parametrize("task", ["math", "home"])
def test_shuffled_answers_are_those_of_the_task_in_other_places(task: str) -> None:
    right = gate_rates.rows(task, 0)
    wrong = gate_rates.shuffled(right, 0)
    assert [row["messages"][0] for row in right] == [row["messages"][0] for row in wrong]
    assert Counter(answers(right)) == Counter(answers(wrong))
    assert sum(a == b for a, b in zip(answers(right), answers(wrong), strict=True)) < len(right) / 4


def test_a_poisoned_task_answers_questions_of_the_first_task_wrong() -> None:
    known, poison = gate_rates.rows("home", 0), gate_rates.poisoned(0)
    truth = answers(gate_rates.rows("home", 100))
    assert {row["task"] for row in poison} == {"poison"}
    assert all(a != b for a, b in zip(answers(poison), truth, strict=True))
    assert set(answers(poison)) <= set(truth)
    asked = {row["messages"][0]["content"] for row in known}
    new = [row["messages"][0]["content"] for row in poison if row["messages"][0]["content"] not in asked]
    assert len(new) > len(poison) / 2, "a question asked before would replace the row that was learned"


def test_errors_are_counted_by_what_a_night_was_known_to_be() -> None:
    kinds = list(gate_rates.KINDS)
    nights = [
        {"kind": kinds[0], "is_good": True, "accepted": True, "reason": ""},
        {"kind": kinds[0], "is_good": True, "accepted": False, "reason": "no gain"},
        {"kind": kinds[3], "is_good": False, "accepted": False, "reason": "worse"},
        {"kind": kinds[3], "is_good": False, "accepted": False, "reason": "worse"},
    ]
    found = gate_rates.rates(nights)
    assert found["false refusals"][:2] == (1, 2) and found["false acceptances"][:2] == (0, 2)
    assert found["false acceptances"][2:] == pytest.approx((0.0, 0.658), abs=1e-3)
    text = gate_rates.table(nights, found)
    assert f"| {kinds[0]} | 1 of 2 | no gain |" in text and "false refusals: 1 of 2" in text


def test_json_has_intervals_and_the_settings_of_the_nights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (kind, (is_good, *_)) in enumerate(gate_rates.KINDS.items()):
        night = {"kind": kind, "is_good": is_good, "seed": 0, "accepted": is_good, "reason": ""}
        (tmp_path / f"night-0-{i}.json").write_text(json.dumps(night))
    monkeypatch.setattr("sys.argv", ["gate_rates.py", "--seeds", "1", "--json", "--out", str(tmp_path)])
    gate_rates.main()
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"rows": 128, "written": 112, "epochs": 2, "min_steps": 24}
    for name, n in (("false refusals", 3), ("false acceptances", 4)):
        rate = found["rates"][name]
        assert (rate["errors"], rate["nights"]) == (0, n)
        assert rate["wilson_95"] == pytest.approx(gate_rates.wilson_interval(0, n))
