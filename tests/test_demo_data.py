"""The demo data: repeatable, right, balanced, test wording far from train wording; and the two prose files."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples.demo_data import PREFIXES, SPLITS, TASKS, WORDS, distinct_rows, main, make_rows, write_stream

Row = dict[str, Any]
PROSE = Path(__file__).parents[1] / "edgecl"
COMMAND = re.compile(r"(fwd|back|left|right|wait|beep) [1-9]|grab|drop")
TAKES_AWAY = re.compile(r"gives away|takes|lost|pulls out|dropped|used up|missing|thrown out")


def prompt(row: Row) -> str:
    return str(row["messages"][0]["content"])


def answer(row: Row) -> str:
    return str(row["messages"][1]["content"])


def roles(row: Row) -> list[str]:
    return [message["role"] for message in row["messages"]]


def words(row: Row) -> set[str]:
    return set(re.findall(r"[a-z']+|\d+", prompt(row).removeprefix(PREFIXES[row["task"]]).lower()))


def overlap(rows: list[Row], others: list[Row]) -> float:
    """Mean over rows of the best Jaccard word overlap with any other row."""
    pool = [(id(other), words(other)) for other in others]
    best = [max(len(w & o) / len(w | o) for key, o in pool if key != id(row)) for row in rows if (w := words(row))]
    return sum(best) / len(best)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_rows_follow_from_the_seed_and_have_the_promised_shape(task: str, split: str) -> None:
    rows = make_rows(task, split, 60, seed=3)
    assert rows == make_rows(task, split, 60, seed=3)
    assert rows != make_rows(task, split, 60, seed=4)
    for row in rows:
        assert roles(row) == ["user", "assistant"]
        assert row["task"] == task and prompt(row).startswith(PREFIXES[task]) and answer(row)
        assert prompt(row).isascii() and not re.search(r"[{}]|  ", prompt(row))
        assert ("final" in row) == (task == "math")


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_comes_twice_in_or_across_splits(task: str) -> None:
    train = [prompt(r) for r in make_rows(task, "train", distinct_rows(task, "train"))]
    test = [prompt(r) for r in make_rows(task, "test", distinct_rows(task, "test"))]
    assert len(set(train)) == len(train) >= 400
    assert len(set(test)) == len(test) >= 120
    assert not set(train) & set(test)


@pytest.mark.parametrize("task", TASKS)
def test_test_wording_is_far_from_train_wording(task: str) -> None:
    train, test = make_rows(task, "train", 160), make_rows(task, "test", 60)
    across, within = overlap(test, train), overlap(train, train)
    assert across < 0.30
    assert across < 0.5 * within


@pytest.mark.parametrize("slot", sorted(set(WORDS["train"]) - {"carrier"}))
def test_no_slot_value_is_shared_by_the_splits(slot: str) -> None:
    assert not set(WORDS["train"][slot]) & set(WORDS["test"][slot])


@pytest.mark.parametrize("split", SPLITS)
def test_math_answers_are_right(split: str) -> None:
    for row in make_rows("math", split, distinct_rows("math", split)):
        a, b = (int(number) for number in re.findall(r"\d+", prompt(row)))
        expected = a - b if TAKES_AWAY.search(prompt(row)) else a + b
        assert answer(row) == row["final"] == str(expected)
        assert 0 <= expected <= 20


@pytest.mark.parametrize("split", SPLITS)
def test_code_answers_parse_and_name_the_numbers_of_the_request(split: str) -> None:
    lengths: Counter[int] = Counter()
    for row in make_rows("code", split, distinct_rows("code", split)):
        commands = answer(row).split("; ")
        assert all(COMMAND.fullmatch(command) for command in commands), answer(row)
        asked = re.findall(r"\d|\bonce\b|\btwice\b", prompt(row))
        asked = [{"once": "1", "twice": "2"}.get(number, number) for number in asked]
        assert asked == re.findall(r"\d", answer(row)), (prompt(row), answer(row))
        lengths[len(commands)] += 1
    assert set(lengths) == {1, 2} and min(lengths.values()) > 0.2 * sum(lengths.values())


@pytest.mark.parametrize(("split", "n"), [("train", 160), ("test", 60), ("train", 30)])
def test_labels_are_balanced(split: str, n: int) -> None:
    home = Counter(answer(r) for r in make_rows("home", split, n))
    math = Counter(bool(TAKES_AWAY.search(prompt(r))) for r in make_rows("math", split, n))
    code = Counter(answer(r).split()[0].rstrip(";") for r in make_rows("code", split, n))
    assert (len(home), len(math), len(code)) == (12, 2, 8)
    for counts in (home, math, code):
        assert max(counts.values()) - min(counts.values()) <= 1
    assert all(1 <= len(label.split()) <= 3 for label in home)


def test_a_label_means_the_same_in_both_splits() -> None:
    labels = [{answer(r) for r in make_rows("home", split, 120)} for split in SPLITS]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_too_many_rows_are_refused(task: str, split: str) -> None:
    most = distinct_rows(task, split)
    assert len(make_rows(task, split, most)) == most
    with pytest.raises(ValueError, match=f"between 1 and {most} .*got {most + 1}"):
        make_rows(task, split, most + 1)
    with pytest.raises(ValueError, match="got 0"):
        make_rows(task, split, 0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="one of home, math, code, got 'poetry'"):
        make_rows("poetry", "train", 1)
    with pytest.raises(ValueError, match="train or test, got 'dev'"):
        make_rows("home", "dev", 1)


def test_write_stream_and_command_line_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stream(tmp_path / "a", n_train=24, n_test=12, seed=5)
    argv = ["demo_data.py", str(tmp_path / "b"), "--train", "24", "--test", "12", "--seed", "5"]
    monkeypatch.setattr("sys.argv", argv)
    main()
    assert json.loads((tmp_path / "a/order.json").read_text()) == ["home", "math", "code"]
    for name in [f"{split}/{task}.jsonl" for split in SPLITS for task in TASKS]:
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert rows == make_rows(Path(name).stem, name.split("/")[0], 24 if "train" in name else 12, seed=5)


def sentences(name: str) -> set[str]:
    text = " ".join((PROSE / name).read_text(encoding="ascii").split())  # ascii: fails on anything else
    return {s.strip(' "').lower() for s in re.split(r"(?<=[.!?])\"?\s", text)}


def fivegrams(name: str) -> set[tuple[str, ...]]:
    tokens = re.findall(r"[a-z']+", (PROSE / name).read_text(encoding="ascii").lower())
    return set(zip(tokens, tokens[1:], tokens[2:], tokens[3:], tokens[4:], strict=False))


def test_anchor_and_prose_share_no_sentence() -> None:
    assert not sentences("prose.txt") & sentences("anchor.txt")
    assert len(fivegrams("prose.txt") & fivegrams("anchor.txt")) == 0


@pytest.mark.parametrize("name", ["prose.txt", "anchor.txt"])
def test_prose_files_are_plain_english_of_the_stated_size(name: str) -> None:
    text = (PROSE / name).read_text(encoding="ascii")
    assert 2000 <= len(text.split()) <= 2500
    assert not re.search(r"^\s*([-*#>]|\d+\.)", text, flags=re.MULTILINE)
    assert not re.search(r"\b(AI|robot|neural|language models?|computers?)\b", text)
    if name == "anchor.txt":
        assert all(60 <= len(part.split()) <= 120 for part in text.strip().split("\n\n"))


@pytest.mark.parametrize("name", ["prose.txt", "anchor.txt"])
def test_prose_files_hold_nothing_of_the_data_sets(name: str) -> None:
    text = " ".join((PROSE / name).read_text(encoding="ascii").lower().split())
    rows = [row for task in TASKS for split in SPLITS for row in make_rows(task, split, distinct_rows(task, split))]
    said = {prompt(row).removeprefix(PREFIXES[str(row["task"])]).lower() for row in rows}
    assert not [s for s in said if s in text]
