"""By day: init, observe, ask, status, history, rollback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..device import memory_bytes, propose_profile
from ..errors import DataError
from ..imports import read_history
from ..learner import Learner
from ..profile import PRECISIONS
from .output import console, json_option, local_time, note, print_json, redaction, safe, size


@click.command()
@click.argument("model")
@click.option("--quant", default="", help="What is served: int8, int4, keep, or a type. Default: the profile's.")
@click.option(
    "--precision",
    type=click.Choice([*PRECISIONS]),
    help="Write the base at it first and serve it so: nights train on exactly what they serve.",
)
@click.option("--profile", help="Limits: a profile's name, or the path of a TOML file. Default: what suits this machine.")
@click.option("--force", is_flag=True, help="Replace a home that exists, with its store and its generations.")
@json_option
@click.pass_obj
def init(
    home: Path | None, model: str, quant: str, precision: str | None, profile: str | None, force: bool, as_json: bool
) -> None:
    """Make a home for MODEL: a GGUF file, a Hugging Face folder, or `smollm2`, the packaged one."""
    proposed, machine = propose_profile()
    name, memory = profile or proposed, memory_bytes()
    with Learner.init(model, home, quant=quant, precision=precision or "", profile=name, force=force) as learner:
        status = learner.status() | {"profile": name}
        asked = learner.profile.ram_bytes
    if memory and memory < asked:
        has = f"a night may take {size(asked)} of memory (ram_bytes in {name}), and the machine has {size(memory)}"
        click.echo(safe(f"{has}: nightly waits for as much to be free; give --profile a copy with less"), err=True)
    if as_json:
        print_json(status)
        return
    base = Path(status["base"]).name
    click.echo(safe(f"{status['home']} is ready: it serves {base}, and will serve {status['quant']}"))
    why = "" if profile else f", proposed for this machine ({machine}); --profile chooses another"
    click.echo(safe(f"its profile is {name}{why}"))


@click.command()
@click.argument("file")
@click.option("--task", help="The kind of example; overrides what the lines say.")
@json_option
@click.pass_context
def observe(context: click.Context, file: str, task: str | None, as_json: bool) -> None:
    """Store the examples of FILE to be learned: JSONL (- for stdin), a log of the llm command, or a ChatGPT export.

    A log or an export is taken whole, one example a conversation, into task llm or chatgpt; what is stored already stays.
    """
    try:
        history = None if file == "-" else read_history(Path(file), task)
        lines = [] if history else sys.stdin.buffer.readlines() if file == "-" else Path(file).read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    with Learner(context.obj) as learner:
        if history:
            report = learner.observe(history.examples, replace=False)
        else:
            report = learner.observe(lines, task, "stdin" if file == "-" else Path(file).name)
    kept = report.added + report.duplicates
    if as_json:
        facts = {"conversations": history.n_conversations, "left_out": history.left_out} if history else {}
        print_json(report.__dict__ | facts)
    else:
        for number, reason in report.bad[:20]:
            place = f" conversation {safe(repr(history.examples[number - 1].asked[:40]))}" if history else number
            click.echo(f"{safe(file)}:{place}: {safe(reason)}", err=True)
        if len(report.bad) > 20:
            click.echo(f"... and {len(report.bad) - 20} more bad lines", err=True)
        click.echo(f"{report.added} stored, {report.duplicates} known already, {len(report.bad)} bad")
        if report.replaced:
            click.echo(f"{report.replaced} of them in place of an older answer")
        if report.heldout:
            click.echo(f"{report.heldout} of the task's rows are newly held out, to measure with")
        if report.redacted:
            click.echo(redaction(report.redacted))
        if history:
            left_out = ", ".join(f"{what} ({n})" for what, n in sorted(history.left_out.items())) or "nothing"
            click.echo(f"read {history.n_conversations} conversations; left out: {left_out}")
        if not kept and not report.bad:
            expected = "expected conversations with answers in text" if history else "expected JSONL chats"
            click.echo(f"{safe(file)}: has no example; {expected}", err=True)
    context.exit(0 if kept else 1)


@click.command()
@click.argument("prompt")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1))
@json_option
@click.pass_obj
def ask(home: Path | None, prompt: str, max_tokens: int, as_json: bool) -> None:
    """Answer PROMPT with the generation that serves."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as `chat`
    with Learner(home) as learner:
        answer, n_tokens, is_whole = learner.answer(prompt, max_tokens)
        generation = learner.generations.current().number
    if as_json:
        print_json({"answer": answer, "generation": generation, "is_whole": is_whole})
    else:
        click.echo(safe(answer))
    if not is_whole:
        note(f"cut off after {n_tokens} tokens")


@click.command()
@json_option
@click.pass_obj
def status(home: Path | None, as_json: bool) -> None:
    """Show what serves, what waits to be learned, and how the last night ended."""
    with Learner(home) as learner:
        facts = learner.status()
    if as_json:
        print_json(facts)
    else:
        print_status(facts)


def print_status(facts: dict[str, Any]) -> None:
    """Print what `Learner.status` found as a person reads it."""
    out = console()
    out.print(f"home        {safe(facts['home'])}")
    out.print(f"serves      generation {facts['generation']} ({safe(facts['served'])}), quant {facts['quant']}")
    out.print(f"on disk     generations {_ranges(facts['generations'])}")
    last, tried = facts["last_night"], facts["last_try"]
    if last:
        outcome = f"published generation {last['generation']}" if last["accepted"] else "refused"
        reason = f": {safe(last['reason'])}" if last["reason"] else ""
        out.print(f"last night  {local_time(last['started'])}: {outcome}{reason}")
    else:
        out.print("last night  there was none yet")
    if tried and (not last or (tried["at"] > last["started"] and tried["reason"] != last["reason"])):
        out.print(f"last try    {local_time(tried['at'])}: {safe(str(tried['reason']))}")
    if facts["tasks"]:
        table = Table("task", "pending", "replay", "held out", "archive", box=None, pad_edge=False)
        for task, roles in facts["tasks"].items():
            table.add_row(safe(task), *(str(roles[r]) for r in ("pending", "replay", "heldout", "archive")))
        out.print(table)


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in words, such as "0, 4-30"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@click.command()
@json_option
@click.pass_obj
def history(home: Path | None, as_json: bool) -> None:
    """Show every night: what it learned, what it cost, and why it was refused."""
    with Learner(home) as learner:
        nights = learner.history()
    if as_json:
        print_json({"nights": nights})
        return
    if not nights:
        click.echo("there was no night yet")
        return
    for night in nights:
        new, replay, train_s = (night["report"].get(key, 0) for key in ("n_new", "n_replay", "train_s"))
        outcome = f"generation {night['generation']}" if night["accepted"] else "refused"
        at = local_time(night["started"])
        click.echo(f"{at}  {outcome:<14} {new} new, {replay} rehearsed, {train_s:.0f} s training")
        if night["reason"]:
            click.echo(f"                  {safe(night['reason'])}")


@click.command()
@click.argument("number", required=False, type=click.IntRange(0))
@json_option
@click.pass_obj
def rollback(home: Path | None, number: int | None, as_json: bool) -> None:
    """Serve generation NUMBER again (default: the parent of the one that serves); nothing is deleted."""
    with Learner(home) as learner:
        target = learner.rollback(number)
        if as_json:
            print_json({"generation": target.number})
            return
        click.echo(f"generation {target.number} serves")
        unknown = learner.generations.unknown(target)
        if n_unknown := sum(row.generation in unknown for row in learner.store.rows("replay")):
            click.echo(f"kept rows of nights that it does not know: {n_unknown}, not rehearsed until one of those serves again")


COMMANDS = (init, observe, ask, status, history, rollback)
