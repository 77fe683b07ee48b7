"""When nights begin: units that systemd accepts and a crontab that keeps its other lines, with small programs in their place.

`systemctl` and `crontab` are shell scripts in a folder on the PATH, which are run as the real ones are and keep a file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgecl import Learner, timer
from edgecl.errors import EdgeclError, SettingError
from edgecl.profile import read_toml
from edgecl_convert.process import module_command

WEIRD = "we \"ird\\%h 50% $HOME 'q' ; # é"
SYSTEMCTL = """#!/bin/sh
echo "$*" >>"$FAKES/log"
[ "$2" != "$BROKEN" ] || { echo "first line" >&2; echo "Failed: $2" >&2; exit 1; }
[ "$2" = show ] || exit 0
case "$3" in
*.timer) echo ActiveState=active; echo "NextElapseUSecRealtime=Thu 2026-11-26 03:41:07 UTC";;
*.service) echo Result=success; echo ExecMainStatus=4; echo "ExecMainExitTimestamp=Wed 2026-11-25 03:52:00 UTC";;
esac
"""
CRONTAB = """#!/bin/sh
case "$1" in
-l) [ -z "$CRON_SAYS" ] || { echo "$CRON_SAYS" >&2; exit 1; }
    [ -f "$FAKES/table" ] || { echo "no crontab for me" >&2; exit 1; }
    /bin/cat "$FAKES/table";;
-) /bin/cat >"$FAKES/table";;
esac
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH, empty; HOME is a folder of the test."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    for name, value in {"PATH": str(folder), "FAKES": str(folder), "HOME": str(tmp_path / "me"), "BROKEN": ""}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / WEIRD
    path.mkdir()
    return path


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def units(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "me/.config/systemd/user"
    return {path.name: path.read_text("utf-8") for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def values(unit: str) -> dict[str, str]:
    """The settings of a unit file, as written."""
    return dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))


def words(value: str) -> list[str]:
    """A quoted value as systemd reads it: in quotes a backslash keeps the next character; then %% is %."""
    out, rest = [], value
    while rest := rest.lstrip():
        assert rest[0] == '"'
        word, at = "", 1
        while rest[at] != '"':
            at += rest[at] == "\\"
            word, at = word + rest[at], at + 1
        assert word.count("%") == 2 * word.count("%%"), word  # no specifier
        out, rest = [*out, word.replace("%%", "%")], rest[at + 1 :]
    return out


def test_a_night_imports_nothing_from_the_folder_that_it_starts_in(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('taken from the folder')")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(module_command("edgecl", "--home", str(home), "nightly"), cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and b"is not a learner's home" in done.stderr


# --- systemd ----------------------------------------------------------------------------------------------------------


def test_units_are_written_loaded_and_removed(fakes: Path, home: Path, tmp_path: Path) -> None:
    program(fakes, "systemctl", SYSTEMCTL)
    made = timer.install(home, "4:05")
    name = timer.unit_name(home)
    assert (made.by, made.name, made.at, made.state) == ("systemd", name, "04:05", "active")
    assert made.next.startswith("Thu 2026-11-26") and made.last == "success, exit code 4, Wed 2026-11-25 03:52:00 UTC"
    assert list(units(tmp_path)) == [f"{name}.service", f"{name}.timer"]
    service, clock = map(values, units(tmp_path).values())
    command = words(service["ExecStart"])
    wanted = ["/usr/bin/env", *module_command("edgecl", "--home", str(home), "nightly")]
    assert [word.replace("$$", "$") for word in command] == wanted
    assert command[-2].count("$") == 2 * str(home).count("$")  # the service's environment is not put in
    assert words(service["ReadWritePaths"]) == [str(home)]
    assert (clock["OnCalendar"], clock["Persistent"]) == ("*-*-* 04:05:00", "true")
    calls = (fakes / "log").read_text().splitlines()
    assert calls.index("--user daemon-reload") < calls.index(f"--user enable --now {name}.timer")

    (fakes / "log").unlink()
    assert timer.remove(home) == made and units(tmp_path) == {}
    calls = (fakes / "log").read_text().splitlines()
    changes = [call for call in calls if " show " not in call]
    assert changes == [f"--user disable --now {name}.timer", f"--user stop {name}.service", "--user daemon-reload"]
    assert timer.status(home) == timer.remove(home) == timer.Schedule("", name)


def test_homes_do_not_clobber_each_other_and_one_home_has_one_timer(fakes: Path, tmp_path: Path) -> None:
    program(fakes, "systemctl", SYSTEMCTL)
    homes = [tmp_path / "a/default", tmp_path / "b/default", tmp_path / "b/default "]
    for path in homes:
        path.mkdir(parents=True)
        timer.install(path, "01:00")
    (tmp_path / "link").symlink_to(homes[0])
    assert timer.install(tmp_path / "link", "02:00").at == "02:00"
    assert len(units(tmp_path)) == 6
    assert [timer.status(path).at for path in homes] == ["02:00", "01:00", "01:00"]
    timer.remove(homes[1])
    assert [timer.status(path).by for path in homes] == ["systemd", "", "systemd"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("manager", ["--user", "--system"])
def test_systemd_accepts_the_units_as_installed_and_as_shipped(
    manager: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(home / "py 'th%h\"on"))
    shipped = timer.resource_folder("firmware_configs") / "systemd"
    (tmp_path / "run").mkdir(mode=0o700)
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path / "run")}

    def complaints(files: list[Path]) -> str:
        done = subprocess.run(["systemd-analyze", manager, "verify", *files], capture_output=True, text=True, env=environment)
        return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")

    name = timer.unit_name(home)
    files = [tmp_path / f"{name}.{kind}" for kind in timer.KINDS]
    for kind, path in zip(timer.KINDS, files, strict=True):
        path.write_text(timer.unit_text(kind, home, "03:30"), "utf-8")
    assert complaints(files) == ""
    assert complaints([shipped / f"edgecl-nightly.{kind}" for kind in timer.KINDS]) == ""
    files[0].write_text(files[0].read_text("utf-8").replace("KillMode=", "KillMood="), "utf-8")
    assert "Unknown key 'KillMood'" in complaints(files)


def test_the_service_is_shut_in_and_knows_how_nights_end() -> None:
    service = values((timer.resource_folder("firmware_configs") / "systemd/edgecl-nightly.service").read_text("utf-8"))
    assert service["SuccessExitStatus"].split() == ["3", "4", "75"]
    assert (service["Type"], service["RestartForceExitStatus"], service["RestartSec"]) == ("exec", "75", "15min")
    wanted = {"ProtectSystem": "strict", "PrivateNetwork": "yes", "CPUSchedulingPolicy": "idle", "IOSchedulingClass": "idle"}
    assert service.items() >= (wanted | {"KillMode": "mixed"}).items()
    assert {"MemoryMax", "TimeoutStopSec"} <= service.keys()


def test_units_are_among_the_files_of_the_package() -> None:
    root = Path(__file__).resolve().parent.parent
    data = read_toml(root / "pyproject.toml")["tool"]["setuptools"]["package-data"]["edgecl.firmware_configs"]
    packaged = {path for pattern in data for path in (root / "firmware_configs").glob(pattern)}
    assert {path for path in (root / "firmware_configs").rglob("*") if path.is_file()} <= packaged


@pytest.mark.parametrize("broken", ["daemon-reload", "enable"])
def test_what_systemd_refuses_is_one_line_and_leaves_nothing(
    broken: str, fakes: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(fakes, "systemctl", SYSTEMCTL)
    monkeypatch.setenv("BROKEN", broken)
    with pytest.raises(EdgeclError, match=rf"^systemctl --user {broken}.* failed: Failed: {broken}$"):
        timer.install(home)
    assert units(tmp_path) == {}
    monkeypatch.setenv("BROKEN", "")
    timer.install(home, "01:00")
    before = units(tmp_path)
    monkeypatch.setenv("BROKEN", broken)
    with pytest.raises(EdgeclError, match=rf"Failed: {broken}$"):
        timer.install(home, "02:00")
    assert units(tmp_path) == before


# --- cron -------------------------------------------------------------------------------------------------------------

OTHERS = b"# mine\nMAILTO=\xff\n0 1 * * * backup 100\\% # edgecl-nightly\n\n@reboot x"


def as_cron_runs(line: str) -> str:
    """The command of a line: a backslash is taken away before %, and an unescaped % would end it."""
    command, escaped = "", False
    for character in line.split(maxsplit=5)[5]:
        if character == "%":
            assert escaped, line
            command = command[:-1]
        escaped = character == "\\" and not escaped
        command += character
    return command


def table(fakes: Path) -> bytes:
    return (fakes / "table").read_bytes()


@pytest.fixture
def only_cron(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that reaches no systemd of the user, and a crontab."""
    program(fakes, "systemctl", SYSTEMCTL)
    program(fakes, "crontab", CRONTAB)
    monkeypatch.setenv("BROKEN", "show")
    return fakes


def test_without_systemd_cron_gets_a_line_and_keeps_the_others(only_cron: Path, home: Path, tmp_path: Path) -> None:
    (only_cron / "table").write_bytes(OTHERS)
    other = tmp_path / "other"
    assert timer.install(home, "23:07").by == "cron"
    timer.install(other, "00:30")
    assert timer.install(home, "7:09").at == timer.status(home).at == "07:09"
    assert timer.status(other) == timer.Schedule("cron", timer.unit_name(other), "00:30")
    assert units(tmp_path) == {}
    kept, added = table(only_cron)[: len(OTHERS)], table(only_cron)[len(OTHERS) :].decode().splitlines()
    assert kept == OTHERS and [line[:10] for line in added] == ["", "30 0 * * *", "9 7 * * * "]
    timer.remove(home), timer.remove(other)
    assert table(only_cron) == OTHERS + b"\n" and timer.remove(home).by == ""


@pytest.mark.parametrize("name", [WEIRD, "plain", "a\\%b", "%", "\\", "it's 100%", "\\\\%%\\"])
def test_cron_runs_what_was_meant(name: str, only_cron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / name
    python = program(tmp_path, "py%th 'on", f"#!{sys.executable}\nimport sys, json; print(json.dumps(sys.argv))\n")
    monkeypatch.setattr(sys, "executable", str(python))
    timer.install(home, "23:07")
    command = as_cron_runs(table(only_cron).decode().splitlines()[0])
    ran = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env={"PATH": "/usr/bin:/bin"}, check=True)
    assert json.loads(ran.stdout) == module_command("edgecl", "--home", str(home), "nightly")


@pytest.mark.parametrize(("codes", "n_nights"), [([75, 75, 0, 75], 3), ([3, 75], 1), ([4, 75], 1), ([75] * 200, 90)])
def test_cron_tries_again_while_it_is_not_now(
    codes: list[int], n_nights: int, only_cron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(only_cron, "sleep", '#!/bin/sh\necho "$1" >>"$FAKES/naps"\n')
    for number, code in enumerate(codes):
        (tmp_path / str(number)).write_text(str(code))
    night = f'#!/bin/sh\ncd "{tmp_path}"; n=$(ls night-* 2>/dev/null | wc -l); touch night-$n; exit $(cat $n)\n'
    monkeypatch.setattr(sys, "executable", str(program(tmp_path, "python", night)))
    timer.install(tmp_path / "home")
    command = ["/bin/sh", "-c", as_cron_runs(table(only_cron).decode().splitlines()[0])]
    environment = os.environ | {"PATH": f"{only_cron}:/usr/bin:/bin"}
    subprocess.run(command, env=environment, check=True)
    assert len(list(tmp_path.glob("night-*"))) == n_nights
    naps = (only_cron / "naps").read_text().split() if (only_cron / "naps").exists() else []
    assert naps == ["900"] * (n_nights - (codes[n_nights - 1] != 75))
    timer.remove(tmp_path / "home")
    (tmp_path / f"{n_nights}").write_text("75")
    subprocess.run(command, env=environment, check=True)
    assert len(list(tmp_path.glob("night-*"))) == n_nights + 1


def test_a_crontab_that_cannot_be_read_is_not_written(only_cron: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (only_cron / "table").write_bytes(OTHERS)
    monkeypatch.setenv("CRON_SAYS", "disk error")
    for call in (timer.install, timer.status, timer.remove):
        with pytest.raises(EdgeclError, match=r"^crontab -l failed: disk error$"):
            call(home)
    assert table(only_cron) == OTHERS


def test_a_home_that_moves_from_cron_to_systemd_has_one_night(
    only_cron: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer.install(home)
    monkeypatch.setenv("BROKEN", "")
    assert timer.install(home).by == "systemd" and table(only_cron) == b""
    monkeypatch.setenv("BROKEN", "show")  # as from a shell that does not reach the user's systemd
    assert timer.install(home, "05:00") == timer.status(home) == timer.Schedule("cron", timer.unit_name(home), "05:00")
    monkeypatch.setenv("BROKEN", "")
    timer.install(home)
    monkeypatch.setenv("CRON_SAYS", "you are not allowed to use this program (crontab)")
    assert timer.remove(home).by == "systemd" and timer.status(home).by == ""


# --- bad input --------------------------------------------------------------------------------------------------------


def test_neither_systemd_nor_cron_is_one_line(fakes: Path, home: Path) -> None:
    with pytest.raises(EdgeclError, match=r"^neither a systemd of this user nor crontab was found; .*$"):
        timer.install(home)
    assert timer.status(home).by == timer.remove(home).by == ""


@pytest.mark.parametrize("at", ["", "24:00", "12:60", "noon", "3", "03:30:00", "03:30\n", "-1:00", "٣:30"])
def test_a_time_that_is_none_is_refused(at: str, only_cron: Path, home: Path) -> None:
    with pytest.raises(SettingError, match="at must be HH:MM"):
        timer.install(home, at)


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "\udcff"])
def test_a_path_that_no_table_can_hold_is_refused(name: str, only_cron: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="characters that no unit or crontab can hold"):
        timer.install(tmp_path / name)


# --- the terminal app -------------------------------------------------------------------------------------------------


def run(home: Path, *args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "edgecl", "--home", str(home), "schedule", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    return done.returncode, done.stdout, done.stderr


def test_schedule_at_the_terminal(only_cron: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, out, error = run(home, "install")
    assert (code, out) == (1, "") and "edgecl init" in error and len(error.splitlines()) == 1
    from tests import tiny  # torch, which nothing else here needs

    Learner.init(tiny.build(tmp_path / "tiny.gguf")[0], home).close()
    code, out, error = run(home, "install", "--at", "1:05")
    assert code == 0 and "every night at 01:05" in out and "make up" in error
    code, out, _ = run(home, "status", "--json")
    assert code == 0 and json.loads(out)["by"] == "cron" and json.loads(out)["at"] == "01:05"
    assert run(home, "remove")[1].startswith(f"removed: {timer.unit_name(home)}")
    assert run(home, "status")[:2] == (0, "nothing is scheduled for this home; `edgecl schedule install` does\n")
