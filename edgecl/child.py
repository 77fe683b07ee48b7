"""Stages in child processes: memory goes back when they end, and a crash in one is a refused night.

The parent sends one JSON object on stdin; the child writes JSON lines on stdout: {"progress": [...]} any number of times, then
{"result": ...} or {"error": ..., "exit_code": ...}. stderr is the log. Memory and time are watched from outside, because
RLIMIT_AS counts memory maps that cost nothing.

A child that is nice gives way at once: at SCHED_IDLE the kernel takes its cores away as soon as someone else wants them, and
its threads do not spin for long where they wait. *Does not cover*: a chat in another control group with its own CPU weight, as
systemd makes them for services and some desktops for each terminal; the kernel shares between groups first.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .errors import EdgeclError, StageError

Progress = Callable[[str, int, int, str], None]  # (stage, done, total, text)
BRIEFLY = "10000"  # spins of a waiting thread, a fraction of a millisecond: none at all costs a wake-up at every barrier


@dataclass(frozen=True)
class Limits:
    """What a child may take; ram_bytes and seconds of wall time.

    Attributes:
        nice: added to its niceness; above 0 it also runs at SCHED_IDLE and waits without much spinning.
        threads: of OpenMP, 0 for as many as there are cores.
    """

    ram_bytes: int
    seconds: float
    nice: int = 0
    threads: int = 0


def run_stage(
    stage: str, request: dict[str, Any], limits: Limits, progress: Progress | None = None
) -> tuple[dict[str, Any], int]:
    """Run `python -m edgecl.stages STAGE` on a request; return its result and its peak RSS in bytes.

    Raises:
        StageError: it crashed, ran out of memory or time, or said nothing.
        EdgeclError: what the stage itself raised.
    """
    environment = dict(os.environ)
    roots = [str(Path(__file__).resolve().parent.parent)]
    convert = sys.modules.get("edgecl_convert")
    if convert is not None and convert.__file__:
        roots.append(str(Path(convert.__file__).resolve().parent.parent))
    environment["PYTHONPATH"] = os.pathsep.join([*roots, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if limits.threads:
        environment["OMP_NUM_THREADS"] = str(limits.threads)
    if limits.nice:  # read when OpenMP is loaded, which llama_cpp does: too early for a stage to say it itself
        environment = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": BRIEFLY} | environment
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgecl.stages", stage],
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
    if watch.reason:
        raise StageError(stage, watch.reason, tail)
    if failure is not None:
        error = EdgeclError(failure["message"])
        error.exit_code = failure["exit_code"]
        raise error
    if result is None or process.returncode:
        raise StageError(stage, _how_it_ended(process.returncode, tail), tail)
    return result, watch.peak_rss_bytes


def _give_way(pid: int, nice: int) -> None:
    """Let a process that has just been started have what cores others leave; threads that it starts inherit that."""
    with contextlib.suppress(OSError):  # it has ended, or a container does not allow it
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
        self.peak_rss_bytes, self.reason = 0, ""
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
                    self._end(f"took more than {self._limits.ram_bytes / 1e9:.1f} GB of memory; raise ram_bytes")
                elif time.monotonic() > end:
                    self._end(f"took longer than {self._limits.seconds / 60:.1f} minutes; raise minutes")
        except psutil.Error:
            pass  # it has ended

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._process.kill()
        self._done.set()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
