"""By night, unattended: nightly."""

from __future__ import annotations

import signal
from collections.abc import Callable

import click

from ..learner import Learner
from ..nightly import nightly as run_nightly
from .night import end_night
from .output import json_option, progress_bar


@click.command()
@json_option
@click.pass_context
def nightly(context: click.Context, as_json: bool) -> None:
    """Run one night if the machine is free, or go on with one that yielded; exit code 75: not now.

    Exit code 0: published; 3: the gate refused; 4: nothing to learn. The profile says when the machine is free. While you
    type at it, it is not, unless idle_minutes is 0: `edgecl adapt` is the night for that.
    """
    told = _until_sigterm()
    with Learner(context.obj) as learner, progress_bar() as progress:
        report = run_nightly(learner, told=told, progress=progress)
    end_night(context, report, as_json)


def _until_sigterm() -> Callable[[], str]:
    """Return what says that SIGTERM came, with which systemd stops a service."""
    came: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: came.append("told to stop"))
    return lambda: came[0] if came else ""


COMMANDS = (nightly,)
