"""The last try of a night that came to no end, whatever kept it from one: why, and what keyboards had counted then.

A file of the home, `last-try.json`, until a night comes to its end. It is a note: one that cannot be read is none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgecl_convert import write_atomic


def last_try(home: Path) -> dict[str, Any] | None:
    """Return the note: `at`, `reason`, and `keyboard` as `Sensors.keyboard` had it; None where there is none."""
    try:
        note = json.loads(_path(home).read_bytes())
        kinds = {"at": str, "reason": str, "keyboard": dict}
        return {key: note[key] for key in kinds} if all(isinstance(note[key], kind) for key, kind in kinds.items()) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def note_try(home: Path, at: str, reason: str, keyboard: dict[str, Any]) -> None:
    """Write the note in place of the last one.

    Args:
        at: as `generations.now` has it.

    Raises:
        OSError, ConvertError: the disk is full, or the home is read-only.
    """
    write_atomic(_path(home), json.dumps({"at": at, "reason": reason, "keyboard": keyboard}) + "\n")


def clear_try(home: Path) -> None:
    """Remove the note."""
    _path(home).unlink(missing_ok=True)


def _path(home: Path) -> Path:
    return home / "last-try.json"
