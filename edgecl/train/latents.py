"""Latent cache: the hidden states that enter the first trained layer, computed once for each row and kept on disk.

Frozen layers are the same in every step to come, on every night to come where none has changed them, and so is what they
make of a row. On disk, because a night's memory must not grow with its rows; reading a batch takes a millisecond. It is a
cache: whatever is wrong with an entry or with the whole file, the answer is to compute again.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from .batches import TrainRow
from .decoder import Decoder
from .lora import Lora
from .packing import micro_batches, pack

VERSION = 4  # of what an entry holds: raised when a change of the decoder makes other states of the same row
MAX_BYTES = 1 << 30
OF_FREE = 1 / 8  # of what the disk has free, a cache grows by at most: a night needs the rest


class LatentStore:
    """A SQLite file of states by key; over `max_bytes`, those unused for longest go first.

    Without a file, because the disk is full or another process writes to it, nothing is kept.
    """

    def __init__(self, path: Path | str, base_sha256: str, max_bytes: int = MAX_BYTES) -> None:
        """Open or create a cache of a base's states; a file that is not one is replaced."""
        self.path, self.base_sha256, self.max_bytes = Path(path), base_sha256, max_bytes
        try:
            self._open(self.path)
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                self._keep_nothing()
            else:
                self._start_over()
        with suppress(OSError):
            self.max_bytes = min(self.max_bytes, self._size + int(OF_FREE * shutil.disk_usage(self.path.parent).free))

    def __enter__(self) -> LatentStore:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._db.close()

    def get(self, key: bytes) -> bytes | None:
        """Return an entry, None where there is none or it is damaged."""
        try:
            row = self._db.execute("SELECT states, checksum FROM latents WHERE key = ?", (key,)).fetchone()
        except sqlite3.OperationalError:
            return None  # a lock is no damage
        except sqlite3.DatabaseError:
            self._start_over()
            return None
        if row is None or zlib.crc32(row[0]) != row[1]:
            return None
        self._used.add(key)
        states: bytes = row[0]
        return states

    def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep entries, in one transaction; without room for them, on disk or under `max_bytes`, they are not kept."""
        size = sum(len(states) for _, states in entries)
        if size > self.max_bytes:
            return
        try:
            with self._db:
                self._mark_used()
                freed = self._make_room(size)
                rows = [(key, states, zlib.crc32(states), self._now) for key, states in entries]
                self._db.executemany("REPLACE INTO latents (key, states, checksum, used) VALUES (?, ?, ?, ?)", rows)
            self._size += size - freed
        except sqlite3.OperationalError:
            pass  # a full or read-only disk costs time, not the night
        except sqlite3.DatabaseError:
            self._start_over()

    def _open(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, timeout=0)  # to compute is faster than to wait
        self._db.execute("PRAGMA synchronous = OFF")  # a torn file is found by its checksums
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS latents"
            " (id INTEGER PRIMARY KEY, key BLOB UNIQUE, states BLOB, checksum INTEGER, used INTEGER)"
        )
        self._db.commit()
        size, used = self._db.execute("SELECT coalesce(sum(length(states)), 0), coalesce(max(used), 0) FROM latents").fetchone()
        self._size, self._now = int(size), int(used) + 1  # a clock of openings
        self._used: set[bytes] = set()

    def _start_over(self) -> None:
        self._close()
        try:
            for suffix in ("", "-journal"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            self._open(self.path)
        except (OSError, sqlite3.OperationalError):
            self._keep_nothing()

    def _keep_nothing(self) -> None:
        self._close()
        self.max_bytes = 0
        self._open(":memory:")

    def _close(self) -> None:
        with suppress(AttributeError):  # it could not even be opened
            self._db.close()

    def _mark_used(self) -> None:
        self._db.executemany("UPDATE latents SET used = ? WHERE key = ?", [(self._now, key) for key in self._used])
        self._used.clear()

    def _make_room(self, size: int) -> int:
        """Delete entries until `size` bytes fit, and return what they had."""
        freed, wanted = 0, self._size + size - self.max_bytes
        by_use = "SELECT id, length(states) FROM latents ORDER BY used, id"
        for entry, n_bytes in self._db.execute(by_use).fetchall() if wanted > 0 else ():
            if freed >= wanted:
                break
            self._db.execute("DELETE FROM latents WHERE id = ?", (entry,))
            freed += n_bytes
        return freed


class Latents:
    """States of rows that enter the first trained layer of an adapter: from the store, else computed and kept."""

    def __init__(self, decoder: Decoder, lora: Lora, store: LatentStore) -> None:
        """Take the layers below `lora.first_layer`, with what the adapter has for them."""
        self.decoder, self.lora, self.store = decoder, lora, store
        self.n_computed = self.n_found = 0
        facts = (VERSION, store.base_sha256, lora.first_layer, str(decoder.place.dtype), lora.digest_below())
        self._digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)

    def states(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the states (T, D) of rows of token ids, one row after the other."""
        found, missing = self._find(rows)
        if missing:
            found |= self._compute([missing])
        return torch.cat([found[self._key(row)] for row in rows]).to(self.decoder.place.device)

    def look_ahead(self, batches: Sequence[Sequence[TrainRow]], max_tokens: int) -> None:
        """Compute the states of rows that are met next, in parts of at most `max_tokens`."""
        parts: list[dict[bytes, Sequence[int]]] = []
        met: set[bytes] = set()
        for part in micro_batches([row for batch in batches for row in batch], max_tokens):
            _, missing = self._find([row.ids for row in part])
            parts.append({key: row for key, row in missing.items() if key not in met})
            met |= missing.keys()
        if met:
            self._compute([part for part in parts if part])

    def _find(self, rows: Sequence[Sequence[int]]) -> tuple[dict[bytes, torch.Tensor], dict[bytes, Sequence[int]]]:
        """Return the states of rows that the store has, and the rows of which it has none, both by key."""
        by_key, found = {self._key(row): row for row in rows}, {}
        for key, row in by_key.items():
            states = self.store.get(key)
            if states is not None and (held := self._from_bytes(states)).shape == (len(row), self.decoder.shape.width):
                found[key] = held
        self.n_found += len(found)
        return found, {key: row for key, row in by_key.items() if key not in found}

    @torch.no_grad()
    def _compute(self, parts: Sequence[dict[bytes, Sequence[int]]]) -> dict[bytes, torch.Tensor]:
        """Compute and keep the states of rows by key, layer by layer: a packed one is decoded once for all parts."""
        packed = [pack(self.decoder, list(part.values())) for part in parts]
        states = [self.decoder.weights.embed(part.ids) for part in packed]
        for layer in range(self.lora.first_layer):
            for i, part in enumerate(packed):
                states[i] = self.decoder.layer(states[i], layer, part.where, self.lora)
        computed: dict[bytes, torch.Tensor] = {}
        for x, part, rows in zip(states, packed, parts, strict=True):
            computed |= {key: x[at].cpu() for key, at in zip(rows, part.rows, strict=True)}
        self.n_computed += len(computed)
        self.store.put([(key, x.view(torch.uint8).numpy().tobytes()) for key, x in computed.items()])
        return computed

    def _key(self, row: Sequence[int]) -> bytes:
        digest = self._digest.copy()
        digest.update(np.array(row, np.int64).tobytes())
        return digest.digest()

    def _from_bytes(self, states: bytes) -> torch.Tensor:
        flat = torch.frombuffer(bytearray(states), dtype=torch.uint8).view(self.decoder.place.dtype)
        return flat.view(-1, self.decoder.shape.width)
