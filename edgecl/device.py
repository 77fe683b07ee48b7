"""What the machine says of itself: power, heat, memory, disk, and whether somebody is at a keyboard.

All of it is read from /sys, /proc and /dev, below a root that a test may choose. What cannot be read is unknown, and unknown
is never a reason to wait: a virtual machine without sensors has its nights.

A keyboard is in use where a terminal was read from lately (a console, a serial console, ssh, a terminal window: the times that
`w` goes by, to the 8 seconds that the kernel rounds them to), or where a counter of input devices moved between two readings
(interrupts of a PS/2 keyboard and of touchpads on I2C, transfers of USB keyboards and mice), which works on any desktop.

A night that is tried again compares its counters with those of the last try (see `tries`).

*Does not cover*: what a counter did before the first reading (a first try may begin in a pause of reading, and yields at the
next key), Bluetooth keyboards, touch screens, remote desktops, somebody who watches a film, and work that nobody types for. A
script that feeds a terminal looks like a person.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .profile import Profile

AHEAD_S = 60.0  # what was used later than that was used before the clock was set back
FED = ("Charging", "Full", "Not charging")  # of a battery whose charger has no entry of its own


@dataclass(frozen=True)
class Readings:
    """What the sensors said at one time; None is unknown.

    Attributes:
        temperature_c: of the hottest sensor; hottest: its name.
        idle_s: seconds since somebody was at a keyboard.
        available_bytes: memory that can be had without swapping; free_bytes: of the disk.
    """

    on_ac: bool = True
    temperature_c: float | None = None
    hottest: str = ""
    idle_s: float | None = None
    available_bytes: int | None = None
    free_bytes: int | None = None


def why_not_now(readings: Readings, profile: Profile, at: datetime, needed_bytes: int | None = None) -> list[str]:
    """Return every reason why a night may not run now; none: it may.

    Args:
        at: local time.
        needed_bytes: of disk, before a night begins. None while one runs: what it took itself is no reason to end it, so
            memory and disk are not looked at.
    """
    reasons = []
    if not profile.is_open(at.time()):
        reasons.append(f"{at:%H:%M} is outside the window {profile.window}")
    if profile.needs_ac and not readings.on_ac:
        reasons.append("on battery")
    if readings.temperature_c is not None and readings.temperature_c > profile.max_temperature_c:
        heat, limit = f"{readings.temperature_c:.0f} °C", f"{profile.max_temperature_c:.0f} (max_temperature_c)"
        reasons.append(f"{heat} at {readings.hottest}, the limit is {limit}")
    if readings.idle_s is not None and readings.idle_s < 60 * profile.idle_minutes:
        idle = f"{readings.idle_s / 60:.0f} minutes ago, {profile.idle_minutes:g} are asked for (idle_minutes)"
        reasons.append(f"somebody was at the keyboard {idle}")
    if needed_bytes is None:
        return reasons
    if readings.available_bytes is not None and readings.available_bytes < profile.ram_bytes:
        free, wanted = readings.available_bytes / 1e9, profile.ram_bytes / 1e9
        reasons.append(f"{free:.1f} GB of memory are free, a night may take {wanted:.1f} (ram_bytes)")
    if readings.free_bytes is not None and readings.free_bytes < needed_bytes:
        reasons.append(f"{readings.free_bytes / 1e9:.2f} GB of disk are free, a night needs {needed_bytes / 1e9:.2f}")
    return reasons


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the machine's memory, None where it does not say."""
    return _meminfo(root, "MemTotal")


def propose_profile(root: Path = Path("/")) -> tuple[str, str]:
    """Return the shipped profile that suits this machine, and in words what the machine is."""
    model = _text(root / "proc/device-tree/model").strip("\0")
    memory = memory_bytes(root)
    boards = {"Jetson": "jetson-orin-nano-8gb", "Raspberry Pi": "raspberry-pi-5"}
    name = next((name for word, name in boards.items() if word in model), "laptop-cpu")
    return name, (model or "no board that is known") + (f", {memory / 1e9:.1f} GB of memory" if memory else "")


class Sensors:
    """Reads the machine, and remembers when a counter of input devices last moved.

    Attributes:
        clock: seconds since the epoch.
    """

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.time) -> None:
        """Take the counters as they are now: what moves from here on is somebody at a keyboard."""
        self.clock = clock
        self._root, self._inputs, self._moved_at = root, _input_counters(root), 0.0

    def read(self, folder: Path) -> Readings:
        """Return what the sensors say now; `folder` is on the disk that is asked for."""
        temperature_c, hottest = _hottest(self._root)
        return Readings(
            _on_ac(self._root),
            temperature_c,
            hottest,
            self._idle_s(),
            _meminfo(self._root, "MemAvailable"),
            _free_bytes(folder),
        )

    @property
    def keyboard(self) -> dict[str, Any]:
        """What is remembered of input devices, as JSON has it: their counters, and when one moved last, as far as is known."""
        return {"inputs": self._inputs, "moved_at": self._moved_at}

    def recall(self, keyboard: dict[str, Any]) -> None:
        """Go on from what an earlier process remembered; what has moved since then may have moved just now."""
        moved_at = keyboard["moved_at"] if keyboard["inputs"] == self._inputs else self.clock()
        self._moved_at = max(self._moved_at, moved_at)

    def _idle_s(self) -> float | None:
        now, inputs = self.clock(), _input_counters(self._root)
        if inputs != self._inputs:
            self._inputs, self._moved_at = inputs, now
        times = (self._moved_at, *_terminal_times(self._root))
        newest = max((at for at in times if at < now + AHEAD_S), default=0.0)
        return max(now - newest, 0.0) if newest else None


def _text(path: Path) -> str:
    """Return a small file without the space around it; "" where it cannot be read, as that of a sensor that is off."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def _on_ac(root: Path) -> bool:
    """Return whether mains power feeds the machine: a charger is on line, or there is no battery of the machine's own."""
    batteries, chargers = [], []
    for supply in root.glob("sys/class/power_supply/*"):
        kind = _text(supply / "type")
        if _text(supply / "scope") == "Device":  # a mouse's
            continue
        if kind == "Battery":
            batteries.append(_text(supply / "status"))
        elif kind in ("Mains", "USB", "Wireless"):
            chargers.append(_text(supply / "online"))
    if not batteries:
        return True
    return any(online not in ("", "0") for online in chargers) if chargers else all(status in FED for status in batteries)


def _hottest(root: Path) -> tuple[float | None, str]:
    zones = [(_number(zone / "temp"), _text(zone / "type")) for zone in root.glob("sys/class/thermal/thermal_zone*")]
    milli, name = max(((temp, name) for temp, name in zones if temp is not None), default=(None, ""))
    return (None if milli is None else milli / 1000), name


def _meminfo(root: Path, key: str) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return None


def _free_bytes(folder: Path) -> int | None:
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def _terminal_times(root: Path) -> list[float]:
    """Return when each terminal was last read from, in seconds since the epoch."""
    consoles = [root / "dev" / name for name in _text(root / "sys/class/tty/console/active").split()]
    times = []
    for path in (*root.glob("dev/pts/[0-9]*"), *root.glob("dev/tty[0-9]*"), *consoles):
        try:
            times.append(path.stat().st_atime)
        except OSError:
            continue  # its shell has ended
    return times


def _input_counters(root: Path) -> dict[str, int]:
    """Return what counts keys and movements, by interrupt line and USB device."""
    names = {"i8042", *map(_text, root.glob("sys/bus/i2c/drivers/i2c_hid*/*/name"))}
    header, *lines = _text(root / "proc/interrupts").splitlines() or [""]
    counters = {}
    for words in map(str.split, lines):
        if names & {word.rstrip(",") for word in words}:
            counters[words[0]] = sum(int(word) for word in words[1 : 1 + len(header.split())] if word.isdecimal())
    for interface in root.glob("sys/bus/usb/devices/*:*"):
        kind = _text(interface / "bInterfaceClass"), _text(interface / "bInterfaceProtocol")
        if kind in (("03", "01"), ("03", "02")):  # a keyboard, a mouse; a UPS is of class 03 too
            device = interface.name.split(":")[0]
            counters[device] = _number(interface.parent / device / "urbnum") or 0
    return counters
