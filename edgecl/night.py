"""One night: select -> write -> train -> merge -> measure -> gate -> publish or refuse.

Read `run` top to bottom. Every stage that loads a model is a child process; what decides (which rows stay, whether the night is
kept) are the pure functions of `replay`, `metrics` and `gate`. Until `publish` renames the draft nothing that serves is
touched; rows leave `pending` only after that.

A night may be interrupted and ends where it would have ended: which rows it learns, what the models wrote and the checkpoint
of training stay in runs/, the scores in the store, until it is published or refused by the gate. A stage that fails refuses the
night too, with its reason and log in the history, but what was come to before it is kept: the next night goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgecl_convert import ConvertError, GgufFile, resolve_quant, write_atomic

from .child import Limits, Progress, run_stage
from .data import Example
from .errors import DataError, Diverged, EdgeclError, NotNow, StageError
from .gate import TaskResult, judge
from .generations import ASKER, Generation, Generations, Manifest, now, sha256_file, unpublished
from .measure import KLD, Meter, mean_loss, record_of
from .metrics import survival
from .parts import compared, examples_of, measured_on, swapped
from .profile import Profile, Settings
from .replay import choose, quota
from .rows import Stored
from .store import Store
from .writers import SMALL, Writers, base_copy

WRITING = 0.25  # of a night's minutes, at most, are for what models write; training has 0.6, whatever is left the rest
NEGLIGIBLE_NATS = 0.01  # that a merge loses costs no answer, however large a share of a small gain it is
BASE_COPY = ".base.tmp"  # named as what is cleared where drafts are


@dataclass
class AdaptReport:
    """What a night did.

    Attributes:
        started: as `generations.now` has it; of a night that was interrupted, its last sitting.
        accepted: whether tonight's generation serves.
        refused: of a night that is not worth a second try, what `tried` says of it.
        reason: why it was refused, or what is worth knowing about what serves.
        verdict: what the gate said, also where it only reports.
        served: file name of what was published, or "base + adapter".
        survival: share of the adapter's gain that each merged file keeps, by quant; "adapter" is 1 by definition.
        losses: answer loss on tonight's rows in nats: before, of the unmerged adapter, of each merged file.
        results: every measured task, before and after.
        train: what training said; its no_asker, why the night has none.
        prose: nats per token of unrelated prose: base, before, after; kld: of tonight's file from the base, nats per token.
        n_written: rows that models wrote for rehearsal, n_reworded: other wordings of new rows, both in write_s seconds.
        ask_s: of training the asker, which says what tonight was asked; train_s: the adapter, which answers.
        peak_rss_bytes: of the largest child.
    """

    started: str = field(default_factory=now)
    accepted: bool = False
    refused: str = ""
    reason: str = ""
    verdict: str = ""
    generation: int | None = None
    served: str = ""
    n_new: int = 0
    n_replay: int = 0
    n_written: int = 0
    n_reworded: int = 0
    n_kept: int = 0
    results: list[TaskResult] = field(default_factory=list)
    survival: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    prose: dict[str, float] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    write_s: float = 0.0
    train_s: float = 0.0
    ask_s: float = 0.0
    train_tokens_per_s: float = 0.0
    merge_s: float = 0.0
    eval_s: float = 0.0
    peak_rss_bytes: int = 0
    model_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


@dataclass
class Night:
    """The parts a night works with.

    Attributes:
        gate: "enforce" refuses a night, "report" records the verdict and keeps it.
        compare: further quants to merge and measure for `survival`.
    """

    settings: Settings
    profile: Profile
    store: Store
    generations: Generations
    meter: Meter
    limits: Limits
    minutes: float
    gate: str = "enforce"
    compare: Sequence[str] = ()
    progress: Progress | None = None
    report: AdaptReport = field(default_factory=AdaptReport)

    def run(self, new: list[Stored]) -> AdaptReport:
        """Learn pending rows.

        Raises:
            NotNow: the night yields; the next one goes on from there.
            EdgeclError: a stage failed; what served before serves still, and no row left `pending`.
        """
        for quant in (self.settings.quant, *self.compare):
            self._qtype(quant)  # an unknown one is said before hours of work
        yesterday = self.generations.current()
        new = self._begun(yesterday, new)
        unknown = self.generations.unknown(yesterday)  # what was rolled back is not rehearsed
        replay = [row for row in self.store.rows("replay") if row.generation not in unknown]
        heldout, known = self.store.rows("heldout"), self._known(yesterday)
        is_small = len(new) <= SMALL
        rows = examples_of(measured_on(new, heldout, replay, known, is_small))
        report = self.report
        report.n_new, report.n_replay = len(new), len(replay)
        draft = self.generations.draft()
        try:
            _, report.prose["before"] = self.meter.measure(yesterday, rows)
            report.prose["base"] = self.meter.measure(self.generations.load(0), [])[1]
            self._train(draft, yesterday, new, replay, self._write(yesterday, new))
            left_out = [new[i] for i in report.train["left_out"]]
            unused = {*report.train["left_out"], *report.train["unmet"]}
            learned = [row for i, row in enumerate(new) if i not in unused]
            if len(left_out) == len(new):
                self.store.set_aside([row.id for row in new])
                raise DataError(
                    f"none of {len(new)} rows has an answer that fits into {self.profile.n_ctx} tokens; they are set aside: "
                    "raise n_ctx (profile) and observe them again, or shorter answers"
                )
            if not learned:
                raise EdgeclError("the night had no time to train on a single row; raise minutes (profile, `--minutes`)")
            parts = measured_on(learned, heldout, replay, known, is_small)
            rows = examples_of(parts)
            before = self.meter.scores(yesterday, rows)  # known, but of rows that stand for others which were not met
            taught = examples_of([part for part in parts if part.learning])
            report.losses["before"] = mean_loss(before, taught)
            tonight = self._merge(draft, taught)
            swaps = [swapped(part.rows) if part.learning and not is_small else [] for part in parts]
            others = [other for pairs in swaps for _, other in pairs]
            after, report.prose["after"] = self.meter.measure(tonight, [*rows, *others])
            report.prose["kld"] = after[KLD].loss_nats
        except (EdgeclError, ConvertError, OSError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, NotNow):
                raise
            report.reason = str(error)
            if getattr(error, "exit_code", 1) == Diverged.exit_code:
                return self._refuse(draft, yesterday, new)
            log = {"log": error.log} if isinstance(error, StageError) else {}
            self.store.record_night(None, False, report.reason, report.as_dict() | log)
            if isinstance(error, EdgeclError):
                raise
            raise EdgeclError(report.reason) from error
        finally:
            report.eval_s = self.meter.eval_s
            report.peak_rss_bytes = max(report.peak_rss_bytes, self.meter.peak_rss_bytes)
        report.results = compared(parts, swaps, before, after)
        verdict = judge(report.results, report.prose["base"], report.prose["after"], self.settings.gate, is_small)
        report.verdict = "; ".join(verdict.reasons) or "nothing got worse"
        if not verdict.accepted and self.gate == "enforce":
            report.reason = report.verdict
            return self._refuse(draft, yesterday, new)
        try:
            self._publish(draft, tonight, yesterday, new, learned, left_out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # it is in its place by now, or the disk failed
        self._forget_run()
        return report

    @property
    def _runs(self) -> Path:
        folder = self.generations.home / "runs"
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def _begun(self, yesterday: Generation, new: list[Stored]) -> list[Stored]:
        """Return the rows of the night that is gone on from, while all of them wait still; what came since waits, too."""
        path, of = self._runs / "rows.json", [yesterday.hash, self.store.number]
        with contextlib.suppress(OSError, ValueError, TypeError):  # none, or damaged
            key, ids = json.loads(path.read_text("utf-8"))
            begun = [row for row in new if row.id in ids]
            if key == of and ids and len(begun) == len(ids):
                return begun
        write_atomic(path, json.dumps([of, [row.id for row in new]]))
        return new

    def _known(self, yesterday: Generation) -> set[str]:
        """Return the tasks that yesterday's model, or one that it goes back to, got better at on held-out rows."""
        found = set()
        for night in self.generations.lineage(yesterday):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # the base has no report; one may be damaged
                results = json.loads((night.folder / "report.json").read_bytes())["results"]
                taught = [r for r in results if r["learning"] and r["kind"] == "heldout"]
                found |= {r["task"] for r in taught if r["loss_high"] < 0 or r["accuracy_after"] == 1.0}
        return found

    def _refuse(self, draft: Path, yesterday: Generation, new: list[Stored]) -> AdaptReport:
        report, told = self.report, replace(self.profile, minutes=self.minutes, ram_bytes=self.limits.ram_bytes)
        report.refused = tried(self.settings, told, yesterday, self.store, new)
        self.store.record_night(None, False, report.reason, report.as_dict())
        shutil.rmtree(draft, ignore_errors=True)
        self._forget_run()
        return self.report

    def _forget_run(self) -> None:
        """Remove what an interrupted night would have gone on from."""
        self.store.drop_draft_scores()
        for name in ("rows.json", "written.json", "checkpoint.safetensors", "asker.safetensors", "asker.db"):
            (self._runs / name).unlink(missing_ok=True)

    def _write(self, yesterday: Generation, new: list[Stored]) -> dict[str, Any]:
        """Return what the models of earlier nights write: `written` rows to rehearse, and each new row's other wordings."""
        writers = Writers(self.store, self.generations, self.settings.base, self.meter.engine, self.settings.replay.written)
        request = writers.request(yesterday, new)
        with GgufFile(self.settings.base) as base:
            qtype, _ = base_copy(base, self.limits.ram_bytes)
        request["copy"] = [str(self._runs / BASE_COPY), qtype] if qtype else None
        found = self._written(request, yesterday) if request["writers"] else {"written": [], "reworded": []}
        self.report.n_written, self.report.n_reworded = len(found["written"]), sum(map(len, found["reworded"]))
        return found

    def _written(self, request: dict[str, Any], yesterday: Generation) -> dict[str, Any]:
        """Return what is asked for: what an interrupted night has, if it asked for the same, else what is written now.

        A checkpoint is of the rows it was trained on, and what llama.cpp writes is the same again only on the same threads.
        """
        path = self._runs / "written.json"
        key = sha256(json.dumps([yesterday.hash, request]).encode()).hexdigest()
        with contextlib.suppress(OSError, ValueError, TypeError):  # none, or damaged
            kept_key, kept = json.loads(path.read_text("utf-8"))
            if kept_key == key:
                return dict(kept)
        began, report = time.perf_counter(), self.report
        try:
            timed = request | {"seconds": 60 * WRITING * self.minutes}
            result, peak = run_stage("write", timed, self.limits, self.progress)
        finally:
            (self._runs / BASE_COPY).unlink(missing_ok=True)
        report.write_s, report.peak_rss_bytes = time.perf_counter() - began, max(report.peak_rss_bytes, peak)
        write_atomic(path, json.dumps([key, result]))
        return result

    def _train(
        self, draft: Path, yesterday: Generation, new: list[Stored], replay: list[Stored], written: dict[str, Any]
    ) -> None:
        limits = replace(self.profile, minutes=0.6 * self.minutes, ram_bytes=self.limits.ram_bytes)
        learning = {row.example.task for row in new}
        heldout = [row for row in self.store.rows("heldout") if row.example.task in learning]
        request = {
            "base": self.settings.base,
            "base_sha256": yesterday.manifest.base_sha256,
            "start": str(yesterday.folder / "adapter.gguf") if yesterday.number else None,
            "new": [record_of(row.example) for row in new],
            "replay": [record_of(row.example) for row in replay],
            "ids": [[row.id for row in new], [row.id for row in replay]],
            **written,
            "heldout": [record_of(row.example) for row in heldout] if self.settings.train.patience else [],
            "settings": asdict(self.settings.train),
            "quant": self._qtype(self.settings.quant),
            "limits": asdict(limits),
            "runs": str(self._runs),
            "adapter_gguf": str(draft / "adapter.gguf"),
            "asker_gguf": str(draft / ASKER) if self.settings.replay.written else None,
        }
        result, peak = run_stage("train", request, self.limits, self.progress)
        report = self.report
        report.train, report.peak_rss_bytes = result | {"peak_rss_bytes": peak}, max(report.peak_rss_bytes, peak)
        report.train_s, report.ask_s, report.train_tokens_per_s = result["train_s"], result["ask_s"], result["tokens_per_s"]

    def _merge(self, draft: Path, taught: list[Example]) -> Generation:
        """Return the draft that will serve: the merged file, or, where too little of the night survives, a wider one.

        The wanted type comes first; where it keeps less than gate.min_survival, INT8; where that fails too, base + adapter.
        """
        report, wanted = self.report, self.settings.quant
        unmerged = _draft(draft, Path(self.settings.base), draft / "adapter.gguf")
        report.losses["adapter"] = mean_loss(self.meter.scores(unmerged, taught), taught)
        report.survival["adapter"] = 1.0
        served = unmerged
        for quant in dict.fromkeys([wanted, *self.compare, "int8"]):
            is_fallback = quant == "int8" and served is unmerged
            if quant != wanted and quant not in self.compare and not is_fallback:
                continue
            merged, facts = self._merge_one(draft, quant)
            report.losses[quant] = mean_loss(self.meter.scores(merged, taught), taught)
            report.survival[quant] = survival(report.losses["before"], report.losses["adapter"], report.losses[quant])
            if (quant == wanted or is_fallback) and self._keeps_enough(quant):
                served, report.merge_s = merged, facts["merge_s"]
            elif merged.model != served.model:
                merged.model.unlink()
        report.served = "base + adapter" if served.adapter else served.model.name
        report.model_bytes = served.model.stat().st_size + (served.adapter.stat().st_size if served.adapter else 0)
        if not self._keeps_enough(wanted):
            report.reason = f"{wanted} kept {report.survival[wanted]:.0%} of the night, so {report.served} serves"
        return served

    def _keeps_enough(self, quant: str) -> bool:
        lost = self.report.losses[quant] - self.report.losses["adapter"]
        return self.report.survival[quant] >= self.settings.gate.min_survival or lost <= NEGLIGIBLE_NATS

    def _qtype(self, quant: str) -> str:
        with GgufFile(self.settings.base) as gguf:
            return resolve_quant(quant, gguf, learned=True)

    def _merge_one(self, draft: Path, quant: str) -> tuple[Generation, dict[str, Any]]:
        qtype = self._qtype(quant)
        path = draft / f"model-{quant if qtype.startswith('keep') else qtype}.gguf"
        request = {"base": self.settings.base, "adapter": str(draft / "adapter.gguf"), "out": str(path), "quant": qtype}
        result, peak = run_stage("merge", request, self.limits, self.progress)
        self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak)
        return _draft(draft, path, None), result

    def _publish(
        self,
        draft: Path,
        tonight: Generation,
        yesterday: Generation,
        new: list[Stored],
        learned: list[Stored],
        left_out: list[Stored],
    ) -> None:
        """Make the draft what serves. Of the new rows, learned ones leave `pending`, as do those that no night can learn."""
        report, number = self.report, self.generations.next_number()
        kept = kept_ids(learned, self.settings.replay.share, number)
        report.accepted, report.generation, report.n_kept = True, number, len(kept)
        write_atomic(draft / "report.json", json.dumps(report.as_dict(), indent=1) + "\n")
        files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
        manifest = Manifest(
            number=number,
            parent=yesterday.hash,
            base_sha256=yesterday.manifest.base_sha256,
            model="" if tonight.adapter else tonight.model.name,
            created=now(),
            quant=self.settings.quant,
            files={str(path.relative_to(draft)): sha256_file(path) for path in files},
            learned=[row.id for row in learned],
            kept=kept,
            store=self.store.number,
        )
        self.store.claim([row.id for row in new], number)  # the others, too: what is near them was trained on
        published = self.generations.publish(draft, manifest)
        self.store.rename_scores(tonight.hash, published.hash, self.generations.load(0).hash)
        self.store.settle(manifest.learned, manifest.kept, number, self.settings.replay.archive)
        self.store.set_aside([row.id for row in left_out])
        self.store.record_night(number, True, report.reason, report.as_dict())
        self.generations.drop_old_models(self.settings.keep_models)


def kept_ids(learned: Sequence[Stored], share: float, number: int) -> list[int]:
    """Return the ids of the rows that stay for rehearsal, of those that night `number` has learned."""
    rows = choose([row.example.answer for row in learned], quota(len(learned), share), seed=number)
    return [learned[i].id for i in rows]


def tried(settings: Settings, profile: Profile, yesterday: Generation, store: Store, new: Sequence[Stored]) -> str:
    """Return a digest of what a night comes of, its new, held-out and kept rows: of the same comes the same."""
    rows = [*new, *store.rows("heldout"), *store.rows("replay")]
    facts = [asdict(settings), asdict(profile), yesterday.hash, [record_of(row.example) for row in rows]]
    return sha256(json.dumps(facts).encode()).hexdigest()


def _draft(folder: Path, model: Path, adapter: Path | None) -> Generation:
    """Return files of the draft, whose scores are remembered by their adapter: an interrupted night comes to it again."""
    return unpublished(folder, model, adapter, sha256_file(folder / "adapter.gguf")[:16])
