"""Thousands of damaged files, each opened in a process of its own that was forked from one with everything imported.

`python -m tests.faults.mutants WHAT FIRST LAST TEMPLATE FOLDER` runs part of them and prints what they came to, as JSON. A
forked process that dies by a signal, or is not done in time, is counted and the rest is gone on with. What is asked of each:

- gguf: the file as a model of one's own (edgecl's walk, then llama.cpp, four tokens of an answer), and the same file in place
  of the generation that serves, which must be refused before llama.cpp sees it.
- any other file of a home: everything that reads it; nothing but EdgeclError may come out.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from edgecl import EdgeclError, Learner
from edgecl.engine import Engine
from edgecl.errors import GenerationError
from edgecl.train.checkpoint import Facts, read_checkpoint
from edgecl_convert import ConvertError, GgufFile, read_gguf_adapter

from .damage import mutated
from .house import Outcome

ALARM_S, MEMORY_BYTES = 20, 6_000_000_000
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    65535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


def mutated_gguf(data: bytes, header: int, rng: random.Random) -> bytes:
    """Return a model with one kind of damage: mostly in its header, where lengths, types and offsets are."""
    kind = rng.randrange(6)
    if kind < 2:  # a number of another size
        at, width = rng.randrange(header - 8), rng.choice((4, 8))
        value = rng.choice(NUMBERS) if rng.randrange(2) else rng.randrange(300)
        return data[:at] + struct.pack("<Q", value)[:width] + data[at + width :]
    if kind == 2:  # bytes lost or put in
        at, n = rng.randrange(header), rng.choice((1, 4, 8, 32, 100))
        return data[:at] + (data[at + n :] if rng.randrange(2) else rng.randbytes(n) + data[at:])
    if kind == 3:  # a few bits of the header
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            out[rng.randrange(header)] ^= 1 << rng.randrange(8)
        return bytes(out)
    if kind == 4:
        return mutated(data[:header], rng) + data[header:]
    return mutated(data, rng)


def forked(work: Callable[[], str]) -> str:
    """Return what `work` says, done in a forked process; how that died, if it did."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.alarm(ALARM_S)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            said = work()
        except BaseException:
            said = f"TRACEBACK {traceback.format_exc()[-400:]}"
        with suppress(OSError):
            os.write(write, said.encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return said or f"died by signal {os.WTERMSIG(status)}"


# --- what is asked of a file ------------------------------------------------------------------------------------------


def as_model(path: Path) -> str:
    """Open a file as a model and have it answer."""
    try:
        GgufFile(path).close()
    except ConvertError:
        return "refused by edgecl"
    try:
        with Engine(path, n_ctx=64, n_threads=1) as engine:
            list(engine.generate(engine.vocab.encode("say") or [1], 4))
    except EdgeclError as error:
        return "refused by edgecl" if "llama.cpp" not in str(error) else "refused by llama.cpp"
    return "loaded"


def as_generation(home: Path) -> str:
    """Ask the generation that serves, whose model is another file now."""
    try:
        with Learner(home) as learner:
            learner.ask("say 1", 2)
    except GenerationError as error:
        return "not served" if "was changed since it was published" in str(error) else f"WRONG {error}"
    return "SERVED"


def rows_of(home: Path) -> object:
    """Return what a home's store holds, as edgecl reads it; None where it says that it cannot."""
    try:
        with Learner(home) as learner:
            return [learner.store.rows(role) for role in ("pending", "replay", "heldout")]
    except EdgeclError:
        return None


# Those of a store that another part of the suite is reading: they hold nothing, and may be gone in the middle of a copy.
_LOGS = shutil.ignore_patterns("replay.db-*")


def as_home(path: Path, whole: Path) -> str:
    """Do everything that reads a home by day, and what a night does first; EdgeclErrors are expected."""
    home = next(folder for folder in path.parents if folder.name.startswith("home-"))
    before = rows_of(whole.parents[len(path.relative_to(home).parts) - 1])
    said = "nothing noticed" if rows_of(home) == before else "ROWS OF THE STORE CHANGED UNNOTICED"
    for read in (
        lambda learner: learner.status(),
        lambda learner: learner.history(),
        lambda learner: learner.generations.check_base(True, learner.settings.base),
        lambda learner: learner.finish_last_night(),
        lambda learner: [learner.store.rows(role) for role in ("pending", "replay", "heldout")],
        lambda learner: learner.observe(['{"prompt": "new", "completion": "x"}']),
        lambda learner: learner.rollback(1),
    ):
        try:
            with Learner(home) as learner:
                read(learner)
        except EdgeclError as error:
            if "\n" in str(error):
                return f"LONG {error}"
            said = "refused by edgecl"
    return said


def as_checkpoint(path: Path, whole: Path) -> str:
    """Read a checkpoint as the night would that wrote it; it may be refused, but not give other numbers."""
    with safe_open(whole, "pt") as file:
        facts = Facts(**json.loads(file.metadata()["facts"]))
    wanted = read_checkpoint(whole, facts)
    try:
        found = read_checkpoint(path, facts)
    except EdgeclError as error:
        return f"LONG {error}" if "\n" in str(error) else "refused by edgecl"
    if wanted is None or found is None:
        return "refused by edgecl"
    same = found[1] == wanted[1] and all(torch.equal(found[0][name], tensor) for name, tensor in wanted[0].items())
    return "nothing noticed" if same else "OTHER NUMBERS"


def as_adapter(path: Path, whole: Path) -> str:
    """Read an adapter: where training starts, once its hash was found to be right."""
    try:
        read_gguf_adapter(path)
    except ConvertError as error:
        return f"LONG {error}" if "\n" in str(error) else "refused by edgecl"
    return "nothing noticed"


FILES: dict[str, tuple[str, Callable[[Path, Path], str]]] = {
    "replay.db": ("replay.db", as_home),
    "manifest": ("generations/0002/manifest.json", as_home),
    "edgecl.toml": ("edgecl.toml", as_home),
    "adapter.gguf": ("generations/0002/adapter.gguf", as_adapter),
    "checkpoint": ("runs/checkpoint.safetensors", as_checkpoint),
}


def gguf(first: int, last: int, template: Path, folder: Path) -> Outcome:
    """Damage a model so often; see what edgecl and llama.cpp make of it, and that it is not served."""
    home = folder / "home"
    shutil.copytree(template / "home", home, symlinks=True, ignore=_LOGS)
    data = (template / "base.gguf").read_bytes()
    with GgufFile(template / "base.gguf") as file:
        header = min(info.offset for info in file.tensors.values())
    (served,) = (home / "generations/0002").glob("model-*.gguf")
    outcome = Outcome()
    for i in range(first, last):
        path = folder / f"mutant-{i}.gguf"
        path.write_bytes(mutated_gguf(data, header, random.Random(f"gguf {i}")))
        outcome.tries += 1
        said = forked(lambda path=path: as_model(path))
        outcome.note(said if not said.startswith("TRACEBACK") else "traceback")
        if said.startswith("TRACEBACK"):
            outcome.findings.append(f"gguf {i}: {said}")
        shutil.copy(path, served)
        said_served = forked(lambda: as_generation(home))
        outcome.note(said_served.split()[0] if said_served.startswith(("WRONG", "TRACEBACK")) else said_served)
        if said_served != "not served":
            outcome.findings.append(f"gguf {i} in place of what serves: {said_served}")
        if not said.startswith("died"):
            path.unlink()
    return outcome


def other(what: str, first: int, last: int, template: Path, folder: Path) -> Outcome:
    """Damage one file of a home so often, and read the home."""
    name, read = FILES[what]
    outcome = Outcome()
    whole = (template / "home" / name).read_bytes()
    for i in range(first, last):
        home = folder / f"home-{i}"
        shutil.copytree(template / "home", home, symlinks=True, ignore=_LOGS)
        (home / name).write_bytes(mutated(whole, random.Random(f"{what} {i}")))
        outcome.tries += 1
        said = forked(lambda home=home: read(home / name, template / "home" / name))
        if said in ("nothing noticed", "refused by edgecl"):
            outcome.note(said)
            shutil.rmtree(home)
        else:
            outcome.findings.append(f"{what} {i}: {said}")
    return outcome


if __name__ == "__main__":
    what, first, last, template, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5])
    folder.mkdir(parents=True)
    run = gguf if what == "gguf" else lambda *rest: other(what, *rest)
    print(json.dumps(asdict(run(first, last, template, folder))))
