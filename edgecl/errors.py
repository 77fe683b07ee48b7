"""Every exception of edgecl.

EdgeclError                       the base: catch this one
├── DataError(ValueError)         an example, file or score that cannot be used
├── SettingError(ValueError)      a setting, profile or option out of range
├── StoreError                    replay.db cannot be opened, or is of a newer version
├── GenerationError               a base, manifest or generation that is missing or does not match its hash
├── EngineError                   llama.cpp could not load or run a model
├── Diverged                      training came to a loss that is not a number: the night is refused (exit code 3)
├── StageError                    a child process (train, merge, measure) failed, crashed or ran out
├── NothingToLearn                no pending example, or none that was not refused before (exit code 4)
└── NotNow                        the machine is not free, or another night is running; a night goes on later (exit code 75)

A refused night is not an error: it is `AdaptReport(accepted=False, reason=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgecl_convert import ConvertError


class EdgeclError(Exception):
    """Base of every error of edgecl; the message says what, got, allowed and what to do.

    Attributes:
        exit_code: what the terminal app exits with.
    """

    exit_code = 1


class DataError(EdgeclError, ValueError):
    """An example, file or score that cannot be used."""


class SettingError(EdgeclError, ValueError):
    """A setting, profile or option out of range."""


class StoreError(EdgeclError):
    """The store cannot be opened or is of a newer version."""


class GenerationError(EdgeclError):
    """A base, manifest or generation that is missing or does not match its hash."""


class EngineError(EdgeclError):
    """llama.cpp could not load or run a model."""


class Diverged(EdgeclError):
    """Training came to a loss that is not a number; the message names step and rows."""

    exit_code = 3


class StageError(EdgeclError):
    """A child process failed, crashed or ran out of its limits.

    Attributes:
        stage: which one.
        log: the last lines it wrote to stderr.
    """

    def __init__(self, stage: str, reason: str, log: str = "") -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.log = log


class NothingToLearn(EdgeclError):
    """There is no pending example, or there are only those with which a night was refused before."""

    exit_code = 4


class NotNow(EdgeclError):
    """The machine is not free, or another night is running: what serves and what waits is as it was, a night goes on later."""

    exit_code = 75


@contextmanager
def translated() -> Iterator[None]:
    """Turn the conversion stage's errors into EdgeclError, at this one place."""
    try:
        yield
    except ConvertError as error:
        raise EdgeclError(str(error)) from None
