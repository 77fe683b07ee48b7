"""What precision a model can take, at the terminal: probe."""

from __future__ import annotations

import textwrap
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ..errors import DataError
from .output import console, json_option, print_json, progress_bar, safe

if TYPE_CHECKING:
    from edgecl_convert import ProbeReport

_WIDTH = 80


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Measure on this file (16,384 tokens of it at most); default: a short text of our own.",
)
@click.option("--group-size", default=128, show_default=True, type=click.IntRange(1), help="Weights that share a scale.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw gaps and kurtosis to a .png, .svg or .pdf file.")
@json_option
def probe(models: tuple[str, ...], text: Path | None, group_size: int, plot: Path | None, as_json: bool) -> None:
    """Measure what INT8 and INT4 would cost each of MODELS: GGUF files, Hugging Face folders, or smollm2."""
    from edgecl_convert import check_plot, check_probeable, draw_probes, open_source
    from edgecl_convert import probe as probe_source

    from ..places import find_model

    if plot:
        check_plot(plot)
    words = _read(text) if text else ""
    with ExitStack() as stack, progress_bar() as progress:
        sources = [open_source(find_model(model)) for model in models]
        for source in sources:  # all of them, before the first is measured
            stack.callback(source.close)
            check_probeable(source)
        reports = []
        for source in sources:
            name = source.path.name
            step = None if progress is None else lambda done, total, what, name=name: progress(name[:20], done, total, what)
            reports.append(probe_source(source, words, group_size, progress=step))
    if plot:
        draw_probes(reports, plot)
    if as_json:
        print_json({"models": [asdict(report) for report in reports]})
        return
    _print(reports)
    if plot:
        click.echo(safe(f"\nwritten: {plot}"))


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; give a text file") from None
    if not text.strip():
        raise DataError(f"{path}: has no text; give a text file")
    return text


def _print(reports: list[ProbeReport]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", max_width=18, no_wrap=True)
    groups = f"groups\nof {reports[0].group_size}"
    for name in ("perplexity", "INT8", "INT4", f"INT8\n{groups}", f"INT4\n{groups}", "median\nkurtosis", "on INT4\ngrid"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        percents = (report.gaps[key].percent for key in ("int8", "int4", "int8_group", "int4_group"))
        gaps = [f"{percent:+.{2 if abs(percent) < 10 else 0}f}%" for percent in percents]
        row = [f"{report.perplexity:.2f}", *gaps, f"{report.kurtosis_median:.2f}", f"{report.erased:.0%}"]
        table.add_row(safe(Path(report.model).name), *row)
    out = console()
    out.print(table, soft_wrap=False)
    for report in reports:
        click.echo("")
        for line in _details(report):
            click.echo(textwrap.fill(safe(line), _WIDTH, subsequent_indent="  "))


def _details(report: ProbeReport) -> list[str]:
    types = ", ".join(f"{n / report.n_weights:.0%} {name}" for name, n in report.qtypes.items())
    gaps = ", ".join(f"{gap.how} {gap.percent:+.2f}% (±{gap.margin:.2f})" for gap in report.gaps.values())
    heaviest = max(report.tensors, key=lambda tensor: tensor.kurtosis)
    grids = ", ".join(f"{name} {share:.0%}" for name, share in report.on_grid.items())
    return [
        f"{Path(report.model).name}: {report.n_weights / 1e6:.3g}M weights ({types})",
        f"perplexity {report.perplexity:.2f} on {report.n_tokens} tokens; {gaps}",
        f"excess kurtosis: median {report.kurtosis_median:.2f}, largest {heaviest.kurtosis:.2f} ({heaviest.name})",
        f"on a grid already: {grids}",
        report.verdict,
    ]


COMMANDS = (probe,)
