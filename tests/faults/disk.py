"""A full disk and a read-only one, for real: the home lies on a tmpfs of its own, in a mount namespace of its own.

`python -m tests.faults.disk KIND I TEMPLATE FOLDER` is the inside, run by `unshare -rm`; it prints its outcome as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from .house import ROOT, House, Outcome

FREE_KB = (0, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536)


def allowed() -> bool:
    """Return whether mount namespaces may be made here."""
    with_mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(with_mount, capture_output=True).returncode == 0
    except OSError:
        return False


def outside(kind: str, template: Path, i: int, folder: Path) -> Outcome:
    """Run one try inside a namespace of its own; return its outcome."""
    folder.mkdir()
    command = ["unshare", "-rm", sys.executable, "-m", "tests.faults.disk", kind, str(i), str(template), str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        return Outcome(tries=1, findings=[f"the suite failed: {ran.stderr[-500:]}"])
    return Outcome(**json.loads(ran.stdout.splitlines()[-1]))


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def full(house: House, i: int) -> None:
    """Leave so many KB, run a day and a night, give room, go on."""
    stat = os.statvfs(house.folder)
    used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    _mount(house.folder.parent, f"remount,size={used // 1024 + FREE_KB[i]}k")
    night = house.run("adapt", "--json", ok=(0, 1))
    house.outcome.note("the night fitted" if night.code == 0 else "the night was refused")
    house.run("status", ok=(0, 1))
    house.run("ask", "say 1", "--max-tokens", "2", ok=(0, 1))
    rows = b"".join(b'{"prompt": "new %d", "completion": "x", "source": "%s"}\n' % (k, b"x" * 200_000) for k in range(8))
    ran = house.run("observe", "-", stdin=rows, ok=(0, 1))
    _mount(house.folder.parent, "remount,size=1g")  # without room SQLite cannot even read
    n_new = sum(prompt.startswith("new") for _, prompt in house.stored().values())
    if n_new != (8 if ran.code == 0 else 0):
        house.find(f"observe ended with {ran.code} and stored {n_new} of 8 rows")
    house.after()


def readonly(house: House, i: int) -> None:
    """Make the home read-only: every command works, or says so in one line; then go on."""
    if i % 2:
        house.run("status")  # leaves no log of SQLite behind: there is nothing to open it with
    _mount(house.folder.parent, "remount,ro")
    for command in (["status"], ["history"], ["ask", "say 1", "--max-tokens", "2"], ["adapt"], ["rollback"]):
        ran = house.run(*command, ok=(0, 1))
        house.outcome.note(f"{command[0]} {'works' if ran.code == 0 else 'says so in a line'}")
    house.run("observe", "-", stdin=b'{"prompt": "p", "completion": "c"}\n', ok=(1,))
    _mount(house.folder.parent, "remount,rw")
    house.after()


def inside(kind: str, i: int, template: Path, folder: Path) -> Outcome:
    """Mount a tmpfs on the folder, copy the home there and run the try."""
    _mount(folder, "size=1g")
    house = House.copy(template, folder / "try")
    {"full": full, "readonly": readonly}[kind](house, i)
    return house.outcome


if __name__ == "__main__":
    print(json.dumps(asdict(inside(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])))))
