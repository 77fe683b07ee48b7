"""Files of a home that were damaged by hand or by a disk: each command works or says in one line what to do, and that helps.

What serves is never a damaged file, and once the user has decided, by restoring the file, moving it away or rolling back, the
next night is published and every accepted row is there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from .house import House

Bytes = Callable[[bytes, random.Random], bytes]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwritten(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    n = min(rng.choice((1, 16, 512, 4096)), len(data) - at)
    return data[:at] + rng.choice((rng.randbytes(n), bytes(n))) + data[at + n :]


def _truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _lengthened(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 100, 5000)))


MUTATIONS: tuple[Bytes, ...] = (_flipped, _overwritten, _truncated, _flipped, _overwritten, _lengthened)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return data with one kind of damage; never the same data."""
    while (changed := rng.choice(MUTATIONS)(data, rng)) == data:
        pass
    return changed


def damage(path: Path, name: str, i: int) -> bytes:
    """Damage a file; return what it held."""
    before = path.read_bytes()
    path.write_bytes(mutated(before, random.Random(f"{name} {i}")))
    return before


def day(house: House, night: bool = True) -> dict[str, int]:
    """Run every command once; each may fail in one line. Return their exit codes."""
    commands = [["status"], ["history"], ["ask", "say 1", "--max-tokens", "2"], *([["adapt"]] if night else [])]
    codes = {command[0]: house.run(*command, ok=(0, 1, 3, 4)).code for command in commands}
    house.outcome.note("nothing noticed" if not any(codes.values()) else "said so in a line")
    return codes


# --- one function a file ----------------------------------------------------------------------------------------------


def store(house: House, i: int) -> None:
    """replay.db is damaged; it is restored from a copy."""
    path = house.home / "replay.db"
    before = damage(path, "replay.db", i)
    day(house)
    for old in house.home.glob("replay.db*"):
        old.unlink()
    path.write_bytes(before)
    house.after()


def store_begun_anew(house: House, i: int) -> None:
    """replay.db is damaged and moved away, as the message says: what comes afterwards is learned, not taken for old rows."""
    path = house.home / "replay.db"
    path.write_bytes(b"no database " * (i + 1))
    house.run("status", ok=(1,))
    for old in house.home.glob("replay.db*"):
        old.rename(house.folder / old.name)
    house.accepted.clear()
    house.run("status")
    house.observe(6)
    house.after()


def serving(name: str) -> Callable[[House, int], None]:
    """A file of the generation that serves is damaged: it does not serve, and a rollback helps, for a model to itself."""

    def run(house: House, i: int) -> None:
        (path,) = (house.home / "generations/0002").glob(name)
        damage(path, name, i)
        codes = day(house)
        if codes["ask"] == 0 and name.startswith("model"):
            house.find(f"a damaged {path.name} was served")
        if codes["adapt"] == 0:
            house.find(f"a night went on from a damaged {path.name}")
        house.run("rollback", "2" if name.startswith("model") else "1")
        house.after()

    return run


def earlier(house: House, i: int) -> None:
    """The adapter of an earlier generation is damaged: the night does without it."""
    damage(house.home / "generations/0001/adapter.gguf", "earlier", i)
    house.after()


def manifest(house: House, i: int) -> None:
    """The manifest of what serves is damaged: a rollback helps; that of the base can only be restored."""
    number = (2, 2, 0)[i % 3]
    path = house.home / f"generations/{number:04d}/manifest.json"
    before = damage(path, f"manifest {number}", i)
    codes = day(house)
    if number == 0:
        path.write_bytes(before)
    elif any(codes.values()):
        house.run("rollback", "1")
    house.after()


def settings(house: House, i: int) -> None:
    """edgecl.toml is damaged; it is restored."""
    path = house.home / "edgecl.toml"
    before = damage(path, "edgecl.toml", i)
    day(house, night=False)
    path.write_bytes(before)
    house.after()


def checkpoint(house: House, i: int) -> None:
    """The checkpoint of an unfinished night is damaged: the night trains from the start."""
    path = house.home / "runs/checkpoint.safetensors"
    damage(path, "checkpoint", i)
    ran = house.run("adapt", "--json")
    house.outcome.note("trained from the start" if ran.code == 0 and not ran.json["train"]["resumed_at"] else "went on")
    house.after()


LINKS = (
    "generations/0007", "generations/first", "/etc", "/", "../../..", "generations/../../outside/generations/0001", ".",
    "nowhere", "generations/" + "9" * 200, "\x1b[31mred", "generations/-1", "generations/0001/../0099",
)  # fmt: skip


def link(house: House, i: int) -> None:
    """`current` leads elsewhere, is a file, a folder or gone; a rollback helps."""
    path = house.home / "current"
    path.unlink()
    if i < len(LINKS):
        path.symlink_to(LINKS[i])
    elif i == len(LINKS):
        path.write_text("generations/0001")
    codes = day(house)
    if not all(codes[verb] for verb in ("status", "ask", "adapt")):
        house.find(f"current -> {LINKS[i] if i < len(LINKS) else 'no link'} was served")
    house.run("rollback", "2")
    house.after()


def interrupted(template: Path, folder: Path) -> Path:
    """Return a home whose night was killed with a checkpoint written: what `checkpoint` damages."""
    house = House.copy(template, folder)
    for step in range(1, 60):
        process = house.start("adapt", fault=f"kill:{step} hurry:100000")
        process.communicate()
        (folder / "steps").unlink()
        if (house.home / "runs/checkpoint.safetensors").exists():
            return folder
    raise RuntimeError("no night could be killed with a checkpoint written")
