"""Lineage on disk: manifests, atomic publishing, roll back.

```
generations/0000/manifest.json    the untouched base: path at init, sha256, tokenizer and template hash
generations/0001/                 adapter.gguf, asker.gguf, model-Q8_0.gguf, report.json, manifest.json
current -> generations/0001       replaced by one rename
```
Where the base lies now, edgecl.toml says: it may be moved, as long as its bytes are the same.

A generation is built in a hidden folder, synced, renamed into place, and only then does `current` move: a crash between
any two steps leaves a model that serves. A manifest names its parent by the hash of the parent's manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgecl_convert import ConvertError, fsync_folder, write_atomic

from .errors import GenerationError
from .profile import Settings

ASKER = "asker.gguf"
BASE_SEEN = "base.json"  # of the home: hash, path, size and time stamp of a base that was moved and found to be the same
_TYPES = {"int": int, "str": str, "dict[str, str]": dict, "list[int]": list}  # of a manifest's fields, as they are written


@dataclass(frozen=True)
class Manifest:
    """What a generation is.

    Attributes:
        number: 0 is the base.
        parent: hash of the parent's manifest, empty for the base.
        model: file name of the merged model, empty where base + adapter is served; for generation 0 the base's path at init.
        files: sha256 by file name, all relative to the generation's folder.
        learned: ids of the rows this night learned; kept: those of them that stay for rehearsal.
        store: the number of the store whose ids these are, see `Store.number`; 0: not known.
    """

    number: int
    parent: str
    base_sha256: str
    model: str
    created: str
    quant: str = ""
    tokenizer_sha256: str = ""
    template_sha256: str = ""
    base_bytes: int = 0
    base_mtime_ns: int = 0
    files: dict[str, str] = field(default_factory=dict)
    learned: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    store: int = 0
    format: int = 1


@dataclass(frozen=True)
class Generation:
    """A published generation and the files that serve it.

    Attributes:
        model: the GGUF file to load; adapter: the GGUF LoRA to apply to it, None for a merged model and for the base.
        hash: sha256 of its manifest file.
    """

    manifest: Manifest
    folder: Path
    hash: str
    model: Path
    adapter: Path | None

    @property
    def number(self) -> int:
        """0 is the base."""
        return self.manifest.number


def now() -> str:
    """Return the time as manifests and the store have it: UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def unpublished(folder: Path, model: Path, adapter: Path | None, identity: str = "") -> Generation:
    """Return files that are measured before they are published, or never are; no manifest can have such a hash.

    Args:
        identity: what their scores are remembered under, beside what is loaded; "": the folder's name.
    """
    loaded = f"{model.name} + {adapter.name}" if adapter else model.name
    manifest = Manifest(number=-1, parent="", base_sha256="", model=model.name, created=now())
    return Generation(manifest, folder, f"draft {identity or folder.name} {loaded}", model, adapter)


def check_files(generation: Generation, *more: str) -> None:
    """Check that the file that a generation serves, and `more` of its files, are those that were published.

    The base has `check_base`, and a draft has no manifest yet: they pass.

    Raises:
        GenerationError: a file is gone, or its bytes changed.
    """
    if generation.number < 1:
        return
    for name in dict.fromkeys(((generation.adapter or generation.model).name, *more)):
        path = generation.folder / name
        is_merged = name == generation.manifest.model
        then = f"`edgecl rollback {generation.number}` writes it again" if is_merged else "restore it, or `edgecl rollback N`"
        try:
            got = sha256_file(path)
        except OSError as error:
            raise GenerationError(f"{path} is gone ({error.strerror}); {then}") from None
        if got != generation.manifest.files.get(name):
            raise GenerationError(f"{path} was changed since it was published; {then}")


class Generations:
    """The generations of one home."""

    def __init__(self, home: Path) -> None:
        """Name the places; of the home's files only edgecl.toml is read, which says where the base is.

        Raises:
            SettingError: edgecl.toml is damaged.
        """
        self.home = home
        self.folder = home / "generations"
        self.link = home / "current"
        config = home / "edgecl.toml"
        self._base = Settings.read(config).base if config.is_file() else ""

    # --- reading ------------------------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """Return the numbers of all generations on disk, published or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and (p / "manifest.json").is_file())

    def load(self, number: int) -> Generation:
        """Read one generation.

        Raises:
            GenerationError: it does not exist, or its manifest is damaged.
        """
        folder = self.folder / f"{number:04d}"
        try:
            data = (folder / "manifest.json").read_bytes()
            manifest = _parsed(data)
        except OSError:
            known = ", ".join(map(str, self.numbers())) or "none"
            raise GenerationError(f"there is no generation {number} in {self.home}; there are: {known}") from None
        except (ValueError, TypeError) as error:
            then = "roll back to another" if number else "restore it, or `edgecl init` a new home"
            raise GenerationError(f"{folder}/manifest.json is damaged: {error}; {then}") from None
        digest = hashlib.sha256(data).hexdigest()
        base = manifest if number == 0 else self.load(0).manifest
        if manifest.number != number or manifest.base_sha256 != base.base_sha256:
            raise GenerationError(f"{folder}/manifest.json belongs to another base or number; roll back to another")
        if number == 0 or not manifest.model:
            adapter = folder / "adapter.gguf" if number else None
            return Generation(manifest, folder, digest, Path(self._base or base.model), adapter)
        return Generation(manifest, folder, digest, folder / manifest.model, None)

    def hash_of(self, number: int) -> str:
        """Return the hash of a generation's manifest, sound or not; empty when it cannot be read."""
        path = self.folder / f"{number:04d}" / "manifest.json"
        return sha256_file(path) if path.is_file() else ""

    def lineage(self, generation: Generation) -> Iterator[Generation]:
        """Yield a generation, its parent, and so on to the base; it comes at once where a manifest on the way is damaged."""
        numbers = {self.hash_of(number): number for number in self.numbers()}
        while generation.number:
            yield generation
            generation = self.load(numbers.get(generation.manifest.parent, 0))
        yield generation

    def unknown(self, generation: Generation) -> set[int]:
        """Return the numbers of those that a generation does not descend from; none where a damaged manifest hides which."""
        nights = list(self.lineage(generation))
        is_whole = len(nights) == 1 or nights[-2].manifest.parent == nights[-1].hash
        return set(self.numbers()) - {night.number for night in nights} if is_whole else set()

    def undone(self) -> set[int]:
        """Return the numbers of those that were rolled back: what serves does not descend from them."""
        with contextlib.suppress(GenerationError):
            return self.unknown(self.current())
        return set()

    def current(self) -> Generation:
        """Return the generation that serves.

        Raises:
            GenerationError: there is none, or it is damaged.
        """
        try:
            target = os.readlink(self.link)
        except OSError:
            known = ", ".join(map(str, self.numbers()))
            then = f"run `edgecl rollback N`, there are: {known}" if known else "run `edgecl init MODEL`"
            raise GenerationError(f"{self.home} serves no generation; {then}") from None
        name = Path(target).name
        if Path(target).parent != Path("generations") or not name.isdecimal():
            raise GenerationError(f"{self.link} points to {target}, not to a generation; run `edgecl rollback N`")
        return self.load(int(name))

    def check_base(self, full: bool, base: str = "") -> None:
        """Check that the base is the file that it was at `init`, wherever it lies now.

        Args:
            full: hash all of it; otherwise only where path, size or time stamp are not those of a file that was found right.
            base: its path; "": the one that edgecl.toml names.

        Raises:
            GenerationError: it is gone, or its bytes are others.
        """
        first = self.load(0)
        manifest, path = first.manifest, Path(base) if base else first.model
        moved = f"set `base` in {self.home}/edgecl.toml to where it is now"
        right = [[manifest.base_sha256, manifest.model, manifest.base_bytes, manifest.base_mtime_ns], self._base_seen()]
        try:
            stat = path.stat()
            found = [manifest.base_sha256, str(path), stat.st_size, stat.st_mtime_ns]
            if not full and found in right:
                return
            got = sha256_file(path)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise GenerationError(f"base {path} is gone ({reason}); put it back, or {moved}") from None
        if got != manifest.base_sha256:
            raise GenerationError(
                f"base {path} has sha256 {got[:12]}, it was {manifest.base_sha256[:12]} at init; "
                f"put the old file back, or {moved}, or `edgecl init` a new home"
            )
        if found not in right:
            with contextlib.suppress(ConvertError):  # of a home that cannot be written to it is hashed again the next time
                write_atomic(self.home / BASE_SEEN, json.dumps(found) + "\n")

    def _base_seen(self) -> Any:
        """Return hash, path, size and time stamp of the base as it was last found right elsewhere than at `init`."""
        try:
            return json.loads((self.home / BASE_SEEN).read_bytes())
        except (OSError, ValueError):  # it is where it was, or the note is damaged
            return None

    # --- writing ------------------------------------------------------------------------------------------------

    def create_base(self, manifest: Manifest) -> None:
        """Write generation 0 and serve it."""
        folder = self.folder / "0000"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomic(folder / "manifest.json", _json(manifest))
        self.point(0)

    def draft(self) -> Path:
        """Return a new hidden folder to build a generation in; drafts and half files of nights that died are removed."""
        self.clear_drafts()
        folder = self.folder / f".draft-{os.getpid()}"
        folder.mkdir(mode=0o700)
        return folder

    def clear_drafts(self) -> None:
        """Remove what nights that died, or were refused, left of their generation."""
        for half in (*self.home.glob(".current-*"), *self.home.glob("runs/.*.tmp")):
            half.unlink(missing_ok=True)
        for old in self.folder.glob(".draft-*"):
            shutil.rmtree(old, ignore_errors=True)

    def publish(self, draft: Path, manifest: Manifest) -> Generation:
        """Move a finished draft into place and serve it.

        The draft's files must be synced already; the manifest is written last, the link moves after the rename.

        Raises:
            GenerationError: the disk failed; what served before serves still.
        """
        target = self.folder / f"{manifest.number:04d}"
        try:
            write_atomic(draft / "manifest.json", _json(manifest))
            fsync_folder(draft)
            os.rename(draft, target)
            fsync_folder(self.folder)
        except (OSError, ConvertError) as error:
            raise GenerationError(f"generation {manifest.number} could not be published: {error}") from None
        self.point(manifest.number)
        return self.load(manifest.number)

    def point(self, number: int) -> None:
        """Let `current` name a generation, by one rename.

        Raises:
            GenerationError: the disk failed; what served before serves still.
        """
        temporary = self.home / f".current-{os.getpid()}"
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(Path("generations") / f"{number:04d}")
            os.replace(temporary, self.link)
            fsync_folder(self.home)
        except OSError as error:
            raise GenerationError(f"{self.link} could not be moved: {error.strerror}") from None

    def next_number(self) -> int:
        """Return the number of the next generation; that of a folder whose manifest is lost is not used again either."""
        names = (path.name for path in self.folder.glob("*") if path.name.isdecimal())
        return max(map(int, names), default=-1) + 1

    def delete(self, number: int) -> None:
        """Delete a generation with all its files; from the first step on it is no generation any more."""
        dying = self.folder / f".draft-{number:04d}"  # what a crash leaves of it, the next draft removes
        os.rename(self.folder / f"{number:04d}", dying)
        shutil.rmtree(dying, ignore_errors=True)

    def delete_asker(self, number: int) -> None:
        """Delete what of a generation says what its night was asked; the rest of it stays."""
        (self.folder / f"{number:04d}" / ASKER).unlink(missing_ok=True)

    def drop_old_models(self, keep: int) -> None:
        """Delete the merged model of all but the newest `keep` generations and the one that serves.

        Their adapter and manifest stay, and they can be rebuilt. A damaged generation is left as it is.
        """
        for number in self.numbers():
            with contextlib.suppress(GenerationError):
                generation = self.load(number)
                if number and generation.manifest.model and not self.keeps_model(number, keep):
                    generation.model.unlink(missing_ok=True)

    def keeps_model(self, number: int, keep: int) -> bool:
        """Return whether a generation's merged model stays where `keep` generations keep theirs."""
        numbers = self.numbers()
        serves = self.link.is_symlink() and Path(os.readlink(self.link)).name == f"{number:04d}"
        return serves or number in numbers[max(0, len(numbers) - keep) :]


def _parsed(data: bytes) -> Manifest:
    """Return a manifest; ValueError or TypeError where a value is of another type, or names a file outside of the folder."""
    manifest = Manifest(**json.loads(data))
    for part in fields(manifest):
        if not isinstance(getattr(manifest, part.name), _TYPES[str(part.type)]):
            raise TypeError(f"{part.name} is not of the type {part.type}")
    if not all(isinstance(row_id, int) for row_id in (*manifest.learned, *manifest.kept)):
        raise TypeError("learned and kept must be ids of rows")
    if manifest.number and ("/" in manifest.model or manifest.model == ".."):  # it is served, and deleted when it is old
        raise ValueError(f"model must be a file's name, got {manifest.model!r}")
    return manifest


def _json(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=1) + "\n"
