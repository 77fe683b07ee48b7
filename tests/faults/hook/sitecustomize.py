"""Faults from inside: Python runs this file at the start of every process of a night under test, the stages included.

FAULT names what happens, as NAME:NUMBER pairs with a space between them; without it nothing is changed.

- kill:N      the whole process group is killed right before its N-th step that makes something durable, counted over all
              its processes in the file STEPS: fsync, rename, replace, symlink, a COMMIT or a checkpoint of SQLite; 0: never
- hurry:N     the clock of the training stage runs N times faster, so that it writes a checkpoint at every step
- clock:N     wall time is N seconds later
"""

import os
import signal
import sys

FAULT = dict(pair.split(":") for pair in os.environ.get("FAULT", "").split())
RECORD = 16  # bytes of a step in STEPS


def step(name: str) -> None:
    """Count a step of the night; end everything at the one that was asked for."""
    with open(os.environ["STEPS"], "ab", buffering=0) as log:
        log.write(name.ljust(RECORD).encode()[:RECORD])
        if log.tell() // RECORD == int(FAULT["kill"]):
            os.kill(0, signal.SIGKILL)


def count_steps() -> None:
    import sqlite3

    def counted(name, real):
        def call(*args, **kwargs):
            step(name)
            return real(*args, **kwargs)

        return call

    def look(statement: str) -> None:
        if statement.strip().upper().startswith(("COMMIT", "PRAGMA WAL_CHECKPOINT")):
            step(statement.strip()[:RECORD])

    def connect(path, *args, **kwargs):
        connection = open_database(path, *args, **kwargs)
        if path != ":memory:":
            connection.set_trace_callback(look)
        return connection

    for name in ("fsync", "rename", "replace", "symlink"):
        setattr(os, name, counted(name, getattr(os, name)))
    open_database, sqlite3.connect = sqlite3.connect, connect


def hurry(factor: int) -> None:
    import time

    real = time.perf_counter
    time.perf_counter = lambda: factor * real()


def shift_clock(seconds: int) -> None:
    import datetime
    import time

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(seconds=seconds)

    real = time.time
    datetime.datetime, time.time = Shifted, lambda: real() + seconds


if "kill" in FAULT:
    count_steps()
if "hurry" in FAULT and sys.orig_argv[-2:] == ["edgecl.stages", "train"]:
    hurry(int(FAULT["hurry"]))
if "clock" in FAULT:
    shift_clock(int(FAULT["clock"]))
