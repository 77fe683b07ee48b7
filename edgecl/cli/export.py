"""A generation for other programs: export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..export import FORMS
from ..export import export as export_generation
from ..learner import Learner
from .output import json_option, print_json, progress_bar, safe


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(FORMS), required=True, help="A merged GGUF, the PEFT adapter, or a Modelfile and a GGUF."
)
@click.option("--generation", "number", type=click.IntRange(0), help="Default: the one that serves.")
@click.option("--force", is_flag=True, help="Write into DIR though it is not empty.")
@json_option
@click.pass_obj
def export(home: Path | None, folder: Path, to: str, number: int | None, force: bool, as_json: bool) -> None:
    """Write a generation to DIR for llama.cpp, for transformers and peft, or for ollama."""
    with Learner(home) as learner, progress_bar() as progress:
        report = export_generation(learner, to, folder, number, force=force, progress=progress)
    if as_json:
        print_json(asdict(report))
        return
    for note in report.notes:
        click.echo(safe(note), err=True)
    click.echo(f"generation {report.generation}: {', '.join(report.files)} in {safe(report.folder)}")
    if "Modelfile" in report.files:
        click.echo(f"next: ollama create NAME -f {safe(str(folder / 'Modelfile'))}")


COMMANDS = (export,)
