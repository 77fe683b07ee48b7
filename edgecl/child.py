"""Stages in child processes: memory goes back when they end, and a crash in one is a refused night.

The parent sends one JSON object on stdin; the child writes JSON lines on stdout: {"progress": [...]} any number of times, then
{"result": ...} or {"error": ..., "exit_code": ...}. stderr is the log. Memory and time are watched from outside, because
RLIMIT_AS counts memory maps that cost nothing.

A child whose night must yield is sent SIGTERM. Training finishes its step, saves and ends with an error of NotNow's exit code;
any other stage just ends, and is run again the next time.

A child that is nice gives way at once: at SCHED_IDLE the kernel takes its cores away as soon as someone else wants them, and
its threads do not spin for long where they wait. *Does not cover*: a chat in another control group with its own CPU weight, as
systemd makes them for services and some desktops for each terminal; the kernel shares between groups first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgecl_convert import ConvertError, write_atomic
from edgecl_convert.amx import WITH_AMX, amx_works
from edgecl_convert.process import child_environment, module_command

from .errors import EdgeclError, NotNow, StageError

Progress = Callable[[str, int, int, str], None]  # (stage, done, total, text)
GRACE_S = 60.0  # for a child that was told to stop; then it is ended, and its last checkpoint counts
WITHOUT_TORCH = ("measure", "write")  # stages that compute with llama.cpp alone
ROOM = "room.json"  # in a run's folder, as `room` reads it
LESS = 0.85  # of the memory that a try was planned with, is the next one's where it took too much
# a thread of OpenMP that waits spins for a fraction of a millisecond: none at all costs a wake-up at every barrier
BRIEF_WAITS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


@dataclass(frozen=True)
class Limits:
    """What a child may take, and for how long.

    Attributes:
        seconds: of wall time.
        nice: added to its niceness; above 0 it also runs at SCHED_IDLE and waits without much spinning.
        threads: of OpenMP, 0 for as many as there are cores.
        stop: why the night must yield now, "" while it need not: asked before a child starts and ten times a second after.
    """

    ram_bytes: int
    seconds: float
    nice: int = 0
    threads: int = 0
    stop: Callable[[], str] = str  # str() is "": nothing stops it


def run_stage(
    stage: str, request: dict[str, Any], limits: Limits, progress: Progress | None = None
) -> tuple[dict[str, Any], int]:
    """Run a stage, as `python -m edgecl.stages STAGE` does, on a request; return its result and its peak RSS in bytes.

    Raises:
        StageError: it crashed, ran out of memory or time, or said nothing.
        NotNow: the night must yield.
        EdgeclError: what the stage itself raised.
    """
    if reason := limits.stop():
        raise _yielded(reason)
    environment = child_environment(Path(__file__).resolve().parent.parent)
    if stage in WITHOUT_TORCH and amx_works():
        environment[WITH_AMX] = "1"
    if limits.threads:
        environment["OMP_NUM_THREADS"] = str(limits.threads)
    if limits.nice:  # read when OpenMP is loaded, which llama_cpp does: too early for a stage to say it itself
        environment = BRIEF_WAITS | environment
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            module_command("edgecl.stages", stage),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, encoding="utf-8",
        )  # fmt: skip
        if limits.nice:
            _give_way(process.pid, limits.nice)
        watch = _Watch(process, limits)
        result: dict[str, Any] | None = None
        failure: dict[str, Any] | None = None
        try:
            assert process.stdin and process.stdout
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it died at once: the exit code tells
                process.stdin.write(json.dumps(request))
            for line in process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # it was killed in the middle of a line
                if "progress" in message and progress:
                    progress(stage, *message["progress"])
                result, failure = message.get("result", result), message.get("error", failure)
            process.wait()
        finally:
            watch.stop()
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()
        log.seek(0)
        tail = log.read().decode("utf-8", "replace")[-4000:]
    if watch.peak_rss_bytes > limits.ram_bytes and "runs" in request:
        runs = Path(request["runs"])
        with contextlib.suppress(OSError, ConvertError):  # a full disk: the next try is planned as this one was
            write_atomic(runs / ROOM, json.dumps([limits.ram_bytes, LESS * room(runs, limits.ram_bytes)]))
            watch.reason += "; the next try is planned with less"
    if watch.reason:
        raise StageError(stage, watch.reason, tail)
    if failure is not None and failure["exit_code"] != NotNow.exit_code:
        error = EdgeclError(failure["message"])
        error.exit_code = failure["exit_code"]
        raise error
    if result is not None and not process.returncode:
        return result, watch.peak_rss_bytes
    if watch.yielding or failure is not None or process.returncode == -signal.SIGTERM:
        raise _yielded(watch.yielding or limits.stop() or "told to stop")
    raise StageError(stage, _how_it_ended(process.returncode, tail), tail)


def room(runs: Path, ram_bytes: int) -> float:
    """Return the share of `ram_bytes` that training is planned with: less than 1 after tries that took more than all of it."""
    with contextlib.suppress(OSError, ValueError, TypeError):  # none, or damaged
        of, share = json.loads((runs / ROOM).read_text("utf-8"))
        if of == ram_bytes and 0 < share < 1:
            return float(share)
    return 1.0


def _yielded(reason: str) -> NotNow:
    return NotNow(f"the night yields: {reason}; it goes on from there the next time")


def _give_way(pid: int, nice: int) -> None:
    """Let a process that has just been started have what cores others leave; threads that it starts inherit that."""
    with contextlib.suppress(OSError, AttributeError):  # it has ended, a container forbids it, macOS has no such class
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + nice)
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def _how_it_ended(code: int, log: str) -> str:
    last = log.strip().splitlines()[-1] if log.strip() else "no word"
    if code < 0:
        return f"the process was killed by signal {-code} ({last})"
    return f"the process ended with exit code {code} ({last})"


class _Watch:
    """Looks at a child's memory and time every tenth of a second and ends it past its limits."""

    def __init__(self, process: subprocess.Popen[str], limits: Limits) -> None:
        self.peak_rss_bytes, self.reason, self.yielding = 0, "", ""
        self._patience_ends = math.inf
        self._process, self._limits, self._done = process, limits, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        end = time.monotonic() + self._limits.seconds
        try:
            child = psutil.Process(self._process.pid)
            while not self._done.wait(0.1):
                self.peak_rss_bytes = max(self.peak_rss_bytes, child.memory_info().rss)
                if self.peak_rss_bytes > self._limits.ram_bytes:
                    self._end(
                        f"took more than {self._limits.ram_bytes / 1e9:.1f} GB of memory; raise ram_bytes (profile, `--ram`)"
                    )
                elif time.monotonic() > end:
                    self._end(f"took longer than {self._limits.seconds / 60:.1f} minutes; raise minutes (profile, `--minutes`)")
                elif time.monotonic() > self._patience_ends:
                    self._process.kill()
                elif not self.yielding:
                    self._heed()
        except psutil.Error:
            pass  # it has ended
        except Exception as error:  # of whoever is asked whether to yield: without a watch there is no limit
            self._end(f"its watch failed: {type(error).__name__}: {error}")

    def _heed(self) -> None:
        self.yielding = self._limits.stop()
        if self.yielding:
            self._process.terminate()
            self._patience_ends = time.monotonic() + GRACE_S

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._process.kill()
        self._done.set()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
