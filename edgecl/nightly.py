"""A night inside the profile's contract: it begins when the machine is free, and yields when it no longer is.

The machine is looked at before the night and every few seconds of it. A night that yields keeps what it has come to (see
`night`) and raises NotNow; the next one goes on from there, so a timer may simply try again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from edgecl_convert import ConvertError, GgufFile, in_minimums, resolve_quant
from edgecl_convert.names import PROJECTIONS

from .child import Progress
from .device import Sensors, why_not_now
from .errors import EdgeclError, NothingToLearn, NotNow, translated
from .generations import now
from .learner import Learner
from .lock import night_lock
from .night import AdaptReport, tried
from .profile import Settings
from .tries import clear_try, last_try, note_try
from .writers import base_copy

EVERY_S = 3.0  # the machine is looked at this often while a night runs
BYTES_A_WEIGHT = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}
Q8_0_BYTES = 34 / 32  # a weight, at the widest of the other types
CACHES_LEAVE = 1 - 2 / 8  # of the free disk: states of the adapter's rows and of the asker's (see `train.latents`)
ADAPTERS = 2 + 2 * 5  # two adapters; a checkpoint (weights, two moments, average, best) while it replaces one


def nightly(
    learner: Learner,
    sensors: Sensors | None = None,
    told: Callable[[], str] = str,
    progress: Progress | None = None,
) -> AdaptReport:
    """Run one night, or go on with one that yielded.

    Args:
        told: why the night is to yield now whatever the machine says, such as a signal that came; "" while it need not.

    Raises:
        NothingToLearn: no pending rows, or the same as in a night that was refused: it would be again.
        NotNow: the machine is not free, or stopped being it; what was done so far is kept.
        EdgeclError: a stage failed; yesterday's model serves still, no row is lost, and the history has reason and log.
    """
    sensors = sensors or Sensors()
    if note := last_try(learner.home):
        with suppress(KeyError, TypeError):  # the note is none
            sensors.recall(note["keyboard"])
    try:
        report = _sitting(learner, _Contract(learner, sensors, told), progress)
    except (EdgeclError, OSError) as error:
        with suppress(OSError, ConvertError):
            if isinstance(error, NothingToLearn) and not learner.store.rows("pending"):
                clear_try(learner.home)
            else:
                note_try(learner.home, now(), str(error), sensors.keyboard)
        raise
    clear_try(learner.home)
    return report


def _sitting(learner: Learner, contract: _Contract, progress: Progress | None) -> AdaptReport:
    if pending := learner.store.rows("pending"):
        digest = tried(learner.settings, learner.profile, learner.generations.current(), learner.store, pending)
        for night in learner.store.nights():
            if night["report"].get("refused") == digest:
                raise NothingToLearn(
                    f"nothing new to learn: a night with these {len(pending)} rows was refused ({night['reason']}); "
                    "look at them or at the settings; `edgecl adapt` tries them again all the same"
                )
        with night_lock(learner.home):
            learner.generations.clear_drafts()  # of a night that died: they would take the room that this one needs
        learner.generations.check_base(full=False, base=learner.settings.base)
        needed = needed_bytes(learner.settings, learner.profile.ram_bytes)
        if reasons := contract.look(round(needed / CACHES_LEAVE)):
            raise NotNow(f"not now: {reasons}")
    return learner.adapt(progress=progress, stop=contract)


def needed_bytes(settings: Settings, ram_bytes: int) -> int:
    """Return the disk that a night may fill beside the base, which is there, and what it caches, which takes a share.

    First that is the copy that writers run from, then, when it is gone, the merged file, adapter and checkpoint.

    Raises:
        EdgeclError: the base cannot be read, or there is no such quant.
    """
    with translated(), GgufFile(settings.base) as base:
        qtype = resolve_quant(settings.quant, base, learned=True)
        n_weights = sum(math.prod(info.shape) for info in base.tensors.values())
        _, copy = base_copy(base, ram_bytes)
        r = settings.train.rank(bool(in_minimums(base, qtype)))
        projections = [info.shape for name, info in base.tensors.items() if PROJECTIONS.keys() & set(name.split("."))]
    merged = max(Path(settings.base).stat().st_size, round(n_weights * BYTES_A_WEIGHT.get(qtype, Q8_0_BYTES)))
    adapters = ADAPTERS * 4 * r * sum(sum(shape) for shape in projections)
    return max(merged + adapters, copy)


class _Contract:
    """What a profile asks of the machine, and a look at whether it is so."""

    def __init__(self, learner: Learner, sensors: Sensors, told: Callable[[], str]) -> None:
        self._profile, self._home, self._sensors, self._told = learner.profile, learner.home, sensors, told
        self._began = self._looked = sensors.clock()
        self._found = ""

    def __call__(self) -> str:
        """Return the reason, "" for none; the machine is looked at every EVERY_S seconds, however often this is asked."""
        if told := self._told():
            return told
        now = self._sensors.clock()
        if not 0 <= now - self._looked < EVERY_S:
            self._looked, self._found = now, self.look()
        return self._found

    def look(self, needed_bytes: int | None = None) -> str:
        """Return what the machine says against a night now; `needed_bytes` of disk before it begins."""
        now, minutes = self._sensors.clock(), self._profile.minutes
        self._began = min(self._began, now)  # the clock was set back
        readings = self._sensors.read(self._home)
        reasons = why_not_now(readings, self._profile, datetime.fromtimestamp(now), needed_bytes)
        if now - self._began > 60 * minutes:
            reasons.append(f"this sitting has taken its {minutes:g} minutes")
        return "; ".join(reasons)
