"""The comparison with the peer: what it reads, what it counts, and which kept runs it reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.compare_training import N_TRAIN, Cells, chats, rows_met
from tests import tiny

QUESTION, ANSWER = {"role": "user", "content": " Who \n waters?"}, {"role": "assistant", "content": "Mira."}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_rows_are_read_in_every_dialect_and_without_a_system_turn(tmp_path: Path) -> None:
    pairs = {
        (" Who \n waters?", "Mira."): {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]},
        ("When?", "Now."): {"prompt": "When?", "completion": "Now."},
        ("Add.\n\n1 2", "3"): {"instruction": "Add.", "input": "1 2", "output": "3"},
    }
    train, heldout = chats(write(tmp_path / "rows.jsonl", *pairs.values()), seed=0)
    assert len(heldout) == 1 and {*train, *heldout} == set(pairs)
    assert len(chats(None, seed=0)[0]) == N_TRAIN


def test_what_cannot_be_compared_is_said_with_its_file(tmp_path: Path) -> None:
    good = {"messages": [QUESTION, ANSWER]}
    for record, reason in (
        ({"text": "?"}, r"rows\.jsonl, line 2: unknown keys 'text'"),
        ({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}, r"rows\.jsonl: chats must be of one question .*, 1 are not"),
    ):
        with pytest.raises(SystemExit, match=reason):
            chats(write(tmp_path / "rows.jsonl", good, record), seed=0)


@pytest.mark.parametrize(("n_rows", "n_steps", "n_met"), [(300, 114, 900), (300, 6, 48), (300, 38, 300), (8, 3, 24), (3, 2, 6)])
def test_the_last_batch_of_an_epoch_has_the_rows_that_are_left(n_rows: int, n_steps: int, n_met: int) -> None:
    assert rows_met(n_rows, n_steps) == n_met


@pytest.mark.alone
def test_a_run_is_read_back_only_where_the_same_is_asked_for(tmp_path: Path) -> None:
    model, cells = str(tiny.build(tmp_path / "tiny.gguf")[0]), Cells(tmp_path / "out")
    path = tmp_path / "out/large.json"
    first = cells.run("large", "large", {"ram_bytes": 4_000_000_000}, model=model)
    written = path.stat().st_mtime_ns
    assert first["steps"] == 3 and first["date"]
    again = Cells(tmp_path / "out").run("large", "large", {"ram_bytes": 4_000_000_000}, model="elsewhere")
    assert again == first and path.stat().st_mtime_ns == written
    other = cells.run("large", "large", {"ram_bytes": 3_000_000_000}, model=model)
    assert path.stat().st_mtime_ns != written and other["steps"] == 3
    assert cells.found("large", {"ram_bytes": 4_000_000_000}) is None
    path.write_text(json.dumps(first))  # as an older version kept it
    assert cells.found("large", {"ram_bytes": 3_000_000_000}) is None
    assert [one.name for one in path.parent.iterdir()] == ["large.json"]
