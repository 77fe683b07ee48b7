"""Sensors on machines made of files, and what a profile makes of their readings."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from edgecl.device import Readings, Sensors, propose_profile, why_not_now
from edgecl.profile import Profile, load_profile

NOON = datetime(2026, 3, 1, 12, 0)
SUPPLY = "sys/class/power_supply"
USB = "sys/bus/usb/devices"
INTERRUPTS = (
    "     CPU0  CPU1\n  1:  {keys}  4  IO-APIC  1-edge  i8042\n 14:  7  {disk}  PCI-MSI  ahci\n 51:  {pad}  0  gpio  PAD01:00\n"
)


def put(root: Path, **files: str | int) -> None:
    """Write files below a root; `__` in a name is a slash."""
    for name, content in files.items():
        put_file(root, name.replace("__", "/"), content)


def put_file(root: Path, name: str, content: str | int) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def terminal(root: Path, name: str, read_at: float) -> None:
    put_file(root, f"dev/{name}", "")
    os.utime(root / "dev" / name, (read_at, 0))


# --- power, heat, memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supplies", "on_ac"),
    [
        ({}, True),
        ({"AC": {"type": "Mains", "online": 1}, "BAT0": {"type": "Battery", "status": "Charging"}}, True),
        ({"AC": {"type": "Mains", "online": 0}, "BAT0": {"type": "Battery", "status": "Discharging"}}, False),
        ({"AC": {"type": "Mains", "online": 0}, "BAT0": {"type": "Battery", "status": "Full"}}, False),
        (
            {
                "AC": {"type": "Mains", "online": 0},
                "usb": {"type": "USB", "online": 1},
                "BAT0": {"type": "Battery", "status": "Discharging"},  # a weak charger is a charger
            },
            True,
        ),
        ({"BAT0": {"type": "Battery", "status": "Not charging"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Charging"}, "BAT1": {"type": "Battery", "status": "Discharging"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Unknown"}}, False),
        ({"usb": {"type": "USB", "online": 0}}, True),  # a board that could be fed by USB, and has no battery
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, True),
    ],
)
def test_power_is_mains_where_a_charger_is_on_line_or_there_is_no_battery(
    tmp_path: Path, supplies: dict[str, dict[str, str | int]], on_ac: bool
) -> None:
    for supply, files in supplies.items():
        for name, content in files.items():
            put_file(tmp_path, f"{SUPPLY}/{supply}/{name}", content)
    assert Sensors(tmp_path).read(tmp_path).on_ac is on_ac


def test_the_hottest_sensor_counts_and_one_that_is_off_does_not(tmp_path: Path) -> None:
    for zone, (kind, temp) in enumerate([("acpitz", 41000), ("cpu-thermal", 83500), ("dead", ""), ("cold", -5000)]):
        put_file(tmp_path, f"sys/class/thermal/thermal_zone{zone}/type", kind)
        put_file(tmp_path, f"sys/class/thermal/thermal_zone{zone}/temp", temp)
    put_file(tmp_path, "sys/class/thermal/thermal_zone9/type", "off")
    readings = Sensors(tmp_path).read(tmp_path)
    assert (readings.temperature_c, readings.hottest) == (83.5, "cpu-thermal")


def test_memory_and_disk_are_in_bytes_and_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    assert Sensors(tmp_path).read(tmp_path / "none") == Readings()
    put(tmp_path, proc__meminfo="MemTotal:  8000000 kB\nMemFree:  1 kB\nMemAvailable:  3000 kB")
    readings = Sensors(tmp_path).read(tmp_path)
    assert readings.available_bytes == 3_072_000
    assert readings.free_bytes is not None and readings.free_bytes > 0


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    readings = Sensors().read(tmp_path)
    assert readings.available_bytes and readings.available_bytes > 1_000_000
    assert propose_profile()[0] in ("laptop-cpu", "jetson-orin-nano-8gb", "raspberry-pi-5")


# --- somebody at a keyboard -------------------------------------------------------------------------------------------


def test_the_terminal_that_was_read_last_tells_since_when_nobody_types(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, clock=lambda: 10_000.0)
    assert sensors.read(tmp_path).idle_s is None
    terminal(tmp_path, "tty1", 4_000)
    terminal(tmp_path, "ttyAMA0", 9_999)  # a device on a serial line, such as a GPS receiver
    terminal(tmp_path, "pts/ptmx", 9_999)
    assert sensors.read(tmp_path).idle_s == 6_000
    terminal(tmp_path, "pts/3", 9_000)
    assert sensors.read(tmp_path).idle_s == 1_000
    put_file(tmp_path, "sys/class/tty/console/active", "tty0 ttyAMA0")  # the serial line is the console
    assert sensors.read(tmp_path).idle_s == 1
    terminal(tmp_path, "pts/3", 10_500)  # the clock was set back, nobody knows by how much
    assert sensors.read(tmp_path).idle_s == 1


def interrupts(root: Path, keys: int = 9, disk: int = 5, pad: int = 2) -> None:
    put_file(root, "proc/interrupts", INTERRUPTS.format(keys=keys, disk=disk, pad=pad))


def usb(root: Path, device: str, protocol: str, urbs: int) -> None:
    put_file(root, f"{USB}/{device}:1.0/bInterfaceClass", "03")
    put_file(root, f"{USB}/{device}:1.0/bInterfaceProtocol", protocol)
    put_file(root, f"{USB}/{device}/urbnum", urbs)


def test_counters_of_input_devices_that_move_are_somebody_at_a_keyboard(tmp_path: Path) -> None:
    now = 50_000.0
    put_file(tmp_path, "sys/bus/i2c/drivers/i2c_hid_acpi/i2c-PAD01:00/name", "PAD01:00")
    interrupts(tmp_path)
    usb(tmp_path, "1-2", "01", 70)
    usb(tmp_path, "1-3", "00", 70)  # a UPS
    terminal(tmp_path, "tty1", 1_000)
    sensors = Sensors(tmp_path, clock=lambda: now)

    def idle_after_a_minute() -> float | None:
        nonlocal now
        now += 60
        return sensors.read(tmp_path).idle_s

    assert idle_after_a_minute() == 49_060
    interrupts(tmp_path, disk=9999)
    usb(tmp_path, "1-3", "00", 9999)
    assert idle_after_a_minute() == 49_120
    interrupts(tmp_path, keys=10)
    assert idle_after_a_minute() == 0
    assert idle_after_a_minute() == 60
    interrupts(tmp_path, keys=10, pad=3)
    assert idle_after_a_minute() == 0
    usb(tmp_path, "1-2", "01", 71)
    assert idle_after_a_minute() == 0
    usb(tmp_path, "1-4", "02", 1)  # somebody plugs in a mouse
    assert idle_after_a_minute() == 0
    assert idle_after_a_minute() == 60
    now -= 40_000  # the clock was ahead when a key moved, and is set back
    assert idle_after_a_minute() == now - 1_000


# --- why not now ------------------------------------------------------------------------------------------------------

PROFILE = Profile(window="22:00-06:00", max_temperature_c=80, idle_minutes=10, ram_bytes=2_000_000_000)
FREE = Readings(True, 50.0, "cpu-thermal", 3600.0, 3_000_000_000, 9_000_000_000)
MIDNIGHT = datetime(2026, 3, 1, 0, 0)


@pytest.mark.parametrize(
    ("change", "at", "reason"),
    [
        ({"on_ac": False}, MIDNIGHT, "on battery"),
        ({"temperature_c": 80.6}, MIDNIGHT, "81 °C at cpu-thermal, the limit is 80 (max_temperature_c)"),
        ({"idle_s": 125.0}, MIDNIGHT, "somebody was at the keyboard 2 minutes ago, 10 are asked for (idle_minutes)"),
        ({}, NOON, "12:00 is outside the window 22:00-06:00"),
        ({"available_bytes": 1_900_000_000}, MIDNIGHT, "1.9 GB of memory are free, a night may take 2.0 (ram_bytes)"),
        ({"free_bytes": 500_000_000}, MIDNIGHT, "0.50 GB of disk are free, a night needs 1.00"),
    ],
)
def test_every_reason_is_given_with_what_was_read_and_what_is_allowed(
    change: dict[str, float], at: datetime, reason: str
) -> None:
    readings = replace(FREE, **change)  # type: ignore[arg-type]
    assert why_not_now(readings, PROFILE, at, 1_000_000_000) == [reason]
    while_it_runs = [] if "GB" in reason else [reason]
    assert why_not_now(readings, PROFILE, at) == while_it_runs


def test_a_free_machine_has_no_reason_and_a_bad_one_has_all() -> None:
    assert why_not_now(FREE, PROFILE, MIDNIGHT, 1_000_000_000) == []
    assert why_not_now(Readings(), PROFILE, MIDNIGHT, 1_000_000_000) == []
    bad = Readings(False, 99.0, "x", 1.0, 1, 1)
    assert len(why_not_now(bad, PROFILE, NOON, 1_000_000_000)) == 6
    careless = replace(PROFILE, needs_ac=False, max_temperature_c=200, idle_minutes=0, window="")
    assert why_not_now(bad, careless, NOON) == []


# --- which profile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit\0", "jetson-orin-nano-8gb"),
        ("Raspberry Pi 5 Model B Rev 1.0\0", "raspberry-pi-5"),
        ("Some Other Board\0", "laptop-cpu"),
        (None, "laptop-cpu"),
    ],
)
def test_a_profile_is_proposed_by_the_board(tmp_path: Path, model: str | None, name: str) -> None:
    put(tmp_path, proc__meminfo="MemTotal:  8000000 kB")
    if model:
        (tmp_path / "proc/device-tree").mkdir()
        (tmp_path / "proc/device-tree/model").write_bytes(model.encode())
    words = model.strip("\0") if model else "no board that is known"
    assert propose_profile(tmp_path) == (name, f"{words}, 8.2 GB of memory")
    assert load_profile(name).name == name
