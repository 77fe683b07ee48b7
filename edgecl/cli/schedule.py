"""When nights begin by themselves: schedule install, status, remove."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .. import timer
from ..learner import Learner
from ..places import default_home
from .output import json_option, print_json, safe


@click.group()
def schedule() -> None:
    """Have nights begin by themselves, with the user's systemd or cron."""


@schedule.command()
@click.option("--at", default="03:30", show_default=True, metavar="HH:MM", help="Local time; systemd adds up to 30 minutes.")
@json_option
@click.pass_obj
def install(home: Path | None, at: str, as_json: bool) -> None:
    """Run `edgecl nightly` every night in this home."""
    with Learner(home) as learner:  # a home that does not open has no nights
        made = timer.install(learner.home, at)
    if as_json:
        print_json(asdict(made))
        return
    _print(made)
    if made.by == "systemd":
        click.echo("runs while you are logged in; `loginctl enable-linger` has it run at other times too", err=True)
    else:
        click.echo("cron does not make up for a night when the machine was off", err=True)


@schedule.command()
@json_option
@click.pass_obj
def status(home: Path | None, as_json: bool) -> None:
    """Show when this home's next night begins and how the last one ended."""
    found = timer.status(home or default_home())
    if as_json:
        print_json(asdict(found))
    else:
        _print(found)


@schedule.command()
@json_option
@click.pass_obj
def remove(home: Path | None, as_json: bool) -> None:
    """Schedule no night in this home any more."""
    removed = timer.remove(home or default_home())
    if as_json:
        print_json(asdict(removed))
    else:
        click.echo(f"removed: {removed.name} ({removed.by})" if removed.by else "nothing was scheduled for this home")


def _print(found: timer.Schedule) -> None:
    if not found.by:
        click.echo("nothing is scheduled for this home; `edgecl schedule install` does")
        return
    click.echo(f"{found.name} ({found.by}{', ' + found.state if found.state else ''}): every night at {found.at}")
    if found.next:
        click.echo(f"next        {safe(found.next)}")
    if found.last:
        click.echo(f"last        {safe(found.last)}")


COMMANDS = (schedule,)
