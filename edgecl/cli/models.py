"""The conversion stage at the terminal: convert, merge."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ..child import Limits, Progress, run_stage
from ..errors import EdgeclError, SettingError
from .output import json_option, print_json, progress_bar, safe, size


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise SettingError(f"{target} exists already; choose another name, or give --force")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--quant", required=True, help="int8, int4, a tensor type (Q8_0, F16 ...) or a mixture (Q4_K_M).")
@click.option(
    "--imatrix", "matrix_file", type=click.Path(path_type=Path), help="A GGUF imatrix, or a .txt to measure on: needs torch."
)
@click.option("--size-budget", type=click.IntRange(min=1), help="Most bytes of an int4 file; else as Q4_K_M.")
@click.option("--verify", "check", is_flag=True, help="Compare TARGET's token ids and logits with SOURCE's afterwards.")
@click.option("--force", is_flag=True, help="Overwrite TARGET.")
@json_option
def convert(
    source: Path,
    target: Path,
    quant: str,
    matrix_file: Path | None,
    size_budget: int | None,
    check: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE, a GGUF file or a Hugging Face folder, to TARGET.gguf.

    With --imatrix, int4 of a float model gives each tensor the type that its measured sensitivity asks for.
    """
    from edgecl_convert import check_output, check_quant, choose_recipe, merge, open_source, read_or_measure

    _check_target(target, force)
    check_quant(quant, size_budget or 0)
    with open_source(source) as model, progress_bar() as progress:
        check_output(model, target)  # before minutes of measuring
        matrix = read_or_measure(matrix_file, model) if matrix_file else None
        recipe = choose_recipe(model, quant, matrix, size_budget or 0, progress=_stage(progress, "choose types"))
        report = merge(model, None, target, recipe, progress=_stage(progress, "convert"), imatrix=matrix)
    facts = {
        "convert_s": report.merge_s,
        "model_bytes": report.model_bytes,
        "qtypes": report.qtypes,
        "notes": report.notes,
        "quant": recipe.quant,
    }
    if recipe.types:
        facts["types"] = {name: qtype.name for name, qtype in recipe.types.items()}
        facts["predicted_nats"] = recipe.predicted_nats
    verified = _verify(source, target) if check else None
    if as_json:
        print_json(facts | ({"verify": verified} if verified else {}))
    else:
        _say_notes(report.notes)
        types = ", ".join(f"{n} {name}" for name, n in report.qtypes.items())
        click.echo(safe(f"{target}: {size(report.model_bytes)} in {report.merge_s:.1f} s ({types})"))
    if verified:
        _say_verified(target, verified, as_json)


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(safe(note), err=True)


def _verify(source: Path, target: Path) -> dict[str, Any]:
    """Return verify's report, made in a child process: what llama.cpp does to it does not end this one."""
    request = {"source": str(source), "gguf": str(target)}
    return run_stage("verify", request, Limits(ram_bytes=sys.maxsize, seconds=math.inf))[0]


def _say_verified(target: Path, report: dict[str, Any], as_json: bool) -> None:
    if not report["ok"]:
        raise EdgeclError(f"{target}: not verified: {report['failure']}")
    if not as_json:
        _say_notes(f"note: {limit}" for limit in report["limits"])
        limited = f" ({report['texts_limited']} as near as llama.cpp can)" if report["texts_limited"] else ""
        click.echo(
            f"verified: ids of {report['texts']} texts{limited}, "
            f"KLD {report['kld_nats']:.2g} nats, top-1 {report['top1']:.1%} over {report['n_tokens']} tokens"
        )


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quant", default="keep", show_default=True, help="keep: each tensor its type; or a type for all weights.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="stochastic", show_default=True)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@json_option
def merge(base: Path, adapter: Path, out: Path, quant: str, rounding: str, force: bool, as_json: bool) -> None:
    """Merge ADAPTER (a GGUF LoRA file or a PEFT folder) into BASE.gguf, written to OUT.gguf."""
    from edgecl_convert import GgufFile, read_adapter, resolve_quant, update_survival
    from edgecl_convert import merge as merge_files

    from ..generations import sha256_file

    _check_target(out, force)
    with GgufFile(base) as gguf, progress_bar() as progress:
        lora = read_adapter(adapter, gguf)
        if lora.base_sha256:
            lora.check_hash(sha256_file(base))
        qtype = resolve_quant(quant, gguf, learned=True)
        report = merge_files(gguf, lora, out, qtype, rounding, progress=_stage(progress, "merge"))
        with GgufFile(out) as merged:
            kept = update_survival(gguf, lora, merged)
    facts = {
        "merge_s": report.merge_s,
        "survival": kept,
        "model_bytes": report.model_bytes,
        "qtypes": report.qtypes,
        "notes": report.notes,
        "rounded": report.rounded,
        "copied": report.copied,
    }
    if as_json:
        print_json(facts)
    else:
        _say_notes(report.notes)
        click.echo(safe(f"{out}: {size(report.model_bytes)} in {report.merge_s:.1f} s, {kept:.1%} of the update survives"))


def _stage(progress: Progress | None, name: str) -> Callable[[int, int, str], None] | None:
    return None if progress is None else lambda done, total, text: progress(name, done, total, text)


COMMANDS = (convert, merge)
