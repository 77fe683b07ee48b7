"""Making a learner's home: a base that llama.cpp loads, generation 0, settings."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgecl_convert import merge, open_source, resolve_quant, write_atomic
from edgecl_convert.recipe import KEEP

from .child import Limits, run_stage
from .device import propose_profile
from .errors import EdgeclError, SettingError, StageError, translated
from .generations import BASE_SEEN, Generations, Manifest, now, sha256_file
from .lock import night_lock
from .places import default_home, find_model
from .profile import PRECISIONS, Profile, Settings, load_profile, profile_name, served_at
from .shape import read_shape
from .tries import clear_try

NEW_BASE = ".base-new.gguf"  # until it is known that it can be used
OLD = ("generations", "runs")  # folders that a home is replaced with
BEGUN = ("lock", NEW_BASE, f".{NEW_BASE}", "base-", "generations", "current")  # how names begin that a killed `init` leaves


def make_home(
    model: Path | str, home: Path | str | None, quant: str, precision: str, profile: str, force: bool, **settings: Any
) -> Path:
    """Make a home for a base model and return its folder; arguments as for `Learner.init`.

    A home that is to be replaced is as it was until the new base has been loaded. A folder that was there, and empty, is its
    owner's alone from the end on, and as it was where this fails.

    Raises:
        EdgeclError: the model cannot be used, or the home exists, or the folder has files of something else.
    """
    place = Path(home) if home else default_home()
    path = find_model(model)
    profile = profile_name(profile or propose_profile()[0])
    limits = load_profile(profile)
    quant = served_at(precision) if precision else quant or limits.quant
    with translated(), open_source(path) as source:
        read_shape(source)  # what nights cannot train is no base
        resolved = resolve_quant(quant, source)
        template = source.get("tokenizer.chat_template")
        if not template:
            raise SettingError(f"{path} has no chat template (tokenizer.chat_template); use an instruct model")
        tokens = "\0".join(source.get("tokenizer.ggml.tokens", []))
    # at 4 bits a base is rounded once, before its nights: after each of them, little of what it learned would be left
    own = resolved if quant == "int4" and resolved != KEEP else "F16" if path.is_dir() else ""
    written = PRECISIONS.get(precision, own)
    base = place.resolve() / f"base-{written}.gguf" if written else path
    made = Settings(base=str(base), quant=quant, profile=profile, **settings)
    if any(base.is_relative_to(place.resolve() / folder) for folder in OLD):
        raise SettingError(f"{path} is of the home that it would replace; copy it elsewhere first")
    exists = (place / "edgecl.toml").exists()
    if exists and not force:
        raise SettingError(f"{place} is a learner's home already; choose another --home, or give --force")
    try:
        held = {path.name for path in place.iterdir()} if place.exists() else None
        is_begun = held and "lock" in held and all(name.startswith(BEGUN) for name in held)
        if held and not (exists or is_begun):
            raise SettingError(f"{place} has other files in it and no edgecl.toml; choose another --home, or an empty folder")
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingError(f"{place}: cannot be written: {error.strerror}; choose another --home") from None
    with night_lock(place):
        fresh = place / NEW_BASE
        for left in place.glob(f".{NEW_BASE}.*.tmp"):  # of a run that was killed
            left.unlink()
        try:
            if written:
                with translated(), open_source(path) as source:
                    merge(source, None, fresh, written)
            _check_loads(fresh if written else path, limits, path)
            if exists:  # until here it can be used as before
                for old in ("current", BASE_SEEN, "replay.db", "replay.db-wal", "replay.db-shm"):
                    (place / old).unlink(missing_ok=True)
                clear_try(place)
                for model in {*place.resolve().glob("base-*.gguf")} - {base, path.resolve()}:
                    model.unlink()
                for folder in OLD:
                    shutil.rmtree(place / folder, ignore_errors=True)
                (place / "edgecl.toml").unlink()  # last: until then it can be replaced again
            if written:
                os.replace(fresh, base)
            stat = base.stat()
            manifest = Manifest(
                number=0,
                parent="",
                base_sha256=sha256_file(base),
                model=str(base),
                created=now(),
                tokenizer_sha256=sha256(tokens.encode()).hexdigest(),
                template_sha256=sha256(template.encode()).hexdigest(),
                base_bytes=stat.st_size,
                base_mtime_ns=stat.st_mtime_ns,
            )
            try:
                with translated():
                    Generations(place).create_base(manifest)
                    write_atomic(place / "edgecl.toml", made.to_toml())
                place.chmod(0o700)  # also where it was there: who may write in a home may replace what is in it
            except OSError as error:
                raise SettingError(f"{place}: cannot be written: {error.strerror}; choose another --home") from None
        except BaseException:
            if not exists:
                with suppress(OSError):  # why it failed is to be told
                    _take_back(place, held)
            raise
        finally:
            fresh.unlink(missing_ok=True)
    return place


def _take_back(place: Path, held: set[str] | None) -> None:
    """Remove what `init` put into a folder that held these names; None: also the folder, which was not there."""
    for path in place.iterdir():
        if path.name in (held or ()) or not path.name.startswith((*BEGUN, "edgecl.toml")):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if held is None:
        place.rmdir()


def _check_loads(model: Path, profile: Profile, source: Path) -> None:
    """Have llama.cpp load a model and compute a token in a child process: what can end that would end a chat.

    Raises:
        EdgeclError: it ended, or cannot load the model, which was made from `source`.
    """
    request = {"model": str(model), "engine": profile.engine_options()}
    try:
        run_stage("load", request, Limits(profile.ram_bytes, 60 * profile.minutes, 0, profile.threads))
    except StageError as error:
        raise EdgeclError(f"{source} cannot be used: {error}") from None
