"""The verdicts of the grid: they follow the rows, seeds that are not whole are left out, pictures are drawn; its noisy base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecl_convert import GgufFile, merge
from examples.less_is_more import noisy_base, verdicts
from tests import tiny

TASKS, SHARES, N_ROWS = ["words", "sums", "code"], (0.0, 0.001, 0.02, 0.05, 0.1), 40


def scores(share_right: float) -> dict[str, Any]:
    n_right = round(share_right * N_ROWS)
    return {"right": "1" * n_right + "0" * (N_ROWS - n_right), "loss_nats": [0.5] * N_ROWS}


def cell(arm: str, share: float, seed: int) -> dict[str, Any]:
    """Return a cell in which F16 learns the first task best, INT8 the others, and the first is lost without a buffer."""
    kept = {0.0: 0.1, 0.001: 0.4, 0.02: 0.8}.get(share, 0.8)
    own = {"words": 0.95 if arm == "f16" else 0.8, "sums": 0.8 if arm == "int8" else 0.5, "code": 0.05}
    rows = []
    for after in range(3):
        rows.append({task: scores(own[task] if i == after else kept * own[task]) for i, task in enumerate(TASKS[: after + 2])})
    return {"precision": arm, "replay": share, "seed": seed, "tasks": TASKS, "rows": rows}


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    for arm in ("f16", "int8", "int4"):
        for share in SHARES:
            for seed in (0, 1, 2):
                if (arm, share, seed) != ("int4", 0.1, 2):
                    (tmp_path / f"base-{arm}-{share}-{seed}.json").write_text(json.dumps(cell(arm, share, seed)))
    return tmp_path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for task in TASKS:
            answers = ["same"] * N_ROWS if task == "code" else [str(i) for i in range(N_ROWS)]
            lines = (json.dumps({"prompt": f"{task} {i}", "completion": answer}) for i, answer in enumerate(answers))
            (tmp_path / split / f"{task}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_verdicts_follow_the_rows(cells: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    bench = cells / "bench.json"
    bench.write_text(json.dumps({"f16": {"tg128": 10.0, "pp512": 100.0}, "int8": {"tg128": 25.0, "pp512": 90.0}}))
    out = cells / "out"
    monkeypatch.setattr("sys.argv", ["verdicts.py", str(cells), str(data), "--bench", str(bench), "--out", str(out)])
    verdicts.main()
    found = json.loads((out / "verdicts.json").read_text())
    assert found["seeds"] == [0, 1], "a seed that lacks a cell is left out"
    assert found["beats_majority"] == {"words": True, "sums": True, "code": False}
    by_part = {(v["claim"], v["part"]): v for v in found["verdicts"]}
    assert len(by_part) == len(found["verdicts"])

    def verdict(claim: str, part: str) -> str:
        (one,) = (v["verdict"] for v in found["verdicts"] if claim in v["claim"] and part in v["part"])
        return str(one)

    assert verdict("best on the first", "Q8_0") == verdict("best on the first", "Q4_0") == "replicated"
    assert verdict("better on later", "Q8_0 − F16, sums") == "replicated"
    assert verdict("better on later", "Q4_0 − F16, sums") == "not replicated"
    assert verdict("better on later", "Q8_0 − F16, code").startswith("not testable")
    assert verdict("0.1% replay lifts", "F16") == "replicated"
    assert verdict("best balance", "Q4_0") == "replicated"
    assert verdict("suffices for words", "2%") == "replicated"
    assert verdict("suffices for code", "5%") == "not testable: the last stage"
    assert verdict("faster", "tg128") == "replicated" and verdict("faster", "pp512") == "not replicated"
    for gap in (v for v in found["verdicts"] if v["low"] is not None):
        assert gap["low"] <= gap["gap"] <= gap["high"]
    assert {path.name for path in out.glob("*.png")} == {"forward.png", "retention.png", "plasticity_retention.png"}
    assert capsys.readouterr().out.count("\n") == 2 + len(found["verdicts"])


def test_a_row_counts_once_at_however_many_shares_it_was_measured() -> None:
    rng = np.random.default_rng(0)
    rows = {arm: {task: "".join(map(str, rng.integers(0, 2, N_ROWS))) for task in TASKS} for arm in verdicts.ARMS}

    def found(shares: list[float]) -> list[verdicts.Verdict]:
        cells = [cell(arm, share, 0) for arm in rows for share in shares]
        for one in cells:
            one["rows"] = [{task: {"right": right} for task, right in rows[one["precision"]].items()}] * 3
        grid, usable = verdicts.Grid(cells), dict.fromkeys(range(3), True)
        return [*verdicts.later_tasks(grid, usable), *verdicts.balance(grid), *verdicts.less_replay(grid, usable)]

    once, often = found([0.02]), found([0.001, 0.02, 0.05])
    assert [(v.gap, v.low, v.high) for v in often] == [pytest.approx((v.gap, v.low, v.high)) for v in once]
    assert all(v.low < v.gap < v.high for v in once)


def test_a_gap_between_two_first_nights_is_no_gap_between_two_buffers() -> None:
    cells = [cell(arm, share, 0) for arm in verdicts.ARMS for share in SHARES]
    other = next(one for one in cells if (one["precision"], one["replay"]) == ("int4", 0.001))
    right = other["rows"][0]["words"]["right"]
    other["rows"][0]["words"]["right"] = right[::-1]  # as many are right, but not the same
    found = [verdict.verdict for verdict in verdicts.tiny_buffer(verdicts.Grid(cells))]
    assert found == ["replicated", "replicated", "not testable: the first nights differ"]


def test_cells_of_other_settings_are_no_grid() -> None:
    cells = [cell(arm, share, seed) for arm in verdicts.ARMS for share in SHARES for seed in (0, 1)]
    for one in cells:  # rows are of a seed, a quant is of an arm
        one["of"] = {"rows": str(one["seed"]), "quant": one["precision"], "base": "a", "train.epochs": 3}
    assert verdicts.Grid(cells).seeds == [0, 1]
    cells[-1]["of"] |= {"train.epochs": 2}
    with pytest.raises(SystemExit, match="cells are of 2 bases, versions or settings"):
        verdicts.Grid(cells)
    del cells[-1]["of"]
    with pytest.raises(SystemExit, match="cells are of 2 bases"):
        verdicts.Grid(cells)


def test_a_grid_without_a_whole_seed_is_refused_in_one_line(cells: Path) -> None:
    found = [json.loads(path.read_text()) for path in cells.glob("base-int4-0.1-*.json")]
    found += [json.loads(path.read_text()) for path in cells.glob("base-f16-0.05-2.json")]
    with pytest.raises(SystemExit, match="no seed has all cells of f16, int4"):
        verdicts.Grid(found)


def test_a_share_that_still_runs_is_left_out(cells: Path) -> None:
    found = [json.loads(path.read_text()) for path in cells.glob("base-*-0.0*-*.json")]
    assert verdicts.Grid(found).shares == [0.0, 0.001, 0.02, 0.05]
    found += [json.loads(path.read_text()) for path in cells.glob("base-f16-0.1-*.json")]  # the other precisions are to come
    grid = verdicts.Grid(found)
    assert grid.shares == [0.0, 0.001, 0.02, 0.05] and grid.seeds == [0, 1, 2]


def test_a_noisy_base_has_the_size_of_q4_0s_error_and_its_norms_untouched(tmp_path: Path) -> None:
    base = tiny.build(tmp_path / "base.gguf", width=128)[0]
    share = noisy_base.write_noisy(base, tmp_path / "noisy.gguf", seed=0)
    merge_paths = {quant: tmp_path / f"{quant}.gguf" for quant in ("F16", "Q4_0")}
    with GgufFile(base) as source:
        for quant, path in merge_paths.items():
            merge(source, None, path, quant)
    with GgufFile(tmp_path / "noisy.gguf") as noisy, GgufFile(merge_paths["F16"]) as plain, GgufFile(merge_paths["Q4_0"]) as q4:
        assert list(noisy.tensors) == list(plain.tensors)
        noise = error = total = 0.0
        for name in plain.tensors:
            weights = plain.weights(name)
            if "norm" in name:
                assert np.array_equal(noisy.weights(name), weights)
                continue
            noise += float(((noisy.weights(name) - weights) ** 2).sum())
            error += float(((q4.weights(name) - weights) ** 2).sum())
            total += float((weights**2).sum())
    assert noise == pytest.approx(error, rel=0.02)
    assert share == pytest.approx(error / total, rel=0.02)
