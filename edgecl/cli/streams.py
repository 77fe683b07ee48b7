"""Streams of nights: stream, demo."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from rich.table import Table

from ..errors import DataError, SettingError
from ..learner import GATES
from ..metrics import plasticity_retention
from ..profile import ReplaySettings, served_at
from ..stream import Cell, Stream, run_stream
from .output import console, json_option, print_json, progress_bar, safe, size

LABELS = {"acc": "ACC", "bwt": "BWT", "fwt": "FWT"}  # of metrics that are known by other names than their keys


def _numbers(text: str, kind: type, name: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise SettingError(f"{name} must be a comma-separated list of numbers, got {text!r}") from None


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2", show_default=True)
@click.option("--quant", default="int8", show_default=True, help="What is served; a list runs as a grid.")
@click.option("--precision", default="", help="Of the base, instead of --quant: f16, int8, int4; a list runs as a grid.")
@click.option("--replay", default="0.1", show_default=True, help="Share of each night's rows kept; a list runs as a grid.")
@click.option(
    "--written",
    default=ReplaySettings.written,
    show_default=True,
    type=click.IntRange(0),
    help="Rows, at most, that earlier nights' models write each night, to rehearse.",
)
@click.option("--seed", default="0", show_default=True, help="A list runs as a grid.")
@click.option("--order", default="", help="Tasks, in order; default: FOLDER/order.json, or the names.")
@click.option("--train-limit", default=0, type=click.IntRange(0), help="Rows a night (0: all).")
@click.option("--test-limit", default=0, type=click.IntRange(0), help="Test rows a task (0: all).")
@click.option("--joint", is_flag=True, help="All tasks in one night: the ceiling.")
@click.option(
    "--gate",
    type=click.Choice(GATES),
    default="report",
    show_default=True,
    help="report: publish every night, whatever the verdict; enforce: refuse.",
)
@json_option
@click.pass_obj
def stream(
    home: Path | None,
    folder: Path,
    model: str,
    quant: str,
    precision: str,
    replay: str,
    written: int,
    seed: str,
    order: str,
    train_limit: int,
    test_limit: int,
    joint: bool,
    gate: str,
    as_json: bool,
) -> None:
    """Learn FOLDER's tasks one night each, and measure every task after every night.

    FOLDER holds train/TASK.jsonl and test/TASK.jsonl. Its home is temporary unless --home names a folder of
    its own (EDGECL_HOME does not count); there, finished cells of a grid are kept and not run again.
    """
    if click.get_current_context().find_root().get_parameter_source("home") is ParameterSource.ENVIRONMENT:
        home = None  # the learner's, of every day
    shares, seeds = _numbers(replay, float, "--replay"), _numbers(seed, int, "--seed")
    arms = [(served_at(p), p) for p in precision.split(",")] if precision else [(q, "") for q in quant.split(",")]
    names = order.split(",") if order else []
    grid = [[Cell(q, r, s, p, written, joint) for r, (q, p) in itertools.product(shares, arms)] for s in seeds]
    results: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for s, cells in zip(seeds, grid, strict=True):
            rows = Stream.read(folder, names, train_limit, test_limit, s)
            results += run_stream(rows, cells, model=model, home=home, gate=gate, progress=progress)
    if as_json:
        print_json(results[0] if len(results) == 1 else {"cells": results})
        return
    for result in results:
        print_stream(result)


def print_stream(result: dict[str, Any]) -> None:
    """Print the accuracy matrix of a stream and what its nights cost."""
    out = console()
    tasks, matrix = result["tasks"], np.array(result["matrix"], np.float64)
    base = f" on a base at {result['precision']}" if result["precision"] else ""
    rehearsed = f"{result['replay']:.1%} replay, at most {result['written']} rows written a night"
    out.print(f"\n{result['quant']}{base}, {rehearsed}, seed {result['seed']}")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("night", no_wrap=True)
    for name in (*(str(j + 1) for j in range(len(tasks))), "prose"):
        table.add_column(name, no_wrap=True, justify="right")
    for i, task in enumerate(tasks):
        cells = [f"{x:.0%}" if j <= i else "" for j, x in enumerate(matrix[i])]
        prose = result["nights"][i]["prose"]
        table.add_row(f"{i + 1} {safe(task)}", *cells, f"{prose['after'] - prose['base']:+.2f}" if "after" in prose else "")
    out.print("accuracy after each night, by task; nats a token of prose against the base")
    out.width = max(out.width, out.measure(table, options=out.options.update(max_width=10_000)).maximum)  # whole lines
    out.print(table)
    plasticity, retention = plasticity_retention(matrix)[-1]
    measured = {name: result[name] for name in ("acc", "bwt", "fwt", "forgetting")}
    table = Table("", "measured", "95% interval over the test rows", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, value in {**measured, "plasticity": plasticity, "retention": retention}.items():
        found = result["intervals"].get(name)  # cells of earlier versions have not all of them
        table.add_row(LABELS.get(name, name), f"{value:.3f}", f"{found[0]:.3f} to {found[1]:.3f}" if found else "")
    out.print(table)
    if gap := result.get("against_int8"):  # cells of earlier versions that served INT8 have none
        out.print(
            f"the last night at {gap.get('quant', result['quant'])} against INT8, {gap['n_rows']} rows: "
            f"answer loss {gap['answer_loss_nats']:+.4f} nats ({gap['low']:+.4f} to {gap['high']:+.4f}), "
            f"accuracy {gap['accuracy']:+.1%}"
        )


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """The whole story on the packaged model: three nights, with rehearsal and without, at INT8 and INT4."""
    from ..demo import run_demo

    began = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}; choose another --out") from None
    say = None if as_json else lambda text: click.echo(text, err=True)
    with progress_bar() as progress:
        report = run_demo(say, progress)
    report["seconds"] = round(time.perf_counter() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    from ..demo import draw

    picture = draw(report, out / "retention.png")
    if as_json:
        print_json(report)
        return
    _print_demo(report)
    click.echo(f"\n{report['seconds']:.0f} s; written: {out / 'report.json'}" + (f", {picture}" if picture else ""))


def _print_demo(report: dict[str, Any]) -> None:
    out = console()
    with_replay, without = report["replay"], report["control"]
    for title, result in (("With rehearsal", with_replay), ("Without rehearsal (control)", without)):
        out.print(f"\n{title}: accuracy of the served file after each night")
        _matrix(out, result)
    first = with_replay["tasks"][0]
    out.print(
        f"\nAfter three nights the model answers {with_replay['matrix'][-1][0]:.0%} of task one ({safe(first)}); "
        f"without rehearsal {without['matrix'][-1][0]:.0%}."
    )
    table = Table("night", "before", "adapter", "INT8", "INT4", "kept at INT8", "at INT4", box=None, pad_edge=False)
    for night in with_replay["nights"]:
        losses, kept = night["losses"], night["survival"]
        row = [f"{losses[key]:.2f}" for key in ("before", "adapter", "int8", "int4")]
        table.add_row(safe(night["task"]), *row, f"{kept['int8']:.0%}", f"{kept['int4']:.0%}")
    out.print("\nSurvival: answer loss (nats) on held-out rows, unmerged adapter against the merged files")
    out.print(table)
    table = Table("file", "size", "prefill", "decode", "first token", "per token p95", box=None, pad_edge=False)
    for name, facts in report["latency"].items():
        table.add_row(
            name.upper(),
            size(facts["model_bytes"]),
            f"{facts['pp512']:.0f} tok/s",
            f"{facts['tg128']:.0f} tok/s",
            f"{facts['ttft_ms']:.0f} ms",
            f"{facts['itl_p95_ms']:.0f} ms",
        )
    out.print("\nLatency in llama.cpp, pp512 and tg128")
    out.print(table)


def _matrix(out: Any, result: dict[str, Any]) -> None:
    tasks: Sequence[str] = result["tasks"]
    table = Table("after night", *map(safe, tasks), box=None, pad_edge=False)
    table.add_row("0 (base)", *(f"{x:.0%}" for x in result["base"]), style="dim")
    for i, task in enumerate(tasks):
        cells = ["" if x is None or j > i else f"{x:.0%}" for j, x in enumerate(result["matrix"][i])]
        table.add_row(f"{i + 1} ({safe(task)})", *cells)
    out.print(table)
    out.print(f"ACC {result['acc']:.2f}, BWT {result['bwt']:+.2f}, forgetting {result['forgetting']:.2f}")


COMMANDS = (stream, demo)
