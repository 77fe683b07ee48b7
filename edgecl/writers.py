"""Who writes what a night rehearses beside kept rows, and what is written: the request of the stage `write`.

Each earlier night has a generation that answers as it taught, and an asker that asks what was asked of it: together they write
rows that stand for what the store did not keep. The base writes its own chats, as before any night. A small night has more to
hold it: rows near its new ones, other questions that begin alike, so that what is learned answers no others; and other wordings
of its new rows, so that they are known in those too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecl_convert import GgufFile
from edgecl_convert.amx import AMX_TYPES, amx_works
from edgecl_convert.ggml import FLOAT_TYPES, QType, bf16_is_fast, bits_per_weight

from .errors import GenerationError
from .generations import ASKER, Generation, Generations, check_files
from .measure import record_of
from .rows import Stored
from .store import Store

MIN_WRITTEN = 128  # rows for a small night
WRITTEN_A_ROW = 4  # rows, at most, for each new one of a larger night
OF_NIGHTS = 0.9  # of the written rows are of earlier nights, if there were any; the others are the base's own
SMALL = 32  # new rows at most: a night of corrections
NEAR_A_ROW, MAX_NEAR = 12, 96  # rows near each new one of a small night, and near all of them
FOR_MANY_ROWS = (QType.Q4_0, QType.Q8_0, *FLOAT_TYPES)  # what llama.cpp computes fast where more than a few are at once
COPY_IN_MEMORY = 1 / 2  # of ram_bytes, at most, is the copy that writers run from


def base_copy(base: GgufFile, ram_bytes: int) -> tuple[str, int]:
    """Return type and bytes of the copy of a base that writers run from; "" and 0: from the base itself.

    For some block types, such as Q4_1, llama.cpp has no kernels for many rows at once but with AMX. A copy in bfloat16, where
    the CPU multiplies that fast, is what training computes with; one in INT8 is rounded from that by less than what is served.
    """
    n_weights: Counter[QType] = Counter()
    for info in base.tensors.values():
        n_weights[info.qtype] += math.prod(info.shape)
    if n_weights.most_common(1)[0][0] in (*FOR_MANY_ROWS, *(AMX_TYPES if amx_works() else ())):
        return "", 0
    types = (QType.BF16, QType.Q8_0) if bf16_is_fast() else (QType.Q8_0,)
    sizes = [(qtype.name, round(n_weights.total() * bits_per_weight(qtype) / 8)) for qtype in types]
    return next(((name, size) for name, size in sizes if size <= COPY_IN_MEMORY * ram_bytes), ("", 0))


def n_written(n_new: int, n_learned: int) -> int:
    """Return how many rows a night of `n_new` wants: about one for each of the `n_learned` of earlier nights, few for few."""
    wanted = min(WRITTEN_A_ROW * n_new, round(n_learned / OF_NIGHTS)) if n_learned else n_new
    return max(wanted, MIN_WRITTEN)


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

    def request(self, yesterday: Generation, new: list[Stored]) -> dict[str, Any]:
        """Return what the stage `write` is to do; without writers there is nothing to do.

        What was forgotten is not handed on: a generation that learned from it is silent.
        """
        forgotten = self.store.forgotten()
        nights = [night for night in self.generations.lineage(yesterday) if night.hash not in forgotten]
        teachers = [night for night in nights if night.manifest.learned and self._is_whole(night.folder / "adapter.gguf")]
        n = min(self.at_most, n_written(len(new), sum(len(night.manifest.learned) for night in teachers)))
        request: dict[str, Any] = {"base": self.base, "engine": self.engine, "writers": [], "reword": []}
        if n:
            small = [record_of(row.example) for row in new] if len(new) <= SMALL else []
            newest = nights[0] if nights[0].number == yesterday.number else self._unmerged(nights[0])
            request["writers"] = self._writers(teachers, newest, n, small)
            request["reword"] = small
        return request

    def _writers(self, teachers: list[Generation], newest: Generation, n: int, small: list[Any]) -> list[dict[str, Any]]:
        """Return who writes `n` rows: the base, and each night as many as it learned; and who those near to `small` ones."""
        number = self.generations.next_number()
        of_nights = round(OF_NIGHTS * n) if teachers else 0
        shuffled = random.Random(number).sample(teachers, len(teachers))  # of very many nights, others each time
        learned = list(itertools.accumulate(len(night.manifest.learned) for night in shuffled))
        upto = [round(of_nights * rows / learned[-1]) for rows in learned]
        n_near = min(self.at_most, NEAR_A_ROW * len(small), MAX_NEAR)
        parts: list[tuple[Path, Path | None, Path | None, int, list[Any]]] = [(Path(self.base), None, None, n - of_nights, [])]
        for night, first, last in zip(shuffled, [0, *upto], upto, strict=False):
            adapter, asker = night.folder / "adapter.gguf", night.folder / ASKER
            parts.append((Path(self.base), adapter, asker if self._is_whole(asker) else adapter, last - first, []))
        parts.append((newest.model, newest.adapter, newest.adapter, n_near, small))
        return [
            {
                "model": str(model),
                "adapter": str(adapter) if adapter else None,
                "asker": str(asker) if asker else None,
                "near": near,
                "n": n_rows,
                "seed": 1000 * number + i,
            }
            for i, (model, adapter, asker, n_rows, near) in enumerate(parts)
            if n_rows
        ]

    def _unmerged(self, night: Generation) -> Generation:
        """Return a generation as base and adapter: its merged file may be gone."""
        return replace(night, model=Path(self.base), adapter=night.folder / "adapter.gguf" if night.number else None)

    def _is_whole(self, adapter: Path) -> bool:
        """Return whether an adapter is the one that was published; looked at once a night."""
        if adapter not in self._whole:
            with contextlib.suppress(GenerationError):
                check_files(replace(self.generations.load(int(adapter.parent.name)), adapter=adapter))
                self._whole[adapter] = adapter.is_file()  # generation 0 has none
        return self._whole.setdefault(adapter, False)
