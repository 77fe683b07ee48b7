"""Measuring generations in llama.cpp, in a child process; a row of a generation is scored once and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .child import Limits, Progress, run_stage
from .data import Example
from .generations import Generation, check_files
from .rows import Scored
from .store import Store

SITTING_S = 300.0  # a child measures for so long, then its scores are kept: what interrupts the next one costs no more
PROSE, KLD = "prose", "prose, KLD to the base"  # the row names under which what was measured on unrelated prose is remembered


def record_of(example: Example) -> list[Any]:
    """Return an example as a stage's request carries it."""
    return [example.messages, example.task, example.final, example.program, example.last_only]


def mean_loss(scores: dict[str, Scored], rows: Sequence[Example]) -> float:
    """Return the mean answer loss of rows, in nats."""
    return float(np.mean([scores[row.hash].loss_nats for row in rows]))


def by_task(scores: dict[str, Scored], rows: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Return number of rows, accuracy and answer loss of each task."""
    out: dict[str, dict[str, float]] = {}
    for task in sorted({row.task for row in rows}):
        mine = [scores[row.hash] for row in rows if row.task == task]
        accuracy, loss = sum(s.correct for s in mine) / len(mine), sum(s.loss_nats for s in mine) / len(mine)
        out[task] = {"n_rows": len(mine), "accuracy": accuracy, "answer_loss_nats": loss}
    return out


class Meter:
    """Scores rows and prose, and counts what that cost.

    Attributes:
        engine: options of llama.cpp.
        eval_s: wall seconds so far; peak_rss_bytes: of the largest child.
    """

    def __init__(self, store: Store, base: Path, engine: dict[str, Any], limits: Limits, progress: Progress | None) -> None:
        """Name what is needed; nothing is run."""
        self._store, self._base, self.engine, self._limits, self._progress = store, base, engine, limits, progress
        self.eval_s, self.peak_rss_bytes = 0.0, 0

    def scores(self, generation: Generation, rows: Sequence[Example], prose: bool = False) -> dict[str, Scored]:
        """Return the score of each row by its hash; with `prose`, those of the shipped prose under PROSE and KLD.

        Raises:
            EdgeclError: the model cannot be loaded, or the child failed.
        """
        by_hash = {row.hash: row for row in rows}
        wanted = [*by_hash, PROSE, KLD] if prose else list(by_hash)
        known = self._store.scores(generation.hash, wanted)
        prose = prose and not {PROSE, KLD} <= known.keys()
        missing = [row for key, row in by_hash.items() if key not in known]
        missing.sort(key=lambda row: row.messages)  # rows that begin alike share more of their prefix
        while missing or prose:
            fresh = self._run(generation, missing, prose)
            self._store.add_scores(generation.hash, fresh)
            known |= {score.hash: score for score in fresh}
            missing, prose = [row for row in missing if row.hash not in known], False
        return known

    def measure(self, generation: Generation, rows: Sequence[Example]) -> tuple[dict[str, Scored], float]:
        """Return the score of each row by its hash, and the nats per token of the shipped prose.

        Raises:
            EdgeclError: as `scores`.
        """
        known = self.scores(generation, rows, prose=True)
        return known, known[PROSE].loss_nats

    def _run(self, generation: Generation, rows: list[Example], prose: bool) -> list[Scored]:
        """Return the scores of as many rows, from the first on, as a child measures in SITTING_S seconds."""
        check_files(generation)
        request = {
            "base": str(self._base),
            "model": str(generation.model),
            "adapter": str(generation.adapter) if generation.adapter else None,
            "rows": [record_of(row) for row in rows],
            "prose": prose,
            "engine": self.engine,
            "seconds": min(SITTING_S, self._limits.seconds / 2),
        }
        result, peak = run_stage("measure", request, self._limits, self._progress)
        self.eval_s += result["eval_s"]
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak)
        out = []
        for row, (correct, loss, n_tokens) in zip(rows, result["scores"], strict=False):
            out.append(Scored(row.hash, row.task, correct, loss, n_tokens))
        if prose:
            out += [Scored(name, "", True, result["prose"][key], 0) for name, key in ((PROSE, "nats"), (KLD, "kld"))]
        return out
