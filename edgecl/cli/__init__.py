"""The terminal app: commands over the library, and the only place that prints.

Results go to stdout (one JSON object with `--json`), progress to stderr. An error is one line on stderr and its exit code; a
user never sees a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from edgecl_convert import ConvertError

from ..errors import EdgeclError
from ..places import expanded
from . import chat, day, export, models, night, nightly, privacy, probe, schedule, streams, verify
from .output import safe

INTERRUPTED, TOLD_TO_END = 130, 143  # exit codes after SIGINT and SIGTERM


class _Commands(click.Group):
    """Commands whose output may be cut off by its reader, as by `head`: click itself would make an error of that."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; 0 where its reader has left."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            for stream in (sys.stdout, sys.stderr):  # what is left in their buffers has no place
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise click.exceptions.Exit(0) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="EDGECL_HOME",
    help="The learner's home folder. Default: EDGECL_HOME, or ~/.local/share/edgecl/default.",
)
@click.version_option(package_name="edgecl")
@click.pass_context
def cli(context: click.Context, home: Path | None) -> None:
    """A language model that learns every night, on your own machine, from what you accepted or corrected."""
    context.obj = home and expanded(home)


for module in (day, chat, night, nightly, privacy, models, probe, streams, schedule, verify, export):
    for command in module.COMMANDS:
        cli.add_command(command)


def _end(*_: object) -> None:
    """End so that temporary files go and children end; told again, at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(TOLD_TO_END)


def _origin(error: Exception) -> str:
    """Return file and line of the innermost code of edgecl that an error passed through."""
    frames = [(frame.f_globals.get("__name__", ""), frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    file, line = [(frame.f_code.co_filename, line) for name, frame, line in frames if name.startswith("edgecl")][-1]
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def main() -> None:
    """Run the app and exit with the code that the contract names."""
    signal.signal(signal.SIGTERM, _end)
    if sys.stdin is None:  # it was closed
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; nothing that was stored is lost", err=True)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (EdgeclError, ConvertError) as error:
        click.echo(safe(f"edgecl: {error}"), err=True)
        code = getattr(error, "exit_code", 1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        click.echo(safe(f"edgecl: {error.strerror or error}{where}"), err=True)
        code = 1
    except UnicodeError as error:  # a name of another encoding, or a terminal that cannot show a text
        click.echo(safe(f"edgecl: a text or a name cannot be written: {error}; use UTF-8 names and a UTF-8 terminal"), err=True)
        code = 1
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        click.echo(safe(f"edgecl: {what} ({_origin(error)}); this is a defect of edgecl, please report this line"), err=True)
        code = 1
    if code in (INTERRUPTED, TOLD_TO_END):  # Python would wait for a thread that was just starting, which nobody then ends
        os._exit(code)
    sys.exit(code if isinstance(code, int) else 0)
