"""Whether a home's files are what its manifests say: verify."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..audit import audit
from ..places import open_home
from ..profile import Settings
from .output import json_option, print_json, safe, size


@click.command()
@json_option
@click.pass_context
def verify(context: click.Context, as_json: bool) -> None:
    """Check the base, every generation's files and their lineage against the manifests; exit code 1 if one differs."""
    home = open_home(context.obj)  # no learner is opened: a store that is damaged is no reason to check nothing
    report = audit(home, Settings.read(home / "edgecl.toml").keep_models)
    if as_json:
        print_json(asdict(report) | {"sound": report.sound})
    else:
        for finding in report.findings:
            click.echo(safe(f"{finding.path}: {finding.problem}{': ' + finding.detail if finding.detail else ''}"), err=True)
        for name in report.dropped:
            click.echo(f"{safe(name)}: dropped to save space (keep_models), can be rebuilt")
        verdict = "sound" if report.sound else f"not sound, {len(report.findings)} of them not as they should be"
        click.echo(f"{len(report.generations)} generations, {report.n_files} files, {size(report.n_bytes)}: {verdict}")
    context.exit(0 if report.sound else 1)


COMMANDS = (verify,)
