"""When nights begin by themselves: a timer of the user's own systemd, or a line of their crontab where there is none.

The units are those of `firmware_configs/systemd`, with the home, the Python and the time filled in. Their name is made of the
home's path, so that several homes have a timer each; a line of a crontab ends with that name, and all other lines stay as they
are. A night for which it is not the time, or that yields, is tried again every quarter of an hour. Nothing needs root.

*Does not cover*: a home below /tmp, which the service does not see.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from edgecl_convert import ConvertError, write_atomic
from edgecl_convert.process import module_command

from .errors import EdgeclError, NotNow, SettingError
from .profile import resource_folder

KINDS = ("service", "timer")
AGAIN_MINUTES = 15  # after a night that was not due, or yielded; RestartSec of the service
CRON_TRIES = 90  # not quite a day


@dataclass(frozen=True)
class Schedule:
    """When a home's nights begin.

    Attributes:
        by: "systemd" or "cron"; empty where nothing is scheduled.
        name: of the unit, and of the crontab's line.
        at: HH:MM, local time.
        state: of the timer, as systemd says it; next: when it starts the service next.
        last: how the service ended last, or that it runs.
    """

    by: str
    name: str
    at: str = ""
    state: str = ""
    next: str = ""
    last: str = ""


def _command(home: Path) -> list[str]:
    return module_command("edgecl", "--home", str(home), "nightly")


def unit_name(home: Path) -> str:
    """Return the name of a home's units: its folder's name for people, a hash of its path for systemd."""
    home = home.resolve()
    word = re.sub(r"[^A-Za-z0-9]+", "-", home.name).strip("-")[:40] or "home"
    return f"edgecl-nightly-{word}-{sha256(os.fsencode(home)).hexdigest()[:8]}"


def install(home: Path, at: str = "03:30") -> Schedule:
    """Schedule a home's nights, in place of what was scheduled for it.

    Args:
        at: HH:MM, local time.

    Raises:
        SettingError: at is no time of the day, or the home's path cannot be written to a unit or a crontab.
        EdgeclError: there is neither a systemd of the user nor cron, or what there is failed.
    """
    home = home.resolve()
    if not re.fullmatch(r"([01]?[0-9]|2[0-3]):[0-5][0-9]", at):
        raise SettingError(f"at must be HH:MM from 00:00 to 23:59, got {at}")
    for path in (str(home), sys.executable):
        if not path.isprintable():
            raise SettingError(f"{path!r} has characters that no unit or crontab can hold; rename the folder")
    hour, minute = map(int, at.split(":"))
    name, at = unit_name(home), f"{hour:02d}:{minute:02d}"
    if _has_systemd():
        _install_units(home, name, at)
        _set_cron_line(name, "")
    elif shutil.which("crontab"):
        _set_cron_line(name, f"{minute} {hour} * * * {cron_command(home)}")
        _delete_units(name)  # of a systemd that was there once, or is not reached from here
    else:
        raise EdgeclError("neither a systemd of this user nor crontab was found; have `edgecl nightly` run another way")
    return status(home)


def status(home: Path) -> Schedule:
    """Return when a home's nights begin.

    Raises:
        EdgeclError: crontab failed.
    """
    name = unit_name(home)
    timer = _unit_folder() / f"{name}.timer"
    if timer.is_file():
        found = re.search(r"^OnCalendar=\*-\*-\* (\d\d:\d\d)", timer.read_text("utf-8"), re.MULTILINE)
        facts = _properties(f"{name}.timer", "ActiveState", "NextElapseUSecRealtime")
        ran = _properties(f"{name}.service", "Result", "SubState", "ExecMainStatus", "ExecMainExitTimestamp")
        last = f"{ran['Result']}, exit code {ran['ExecMainStatus']}, {ran['ExecMainExitTimestamp']}"
        if ran["SubState"] == "auto-restart":
            last += f", tried again every {AGAIN_MINUTES} minutes"
        return Schedule(
            "systemd",
            name,
            found[1] if found else "",
            facts["ActiveState"] or "unknown",
            facts["NextElapseUSecRealtime"],
            last if ran["ExecMainExitTimestamp"] else "a night runs now" if ran["SubState"] == "running" else "",
        )
    for line in _cron_lines():
        if line.endswith(f" # {name}"):
            minute, hour = line.split()[:2]
            return Schedule("cron", name, f"{hour:0>2}:{minute:0>2}")
    return Schedule("", name)


def remove(home: Path) -> Schedule:
    """Schedule nothing for a home; return what was scheduled.

    Raises:
        EdgeclError: systemd or crontab failed.
    """
    before = status(home)
    if any(path.is_file() for path in _unit_files(before.name)):
        if _has_systemd():
            _systemctl("disable", "--now", f"{before.name}.timer")
            _systemctl("stop", f"{before.name}.service")  # a night that runs yields; none is tried again
        _delete_units(before.name)
        if _has_systemd():
            _systemctl("daemon-reload")
    _set_cron_line(before.name, "")
    return before


# --- systemd ----------------------------------------------------------------------------------------------------------


def unit_text(kind: str, home: Path, at: str) -> str:
    """Return the service or the timer of a home: the packaged file, with the lines that depend on the home replaced."""
    text = (resource_folder("firmware_configs") / "systemd" / f"edgecl-nightly.{kind}").read_text("utf-8")
    words = ["/usr/bin/env", *_command(home)]  # systemd itself starts no program with a quote or a backslash in its name
    filled = {
        "Description": f"edgecl learns at night in {str(home).replace('%', '%%')} (edgecl schedule)",
        "ExecStart": " ".join(_unit_quote(word).replace("$", "$$") for word in words),
        "ReadWritePaths": _unit_quote(str(home)),
        "OnCalendar": f"*-*-* {at}:00",
    }
    return re.sub(
        r"^(\w+)=.*$", lambda line: f"{line[1]}={filled[line[1]]}" if line[1] in filled else line[0], text, flags=re.M
    )


def _unit_quote(word: str) -> str:
    """Return a word as a unit file has it; only ExecStart knows $ besides."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _unit_folder() -> Path:
    return Path.home() / ".config/systemd/user"


def _unit_files(name: str) -> list[Path]:
    return [_unit_folder() / f"{name}.{kind}" for kind in KINDS]


def _delete_units(name: str) -> None:
    for path in (_unit_folder() / "timers.target.wants" / f"{name}.timer", *_unit_files(name)):
        path.unlink(missing_ok=True)


def _has_systemd() -> bool:
    return bool(shutil.which("systemctl")) and _run("systemctl", "--user", "show", "--property=Version").returncode == 0


def _install_units(home: Path, name: str, at: str) -> None:
    before = {path: path.read_text("utf-8") for path in _unit_files(name) if path.is_file()}
    try:
        _unit_folder().mkdir(parents=True, exist_ok=True)
        for kind, path in zip(KINDS, _unit_files(name), strict=True):
            write_atomic(path, unit_text(kind, home, at))
    except (OSError, ConvertError) as error:
        raise EdgeclError(f"{_unit_folder()}: the units cannot be written: {error}") from None
    try:
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", f"{name}.timer")
    except EdgeclError:
        if not before:
            _delete_units(name)
        for path, text in before.items():  # the nights that were scheduled go on
            write_atomic(path, text)
        raise


def _systemctl(*arguments: str) -> None:
    done = _run("systemctl", "--user", *arguments)
    if done.returncode:
        raise EdgeclError(f"systemctl --user {' '.join(arguments)} failed: {_last_line(done.stderr)}")


def _properties(unit: str, *names: str) -> dict[str, str]:
    """Return what systemd knows of a unit, with an empty text for what it does not."""
    shown = _run("systemctl", "--user", "show", unit, f"--property={','.join(names)}").stdout.decode("utf-8", "replace")
    found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return {name: found.get(name, "") for name in names}


# --- cron -------------------------------------------------------------------------------------------------------------


def cron_command(home: Path) -> str:
    """Return the command of a crontab's line: a night, and its further tries as long as the line stands.

    The shell's quotes are closed before each %: cron takes one backslash away before it, and would count those of the path.
    """
    quoted = " ".join(shlex.quote(word).replace("%", "''\\%") for word in _command(home))
    night = f"nice -n 19 {quoted}"
    again = f"[ $? -eq {NotNow.exit_code} ] && sleep {60 * AGAIN_MINUTES} && crontab -l | grep -q {unit_name(home)} || break"
    return f"for i in $(seq {CRON_TRIES}); do {night}; {again}; done"


def _cron_lines() -> list[str]:
    """Return the lines of the user's crontab, none where there is no crontab.

    Raises:
        EdgeclError: it cannot be read, so it must not be written either.
    """
    if not shutil.which("crontab"):
        return []
    done = _run("crontab", "-l")
    if done.returncode and not re.search(b"no crontab|no such file|not allowed", done.stderr, re.IGNORECASE):
        raise EdgeclError(f"crontab -l failed: {_last_line(done.stderr)}")
    return [] if done.returncode else os.fsdecode(done.stdout).split("\n")[: -1 if done.stdout.endswith(b"\n") else None]


def _set_cron_line(name: str, line: str) -> None:
    """Replace a home's line of the crontab; an empty one removes it. Nothing is written where nothing changes."""
    before = _cron_lines()
    after = [old for old in before if not old.endswith(f" # {name}")] + ([f"{line} # {name}"] if line else [])
    if after == before:
        return
    done = _run("crontab", "-", stdin=os.fsencode("".join(f"{text}\n" for text in after)))
    if done.returncode:
        raise EdgeclError(f"crontab could not be written: {_last_line(done.stderr)}")


def _run(*command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=stdin, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    except OSError as error:  # it went away, or is no program
        return subprocess.CompletedProcess(command, 127, b"", str(error).encode())


def _last_line(text: bytes) -> str:
    return text.decode("utf-8", "replace").strip().rpartition("\n")[2] or "no word"
