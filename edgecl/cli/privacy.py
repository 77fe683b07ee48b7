"""What a user takes back: forget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from shlex import quote
from typing import Any

import click

from ..forget import Rebuild, find, forget, going_on, left_over, plan, retrain
from ..learner import Learner
from ..rows import Stored
from .night import REFUSED, print_report
from .output import json_option, print_json, progress_bar, safe

GONE = "rows that a night learned and did not keep are gone already: their text cannot be searched, nor who learned it"


class _Id(click.IntRange):
    """A row's number; a text is answered with how texts are searched."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"ids are numbers from 1 on, got {value}; `--contains {quote(value)}` searches text", param, ctx)


@click.command("forget")
@click.argument("ids", nargs=-1, type=_Id(1), metavar="[ID]...")
@click.option("--contains", metavar="TEXT", help="Rows that hold TEXT, in capitals or not.")
@click.option("--task", help="Rows of this task.")
@click.option(
    "--retrain", "again", is_flag=True, help="Rebuild without them, and delete the generations that learned from them."
)
@click.option("--dry-run", is_flag=True, help="Show the rows and their ids, and stop.")
@json_option
@click.pass_context
def forget_rows(
    context: click.Context,
    ids: tuple[int, ...],
    contains: str | None,
    task: str | None,
    again: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete rows wherever they are: by ID, by what they contain, or by task; exit code 1 if there is nothing to delete.

    Rows that a night learned and did not keep have an id, but their text is not in the store and cannot be found. `--retrain`
    alone rebuilds without everything that was forgotten so far.
    """
    searched = contains is not None or task is not None
    if (ids and searched) or (not ids and not searched and (dry_run or not again)):
        raise click.UsageError("give either ids, or --contains TEXT, or --task T; or --retrain alone")
    with Learner(context.obj) as learner, progress_bar() as progress:
        rows = [row for row in find(learner, contains, task) if searched or row.id in ids]
        if dry_run:
            _print_rows(rows, as_json)
            context.exit(0 if rows else 1)
        more = going_on(learner, rows)
        whole = task if task and contains is None else ""
        left = left_over(learner, "" if rows else whole)
        numbers = forget(learner, ids or [row.id for row in rows], whole)
        rebuild = plan(learner)
        if again and (rebuild or not (ids or searched)):
            rebuild = retrain(learner, progress)
        serves = learner.generations.current().number
    if as_json:
        print_json(
            {
                "rows": [_facts(row) for row in rows],
                "going_on": more,
                "left_over": left,
                "generations": numbers,
                "rebuild": rebuild and asdict(rebuild),
                "rebuilt": again and rebuild is not None,
            }
        )
    else:
        if ids or searched:
            _print_forgotten(rows, numbers, searched, left)
            if more:
                click.echo(f"not gone    rows {', '.join(map(str, more))} go on with a forgotten chat and hold its text, too")
        if rebuild and again:
            _print_rebuilt(rebuild, serves)
        elif rebuild:
            _print_cost(rebuild)
    if again and rebuild:
        context.exit(REFUSED if rebuild.night and not rebuild.night.accepted else 0)
    context.exit(0 if ids or rows or left else 1)


def _print_rows(rows: Sequence[Stored], as_json: bool) -> None:
    facts = [_facts(row) | {"messages": row.example.messages} for row in rows]
    if as_json:
        print_json({"rows": facts})
        return
    if not rows:
        click.echo(f"0 rows forgotten; {GONE}", err=True)
    for row in rows:
        learned = f"generation {row.generation}" if row.generation else ""
        click.echo(f"{row.id:>6}  {row.role:<8} {learned:<14} {safe(row.example.task)}: {safe(row.example.asked[:60])}")


def _facts(row: Stored) -> dict[str, Any]:
    return {"id": row.id, "role": row.role, "task": row.example.task, "generation": row.generation}


def _print_forgotten(rows: Sequence[Stored], numbers: Sequence[int], searched: bool, left: Sequence[str]) -> None:
    if left:
        click.echo(f"taken out   what was left of such rows: {', '.join(left)}")
    if searched and not rows:
        click.echo(f"0 rows forgotten; {GONE}", err=not left)
        return
    roles = ", ".join(f"{n} {role}" for role, n in Counter(row.role for row in rows).items())
    click.echo(f"{len(rows)} rows forgotten{f': {roles}' if roles else ''}")
    if searched:
        click.echo(GONE)
    if numbers:
        click.echo(f"learned by  {_generations(numbers)}, which teach no more; what serves may still say it")


def _print_cost(rebuild: Rebuild) -> None:
    click.echo(
        f"to do       `edgecl forget --retrain` goes on from generation {rebuild.start}, learns {rebuild.n_again} rows again "
        f"and deletes {_generations(rebuild.deleted)}; {_lost(rebuild)}"
    )


def _print_rebuilt(rebuild: Rebuild, serves: int) -> None:
    if rebuild.night:
        print_report(rebuild.night)
    click.echo(
        f"rebuilt     generation {serves} serves, {_generations(rebuild.deleted)} deleted; "
        f"{rebuild.n_again} rows to learn again, {_lost(rebuild)}"
    )


def _lost(rebuild: Rebuild) -> str:
    return f"{rebuild.n_lost} rows that they learned are not in the store any more, the forgotten ones among them"


def _generations(numbers: Sequence[int]) -> str:
    return f"generation{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


COMMANDS = (forget_rows,)
