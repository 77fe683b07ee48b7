"""A stream on a tiny model: its matrix, the comparison with INT8, cells that are not run again, data that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner

from edgecl import Learner
from edgecl.cli import cli, streams
from edgecl.cli.streams import print_stream
from edgecl.errors import DataError, EdgeclError, NotNow, SettingError
from edgecl.gate import GateSettings
from edgecl.generations import unpublished
from edgecl.lock import night_lock
from edgecl.profile import ReplaySettings, TrainSettings
from edgecl.stream import Cell, Stream, _Run, run_stream
from edgecl_convert import GgufFile, merge, read_gguf_adapter
from tests import tiny

TRAIN = TrainSettings(r=4, lora_alpha=8.0, depth=1.0, epochs=1, min_steps=10, learning_rate=0.02, anchor_weight=0.0)
WORDS = {"left": ("anne", "the inn", "a hen"), "right": ("then", "an ant", "in tea")}


def write_data(folder: Path) -> Stream:
    """Write two tasks of three rows each, tested on the rows they are trained on."""
    for task, words in WORDS.items():
        lines = "".join(json.dumps({"prompt": word, "completion": task}) + "\n" for word in words)
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True, exist_ok=True)
            (folder / split / f"{task}.jsonl").write_text(lines)
    return Stream.read(folder)


def mean_loss(result: dict[str, Any]) -> float:
    """Return the mean answer loss over the test rows of both tasks after the last night."""
    return sum(sum(rows["loss_nats"]) for rows in result["rows"][-1].values()) / 6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path, Path, Stream]:
    folder = tmp_path_factory.mktemp("stream")
    base = tiny.build(folder / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, width=128)[0]
    stream = write_data(folder)
    cells = [Cell(quant="int4", replay=0.5, written=8), Cell(quant="int4", replay=0.0, written=0)]
    return list(run_stream(stream, cells, model=str(base), home=folder / "cells", train=TRAIN)), folder / "cells", base, stream


def test_a_cell_on_a_base_of_a_precision_is_kept_under_its_own_name(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, _, base, stream = results
    cells = [Cell("int8", share, precision="int8", written=n) for share, n in ((0.5, 8), (0.0, 0))]
    found = list(run_stream(stream, cells, model=str(base), home=tmp_path, train=TRAIN))
    assert [result["precision"] for result in found] == ["int8", "int8"]
    assert found[0]["matrix"][0] == found[1]["matrix"][0]
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{cell.name}.json" for cell in cells}


def test_a_cell_reports_how_far_int4_is_from_int8(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, _, base, stream = results
    for result in cells:
        against = result["against_int8"]
        assert against["n_rows"] == 6
        assert against["low"] <= against["answer_loss_nats"] <= against["high"]
        assert against["low"] < against["high"], "an interval over rows that all differ has a width"
        assert -1 <= against["accuracy"] <= 1
    # without written rows, nights are the same at 6 bits and more: so a cell's comparison is that of the two
    pair = [Cell(quant, replay=1.0, written=0) for quant in ("Q5_1", "int8")]
    at_int4 = []  # right and loss of each test row, of the last adapter of each cell
    real = _Run._against_int8

    def watched(run: _Run, learner: Learner, served: dict[str, Any]) -> dict[str, Any]:
        adapter = read_gguf_adapter(learner.generations.current().folder / "adapter.gguf")
        with GgufFile(base) as file:
            merge(file, adapter, tmp_path / "int4.gguf", "keep_minimums")
        rows = [row for task in stream.tasks for row in stream.test[task]]
        scores = learner.meter().scores(unpublished(tmp_path, tmp_path / "int4.gguf", None), rows)
        at_int4.append([(score.correct, score.loss_nats) for score in scores.values()])
        return real(run, learner, served)

    monkeypatch.setattr(_Run, "_against_int8", watched)
    fewer, int8 = run_stream(stream, pair, model=str(base), home=tmp_path, train=TRAIN)
    right, losses = zip(*at_int4[1], strict=True)
    expected = {"Q5_1": (fewer["acc"], mean_loss(fewer)), "int4": (sum(right) / 6, sum(losses) / 6)}
    for result, (quant, (acc, loss)) in zip((fewer, int8), expected.items(), strict=True):
        against = result["against_int8"]
        assert against["quant"] == quant
        assert against["accuracy"] == pytest.approx(acc - int8["acc"], abs=1e-6)
        # the files are the same, bit for bit, but a row's loss depends a little on the rows measured beside it
        assert against["answer_loss_nats"] == pytest.approx(loss - mean_loss(int8), abs=5e-3)


@pytest.mark.parametrize(
    ("quant", "less", "serves", "rate", "least"),
    [("Q4_0", "Q4_0", "model-Q8_0.gguf", 0.01, 0.85), ("int8", "int4", "base + adapter", 0.002, 1.0)],
)
def test_where_another_type_serves_int8_is_compared_with_the_wanted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, less: str, serves: str, rate: float, least: float
) -> None:
    base = tiny.build(tmp_path / "tiny.gguf", qtype=gguf.GGMLQuantizationType.F16, width=128)[0]
    stream = write_data(tmp_path)
    gate, init, real, expected = GateSettings(min_survival=least), Learner.init, _Run._against_int8, []
    monkeypatch.setattr(Learner, "init", lambda *args, **told: init(*args, **told, gate=gate))

    def watched(run: _Run, learner: Learner, served: dict[str, Any]) -> dict[str, Any] | None:
        adapter = read_gguf_adapter(learner.generations.current().folder / "adapter.gguf")
        rows = [row for task in stream.tasks for row in stream.test[task]]
        with GgufFile(base) as file:
            for qtype in ("Q4_1" if less == "int4" else less, "Q8_0"):
                merge(file, adapter, tmp_path / f"{qtype}.gguf", qtype)
                scores = learner.meter().scores(unpublished(tmp_path, tmp_path / f"{qtype}.gguf", None), rows)
                expected.append(sum(score.loss_nats for score in scores.values()) / 6)
        return real(run, learner, served)

    monkeypatch.setattr(_Run, "_against_int8", watched)
    little = replace(TRAIN, min_steps=2, learning_rate=rate)
    cell = Cell(quant, replay=0.0, written=0)
    (found,) = run_stream(stream, [cell], model=str(base), home=tmp_path / "cells", train=little)
    assert found["nights"][-1]["served"] == serves
    against = found["against_int8"]
    assert against["quant"] == less and abs(expected[0] - expected[1]) > 0.01
    assert against["answer_loss_nats"] == pytest.approx(expected[0] - expected[1], abs=5e-3)


def test_the_matrix_has_what_was_measured_and_nothing_else(results: tuple[list[dict[str, Any]], Path, Path, Stream]) -> None:
    for result in results[0]:
        matrix = result["matrix"]
        assert all(value is not None for row in matrix for value in row)  # the second task is measured before it is learned
        assert result["acc"] == pytest.approx(sum(matrix[-1]) / 2, abs=1e-4)
        assert result["bwt"] == pytest.approx(matrix[1][0] - matrix[0][0], abs=1e-4)
        for name in ("acc", "bwt", "fwt", "forgetting"):
            low, high = result["intervals"][name]
            assert low <= result[name] <= high
        for task, base in zip(result["tasks"], result["base"], strict=True):
            assert result["base_rows"][task]["right"].count("1") / 3 == pytest.approx(base, abs=1e-4)
            assert len(result["base_rows"][task]["loss_nats"]) == 3
        losses = result["answer_loss_nats"]
        assert losses[1][1] < losses[0][1], "the second night did not learn its task"
        assert [night["task"] for night in result["nights"]] == ["left", "right"]
        for i, row in enumerate(result["rows"]):  # what intervals and comparisons of cells are made from
            for j, task in enumerate(result["tasks"]):
                assert row[task]["right"].count("1") / 3 == pytest.approx(matrix[i][j], abs=1e-4)
                assert sum(row[task]["loss_nats"]) / 3 == pytest.approx(losses[i][j], abs=1e-3)
    assert results[0][0]["matrix"][0] == results[0][1]["matrix"][0], "both cells have their first night in common"


def test_a_cell_that_shares_its_first_night_ends_where_a_learner_ends_that_ran_every_night(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, _, base, stream = results
    cells = [Cell(replay=share, written=0) for share in (1.0, 0.34)]
    *_, found = run_stream(stream, cells, model=str(base), home=tmp_path / "cells", train=TRAIN)
    replay = ReplaySettings(share=0.34, written=0)
    with Learner.init(base, tmp_path / "home", replay=replay, train=TRAIN) as learner:
        kept = []
        for task in stream.tasks:
            learner.observe(stream.train[task])
            kept.append(learner.adapt(gate="report").n_kept)
        tests = [row for task in stream.tasks for row in stream.test[task]]
        scores = learner.meter().scores(learner.generations.current(), tests)
    assert [night["n_kept"] for night in found["nights"]] == kept == [1, 1]
    last = found["rows"][-1]
    assert [last[row.task]["loss_nats"][stream.test[row.task].index(row)] for row in tests] == [
        pytest.approx(scores[row.hash].loss_nats, abs=1e-4) for row in tests
    ]


def test_a_stream_whose_nights_were_all_refused_has_a_result_and_is_printed(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, base, stream = results
    lame = replace(TRAIN, learning_rate=1e-7)
    (result,) = run_stream(stream, [Cell(written=0)], model=str(base), home=tmp_path, gate="enforce", train=lame)
    assert [n["accepted"] for n in result["nights"]] == [False, False] and result["against_int8"] is None
    del result["nights"][1]["prose"]["after"]  # as of a night that diverged
    print_stream(result)
    assert "accuracy after each night" in capsys.readouterr().out


def test_a_joint_cell_learns_all_tasks_in_one_night(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, _, base, stream = results
    cell = Cell(joint=True, written=8)
    (found,) = run_stream(stream, [cell], model=str(base), home=tmp_path, train=TRAIN)
    assert found["n_test"] == {"all": 6} and len(found["nights"]) == 1 and found["nights"][0]["n_new"] == 6
    assert found["acc"] == pytest.approx(found["matrix"][0][0], abs=1e-4) and found["bwt"] == found["forgetting"] == 0
    assert (tmp_path / "int8-joint-replay0.1-written8-seed0.json").is_file()


def test_a_finished_cell_is_read_back(results: tuple[list[dict[str, Any]], Path, Path, Stream]) -> None:
    first, home, base, stream = results
    path = home / "int4-replay0.5-written8-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"acc": 0.125}))
    again = list(run_stream(stream, [Cell(quant="int4", replay=0.5, written=8)], model=str(base), home=home, train=TRAIN))
    assert again[0]["acc"] == 0.125
    assert first[0]["tasks"] == again[0]["tasks"]
    assert not [entry for entry in home.iterdir() if entry.is_dir()], "the cells' homes are gone"


def test_a_finished_cell_is_not_read_back_for_other_rows_or_another_model(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, home, base, stream = results
    cell = Cell(quant="int4", replay=0.5, written=8)
    path = home / f"{cell.name}.json"
    before = path.read_bytes()
    fewer = replace(stream, train={task: rows[1:] for task, rows in stream.train.items()})
    reordered = replace(stream, tasks=stream.tasks[::-1])
    judged = replace(stream, test={task: [replace(row, final="7") for row in rows] for task, rows in stream.test.items()})
    other_base = tiny.build(tmp_path / base.name, qtype=gguf.GGMLQuantizationType.Q4_0, width=128, seed=1)[0]
    for other, model, gate, key in (
        (fewer, base, "report", "rows"),
        (reordered, base, "report", "rows"),
        (judged, base, "report", "rows"),
        (stream, other_base, "report", "base"),
        (stream, base, "enforce", "gate"),
    ):
        with pytest.raises(DataError, match="is of other rows") as caught:
            list(run_stream(other, [cell], model=str(model), home=home, train=TRAIN, gate=gate))
        said = str(caught.value)
        assert path.name in said and "--home" in said and "remove it" in said and f"({key} " in said and "\n" not in said
    with pytest.raises(DataError, match="gate report, now enforce"):
        list(run_stream(stream, [cell], model=str(base), home=home, train=TRAIN, gate="enforce"))
    with pytest.raises(DataError, match=r"\(train.epochs 1, now 2\)"):
        list(run_stream(stream, [cell], model=str(base), home=home, train=replace(TRAIN, epochs=2)))
    assert path.read_bytes() == before
    moved = base.rename(base.with_name("moved.gguf"))
    assert list(run_stream(stream, [cell], model=str(moved), home=home, train=TRAIN)), "the same bytes elsewhere"
    moved.rename(base)


def test_a_cell_that_does_not_say_what_it_is_of_is_refused_before_another_is_run(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    found, _, base, stream = results
    old = Cell(quant="int4", replay=0.0, written=0)
    path = tmp_path / f"{old.name}.json"
    for of in ({}, {"of": "0123456789abcdef"}):
        path.write_text(json.dumps({key: value for key, value in found[1].items() if key != "of"} | of))
        before = path.read_bytes()
        with pytest.raises(DataError, match=f"{old.name}.json: is of other rows.*earlier version.*--home"):
            next(run_stream(stream, [Cell(), old], model=str(base), home=tmp_path, train=TRAIN))
        assert path.read_bytes() == before and len(list(tmp_path.glob("*.json"))) == 1


def test_a_damaged_result_is_named_in_one_line(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, _, base, stream = results
    cell = Cell(written=0)
    first = tmp_path / "first" / cell.first_night
    first.mkdir(parents=True)
    for path in (tmp_path / f"{cell.name}.json", first / "measured.json"):
        for text in ('{"of": ', "7", "\xff"):
            path.write_bytes(text.encode("latin1"))
            home = path.parent if path.parent == tmp_path else tmp_path / "first"
            with pytest.raises(DataError, match=r"is damaged: .*; remove it") as caught:
                list(run_stream(stream, [cell], model=str(base), home=home, train=TRAIN))
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_stream_in_the_same_home_is_told_to_come_later(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, _, base, stream = results
    cell = Cell(written=0)
    begun = tmp_path / cell.first_night / "edgecl.toml"
    begun.parent.mkdir()
    begun.write_text("")
    with night_lock(tmp_path), pytest.raises(NotNow, match="another night is running"):
        list(run_stream(stream, [cell], model=str(base), home=tmp_path, train=TRAIN))
    assert begun.is_file(), "the first night of the other"
    running = run_stream(stream, [Cell(written=0, replay=0.0)], model=str(base), home=tmp_path / "b", train=TRAIN)
    next(running)
    with pytest.raises(NotNow):
        next(run_stream(stream, [cell], model=str(base), home=tmp_path / "b", train=TRAIN))
    assert list(running) == []
    with night_lock(tmp_path / "b"):
        pass


def test_a_quant_or_model_that_is_unknown_is_said_before_the_first_cell(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, _, base, stream = results
    home = tmp_path / "home"
    cells = [Cell(written=0), Cell("int9", written=0)]
    with pytest.raises(EdgeclError, match=r"quant must be one of .* got int9"):
        next(run_stream(stream, cells, model=str(base), home=home, train=TRAIN))
    with pytest.raises(EdgeclError, match=r"quant must be one of .* got int9"):
        next(run_stream(stream, cells[:1], model=str(base), home=home, train=TRAIN, compare=["int9"]))
    with pytest.raises(EdgeclError, match=r"missing\.gguf"):
        next(run_stream(stream, cells[:1], model=str(tmp_path / "missing.gguf"), home=home, train=TRAIN))
    assert not home.exists()


def test_the_home_of_every_day_is_no_place_for_a_stream(
    results: tuple[list[dict[str, Any]], Path, Path, Stream], tmp_path: Path
) -> None:
    _, home, base, _ = results
    (tmp_path / "edgecl.toml").write_text("")
    options = ["stream", str(home.parent), "--model", str(base), "--quant", "int9"]
    found = CliRunner().invoke(cli, options, env={"EDGECL_HOME": str(tmp_path)}).exception
    assert isinstance(found, EdgeclError) and "got int9" in str(found), "its place is temporary"
    found = CliRunner().invoke(cli, ["--home", str(tmp_path), *options]).exception
    assert isinstance(found, SettingError) and f"{tmp_path} is a learner's home" in str(found)
    assert [path.name for path in tmp_path.iterdir()] == ["edgecl.toml"]


@pytest.mark.parametrize("n", [1, 10, 20])
def test_a_matrix_of_ten_tasks_fits_80_columns_and_no_line_of_a_longer_one_breaks(
    n: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tasks = [f"{i} of_eighteen_chars"[:18] for i in range(n)]
    matrix = [[1.0 if j <= i else 0.5 if j == i + 1 else None for j in range(n)] for i in range(n)]
    intervals = dict.fromkeys(("acc", "bwt"), (-0.125, 0.875))  # of an earlier version, without FWT and forgetting
    facts = {"quant": "int8", "precision": "", "replay": 0.1, "written": 1200, "seed": 0, "acc": 1.0, "bwt": -0.5}
    night = {"prose": {"base": 3.0, "after": 3.25}}
    result = facts | {"fwt": 0.25, "forgetting": 0.5, "tasks": tasks, "matrix": matrix, "intervals": intervals}
    print_stream(result | {"nights": [night] * n})
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("night"))
    assert lines[begin].split() == ["night", *map(str, range(1, n + 1)), "prose"]
    for i, (line, task) in enumerate(zip(lines[begin + 1 :], tasks, strict=False)):
        assert line.startswith(f"{i + 1} {task}") and line.endswith("+0.25") and line.count("100%") == i + 1
    assert n > 10 or max(map(len, lines)) <= 80
    assert ["BWT", "-0.500", "-0.125", "to", "0.875"] in [line.split() for line in lines]
    assert ["FWT", "0.250"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--replay", "0.1,10"), "replay.share must be from 0 to 1, got 10.0"),
        (("--replay", "nan"), "replay.share must be from 0 to 1, got nan"),
        (("--seed", "0,-1"), "train.seed must be at least 0, got -1"),
    ],
)
def test_what_a_later_night_cannot_be_told_is_said_before_the_first(
    tmp_path: Path, options: tuple[str, ...], wanted: str
) -> None:
    write_data(tmp_path)
    arguments = [str(tmp_path), "--model", str(tmp_path / "missing.gguf"), *options]
    said = CliRunner().invoke(streams.stream, arguments, obj=tmp_path / "home").exception
    assert isinstance(said, SettingError) and str(said) == wanted
    assert not (tmp_path / "home").exists()
    with pytest.raises(SettingError, match=r"replay\.written must be at least 0, got -1"):
        Cell(written=-1)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [(("left", "left"), "twice"), (("nowhere",), "cannot be read"), (("empty",), "is empty"), (("broken",), "line 1")],
)
def test_data_that_cannot_be_a_stream_is_refused_in_one_line(tmp_path: Path, order: tuple[str, ...], wanted: str) -> None:
    write_data(tmp_path)
    (tmp_path / "train" / "empty.jsonl").write_text("")
    (tmp_path / "train" / "broken.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=wanted) as caught:
        Stream.read(tmp_path, order)
    assert "\n" not in str(caught.value)
