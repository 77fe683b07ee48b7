"""A night that is killed: at random instants, at every step that makes something durable, and by SIGTERM."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from .house import House

RECORD = 16  # bytes of a step, as hook/sitecustomize.py writes them
HURRY = "hurry:100000"  # a checkpoint at every step
ROLLBACK = ("rollback", "1")
FORGET = ("forget", "--task", "echo")


def steps_of(template: Path, folder: Path, *command: str) -> list[str]:
    """Return what an undisturbed command does that makes something durable, in order."""
    house = House.copy(template, folder)
    if house.run(*command, fault=f"kill:0 {HURRY}").code:
        raise RuntimeError(f"`{' '.join(command)}` that only counts failed: {house.outcome.findings}")
    data = (folder / "steps").read_bytes().decode()
    return [data[at : at + RECORD].strip() for at in range(0, len(data), RECORD)]


def killed_at_step(house: House, i: int) -> None:
    """Kill the whole night right before its step i + 1."""
    _killed(house, i, "adapt", "--json")
    _go_on(house)


def killed_in_rollback(house: House, i: int) -> None:
    """Kill `rollback` right before its step i + 1: one generation or the other serves, and a rollback is possible still."""
    _killed(house, i, *ROLLBACK)
    house.check()
    house.run("rollback", "2")
    house.after()


def killed_in_forget(house: House, i: int) -> None:
    """Kill `forget` right before its step i + 1: run again it ends, and nothing is left of the rows but what was learned."""
    _killed(house, i, *FORGET)
    house.run("status")
    house.run(*FORGET, ok=(0, 1))
    if rows := house.stored():
        house.find(f"{len(rows)} forgotten rows are stored still")
    house.accepted.clear()
    house.observe(6)
    house.after()


def _killed(house: House, i: int, *command: str) -> None:
    ran = house.start(*command, fault=f"kill:{i + 1} {HURRY}")
    ran.communicate()
    if ran.returncode != -signal.SIGKILL:
        house.find(f"`{command[0]}` was to be killed at step {i + 1} and ended with {ran.returncode}")
    house.outcome.note(f"before {(house.folder / 'steps').read_bytes()[RECORD * i :].decode().strip().split()[0]}")


def killed_while_observing(house: House, i: int) -> None:
    """Kill `observe` right before its step i + 1: its rows are all there or none of them."""
    before = len(house.stored())
    house.start("observe", "-", fault=f"kill:{i + 1}").communicate(
        b"".join(b'{"prompt": "new %d", "completion": "x"}\n' % k for k in range(5))
    )
    n_new = len(house.stored()) - before
    if n_new not in (0, 5):
        house.find(f"{n_new} of 5 rows were stored")
    house.outcome.note(f"{n_new} of 5 rows stored")
    house.after()


def signalled(house: House, i: int, n: int, chain: int, night_s: float, who: str, how: int) -> None:
    """Signal `chain` nights in a row, the whole group or the first process alone, each at an instant of its own; go on.

    The n instants of all chains are spread over a night: there is one in each n-th part of it.
    """
    house.outcome.tries = chain
    for k in range(i * chain, (i + 1) * chain):
        if not any(role == "pending" for role, _ in house.stored().values()):
            house.observe(2)
        part = k * 7919 % n  # the instants of a chain lie all over the night
        delay = (part + random.Random(f"{who} {how} {k}").random()) / n * night_s
        process = house.start("adapt", "--json", fault=HURRY if k % 2 else "")
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        if process.poll() is not None:
            house.outcome.note("after its end")
        else:
            house.outcome.note(house.stage(process))
            with suppress(ProcessLookupError):
                (os.killpg if who == "group" else os.kill)(process.pid, how)
        process.communicate()
        if who == "group":
            house.wait_gone(process.pid)
        house.check()  # at once: stages of the dead night may be at work still
    _go_on(house)
    house.wait_gone(process.pid)


def _go_on(house: House) -> None:
    report = house.after()
    if report.get("train", {}).get("resumed_at"):
        house.outcome.note("next night went on from a checkpoint")


def night_seconds(template: Path, folder: Path) -> float:
    """Return how long an undisturbed night takes here and now."""
    house = House.copy(template, folder)
    began = time.monotonic()
    house.must("adapt", "--json")
    return time.monotonic() - began
