"""Who writes what a night rehearses beside kept rows, and what is written: the request of the stage `write`.

Most rows are of the generations that learned the kept ones: they begin like those, or, where little was kept, with whatever
that generation says. They stand for what the store did not keep. A small night has more to hold it: rows near its new ones,
other questions that begin alike, so that what is learned answers no others; and other wordings of its new rows, so that they
are known in those too.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import GenerationError
from .generations import Generation, Generations, check_files
from .measure import record_of
from .rows import Stored
from .store import Store

MIN_WRITTEN = 128  # rows for a small night
WRITTEN_A_ROW = 5 / 3  # rows for each new one of a larger night, up to replay.written; on a first night, one
OF_KEPT = 0.9  # of the written rows are of the generations that learned the kept ones, if any were
CONTINUED = 4  # of these rows begin like each kept one, at most; the others begin as their generation likes
SMALL = 32  # new rows at most: a night of corrections
NEAR_A_ROW, MAX_NEAR = 12, 96  # rows near each new one of a small night, and near all of them


@dataclass
class Writers:
    """The writers of one home's night; nothing is run here.

    Attributes:
        base: file of the base; engine: options of llama.cpp.
        at_most: rows of each kind (`replay.written`).
    """

    store: Store
    generations: Generations
    base: str
    engine: dict[str, Any]
    at_most: int
    _whole: dict[Path, bool] = field(default_factory=dict)

    def request(self, yesterday: Generation, new: list[Stored], replay: list[Stored]) -> dict[str, Any]:
        """Return what the stage `write` is to do; without writers there is nothing to do."""
        n = min(self.at_most, max(round(len(new) * (WRITTEN_A_ROW if replay else 1)), MIN_WRITTEN))
        request: dict[str, Any] = {"base": self.base, "engine": self.engine, "writers": [], "reword": []}
        if n:
            small = new if len(new) <= SMALL else []
            request["writers"] = self._writers(yesterday, n, replay, small)
            request["reword"] = [record_of(row.example) for row in small]
        return request

    def _writers(self, yesterday: Generation, n: int, replay: list[Stored], small: list[Stored]) -> list[dict[str, Any]]:
        """Return who writes `n` rows, and what they begin with.

        Yesterday's model writes what comes to its mind: of what nights have taught it, and of what its base was made for.
        The generation that learned a kept row knows it best, and what was learned with it: it writes and answers rows that
        begin like the kept one, so that what later nights made worse is not handed on. Where much was learned and little kept
        it also writes what comes to *its* mind. What was forgotten is not handed on either: a generation that learned from it
        is silent. The newest before it writes in its place, but not of rows that it never knew.
        """
        number = self.generations.next_number()
        forgotten = self.store.forgotten()
        silent = {n for n in self.generations.numbers() if self.generations.hash_of(n) in forgotten}
        writer = self._newest_but(silent, yesterday)
        known = [row for row in replay if row.generation not in silent or (row.generation or 0) <= writer.number]
        shuffled = random.Random(number).sample(known, len(known))
        by_adapter: dict[Path | None, list[Stored | None]] = {}
        of_kept = list(itertools.islice(itertools.cycle(shuffled), round(OF_KEPT * n)))
        for i, row in enumerate(of_kept):
            begins = by_adapter.setdefault(self.adapter_of(row, writer, silent), [])
            begins.append(row if i < CONTINUED * len(shuffled) else None)
        parts: list[tuple[Path, Path | None, Sequence[Stored | None], int, bool]]
        parts = [(writer.model, writer.adapter, [], n - len(of_kept), False)]
        parts += [(Path(self.base), adapter, rows, len(rows), False) for adapter, rows in by_adapter.items()]
        n_near = min(self.at_most, NEAR_A_ROW * len(small), MAX_NEAR)
        parts += [(writer.model, writer.adapter, small, n_near, True)] if n_near else []
        return [
            {
                "model": str(model),
                "adapter": str(adapter) if adapter else None,
                "begin": [record_of(row.example) if row else None for row in rows],
                "is_near": is_near,
                "n": n_rows,
                "seed": 1000 * number + i,
            }
            for i, (model, adapter, rows, n_rows, is_near) in enumerate(parts)
        ]

    def _newest_but(self, silent: set[int], yesterday: Generation) -> Generation:
        """Return yesterday's generation, or, where it is silent, the newest before it that is not, as base and adapter."""
        if yesterday.number not in silent:
            return yesterday
        found = self.generations.load(max(n for n in self.generations.numbers() if n < yesterday.number and n not in silent))
        return replace(found, model=Path(self.base), adapter=found.folder / "adapter.gguf" if found.number else None)

    def adapter_of(self, row: Stored, writer: Generation, silent: set[int]) -> Path | None:
        """Return the adapter of the generation that learned a row; the writer's, where it is none that may teach."""
        number = row.generation or 0
        own = [self.generations.folder / f"{number:04d}"] if number <= writer.number and number not in silent else []
        return next((path for folder in (*own, writer.folder) if self._is_whole(path := folder / "adapter.gguf")), None)

    def _is_whole(self, adapter: Path) -> bool:
        """Return whether an adapter is the one that was published; looked at once a night."""
        if adapter not in self._whole:
            with contextlib.suppress(GenerationError):
                check_files(replace(self.generations.load(int(adapter.parent.name)), adapter=adapter))
                self._whole[adapter] = adapter.is_file()  # generation 0 has none
        return self._whole.setdefault(adapter, False)
