"""One night at a time in a home; whatever changes generations waits for its end, or comes later."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import NotNow, SettingError


@contextmanager
def night_lock(home: Path) -> Iterator[None]:
    """Keep nights out of a home; a process that dies gives the lock back.

    Raises:
        NotNow: another night is running.
        SettingError: the home cannot be written to, or its disk locks no files.
    """
    try:
        lock = os.open(home / "lock", os.O_CREAT | os.O_WRONLY, 0o600)
    except OSError as error:
        raise SettingError(f"{home}/lock: cannot be written: {error.strerror}; make {home} writable for this user") from None
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotNow(f"another night is running in {home}; try again when it is done") from None
        except OSError as error:
            raise SettingError(
                f"{home}/lock: cannot be locked: {error.strerror}; move {home} to a disk whose files can be"
            ) from None
        yield
