"""The training loop: a night's rows into a LoRA adapter, read top to bottom.

Rows are cut to the context and put into batches; the planner decides what fits; a checkpoint of the same night is gone on
from; then each step is the gradient of a batch, part by part, and one AdamW step on one flat float32 parameter. Same rows,
seed, thread count and parts: same adapter, bit for bit, interrupted or not; the memory at hand decides how large parts are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecl_convert import Adapter, GgufFile

from ..errors import DataError, Diverged, NotNow
from ..profile import Profile, TrainSettings
from ..shape import read_shape
from .batches import TrainRow, asked_otherwise, night_batches, usable
from .checkpoint import Checkpoint, Facts, read_checkpoint, run_digest, write_checkpoint
from .decoder import Decoder
from .head import NTH, Sample
from .latents import Latents, LatentStore
from .lora import Lora
from .losses import anchors, answer_loss, backward
from .memory import forget_kernels, resident_set
from .optimizer import AdamW
from .plan import MICRO_TOKENS, Plan, Typical, plan_memory, plan_time
from .rehearsal import EVENLY, RECIPE, Rehearsal
from .schedule import learning_rate
from .weights import placement, threads_beside_the_assistant

EVERY = 4  # steps comes the anchor, and weighs as much more then
LONGER = 1.5  # times the steps, of a small night that has its rows in other words too
NAMED = 5  # rows at most, in an error
AHEAD = 4  # steps, whose rows go through the frozen layers together
KEPT = ("first_layer", "upper_layer", "freeze_step", "micro_tokens", "seconds")  # of a plan, by who goes on from a checkpoint

Progress = Callable[[int, int, float], None]  # (steps done, steps, loss in nats)


@dataclass
class TrainReport:
    """What a night's training did; times in seconds, losses in nats.

    Attributes:
        tokens: unpadded tokens of all rows trained on, counted as if each row were run alone: what rows begin with in
            common is computed once a batch and counted for each.
        plan: what the planner chose, in a line; predicted_s and predicted_rss_bytes: what it expected of this run.
        n_cut: rows cut from the left to the context; n_left_out: rows without an answer, or whose answer is longer than that;
            left_out: which of the new ones.
        unmet: those of the new rows that no step had come to when training ended early.
        resumed_at: the step that a checkpoint was gone on from.
        heldout: answer loss on held-out rows, by step.
    """

    steps: int = 0
    tokens: int = 0
    train_s: float = 0.0
    tokens_per_s: float = 0.0
    dtype: str = ""
    plan: str = ""
    predicted_s: float = 0.0
    predicted_rss_bytes: int = 0
    n_cut: int = 0
    n_left_out: int = 0
    left_out: list[int] = field(default_factory=list)
    unmet: list[int] = field(default_factory=list)
    resumed_at: int = 0
    stopped_early: bool = False
    losses: list[float] = field(default_factory=list)
    heldout: dict[int, float] = field(default_factory=dict)


@dataclass
class Night:
    """What training is given beside base, rows and settings.

    Attributes:
        start: the adapter to go on from.
        anchor: token ids of pieces of general text, on which the model is held to the base; one every EVERY steps.
        heldout: rows that tell when to stop.
        store: where states that enter the first trained layer are kept; None: they are computed each time.
        checkpoint: the file that an interrupted run goes on from; None: none is written.
        checkpoint_every_s: an interrupted run loses at most so much.
        base_sha256: of the base's file, as the checkpoint names it.
        samples: whether losses are taken over a `Sample` of the vocabulary: for rows to be known by heart, without an anchor.
        in_blocks: names of weights that are merged into minimums, as for `Lora`.
        ram_share: of limits.ram_bytes, with which is planned: less than 1 after a try that took more than it may.
        stop: asked before each step: whether the run must save its checkpoint and end with NotNow.
    """

    start: Adapter | None = None
    anchor: Sequence[list[int]] = ()
    heldout: Sequence[TrainRow] = ()
    store: LatentStore | None = None
    checkpoint: Path | None = None
    checkpoint_every_s: float = 60.0
    base_sha256: str = ""
    samples: bool = False
    in_blocks: Collection[str] = ()
    ram_share: float = 1.0
    stop: Callable[[], bool] = bool  # bool() is False


def train(
    gguf: GgufFile,
    new: Sequence[TrainRow],
    replay: Sequence[TrainRow],
    settings: TrainSettings,
    limits: Profile | None = None,
    night: Night | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, TrainReport]:
    """Train an adapter for the base `gguf` on new rows, with replay rows in every batch.

    Args:
        limits: threads, ram_bytes, minutes and n_ctx of it are kept; training stops at a step boundary, with a usable adapter.

    Raises:
        DataError: no row can be learned.
        Diverged: the loss is not a number.
        NotNow: it was told to stop; the next run goes on from the checkpoint.
        EdgeclError: the memory is too small for any plan.
        UnsupportedError, AdapterError, CheckpointError: the base, the start or the checkpoint cannot be used.
    """
    run = _Run(gguf, new, replay, settings, limits or Profile(), night or Night())
    run.steps(progress)
    return run.finish()


class _Run:
    """One run of training: what it works with, and how far it has come."""

    def __init__(
        self,
        gguf: GgufFile,
        new: Sequence[TrainRow],
        replay: Sequence[TrainRow],
        settings: TrainSettings,
        limits: Profile,
        night: Night,
    ) -> None:
        most = threads_beside_the_assistant()
        torch.set_num_threads(min(limits.threads or most, most))
        torch.manual_seed(settings.seed)
        settings = replace(settings, freeze_at=1.0) if night.start else settings  # earlier nights would be forgotten
        self.settings, self.limits, self.night, self.report = settings, limits, night, TrainReport()
        self.names: dict[int, str] = {}  # of rows, by their id
        self.new, self.replay = self._usable("new", new), self._usable("replay", replay)
        self.heldout = [row for row in night.heldout if usable(row, limits.n_ctx) is row]
        if not self.new:
            raise DataError(
                f"none of {len(new)} rows has an answer that fits into {limits.n_ctx} tokens; raise n_ctx, or shorten answers"
            )
        self.batches = self._batches()
        self.rehearsal, self.evenly_until = Rehearsal(self.replay), round(EVENLY * len(self.batches))
        self.place = placement(limits.n_gpu_layers)
        n_held = math.ceil(len(self.batches) / EVERY)
        texts = list(night.anchor)[:n_held] if settings.anchor_weight else []
        self.facts = self._facts(texts)  # of the rows as they are dealt now: some are dealt again
        held = resident_set()
        found = read_checkpoint(night.checkpoint, self.facts) if night.checkpoint else None

        longest_text = max((len(ids) for ids in texts), default=0)
        shape = read_shape(gguf)
        micro_tokens, sizes = found[1]["micro_tokens"] if found else 0, (self.batches, longest_text, held)
        plan = plan_memory(shape, self.place, settings, limits.ram_bytes, *sizes, micro_tokens, night.ram_share)
        restarted = ""
        if found and plan.micro_tokens != micro_tokens:  # of other parts other sums come
            found, restarted = None, f"; from the start: its checkpoint's parts of {micro_tokens} tokens do not fit any more"
        if plan.few_kernels:
            forget_kernels()
        self.decoder = Decoder(gguf, self.place, plan.n_resident, plan.resident_head)
        self.decoder.checkpointing = plan.checkpointing
        self.sample = Sample(self.decoder.weights, self.new) if night.samples else None
        self.lora = Lora(gguf, shape, settings.r, settings.lora_alpha, settings.seed, self.place, night.in_blocks)
        self.plan = self._in_time(plan, bool(texts), found)
        if night.start is not None:
            self.lora.warm_start(night.start)
        self.anchors = anchors(self.decoder, texts, night.store)
        self.optimizer = AdamW(self.lora.flat, settings.weight_decay, settings.max_grad_norm)
        self.averaged = self.lora.flat.detach().clone() if settings.ema_decay else None
        self.best: tuple[float, torch.Tensor] | None = None
        self.spent_s = 0.0  # before a checkpoint was gone on from
        if found:
            self._go_on_from(*found)
        self._freeze(self.report.steps)
        report = self.report
        report.dtype = str(self.place.dtype).removeprefix("torch.")
        report.plan, report.predicted_s = f"{self.plan}{restarted}", self.plan.seconds
        report.predicted_rss_bytes = self.plan.peak_rss_bytes

    def _usable(self, kind: str, rows: Sequence[TrainRow]) -> list[TrainRow]:
        kept = []
        for i, row in enumerate(rows):
            cut = usable(row, self.limits.n_ctx)
            if cut is None:
                self.report.n_left_out += 1
                if kind == "new":
                    self.report.left_out.append(i)
                continue
            self.report.n_cut += cut is not row
            kept.append(cut)
            self.names |= {id(one): row.name or f"{kind} {i + 1}" for one in (cut, *cut.reworded)}
        return kept

    def _batches(self) -> list[list[TrainRow]]:
        """Return the rows of every step."""
        settings, rng = self.settings, np.random.default_rng(self.settings.seed)
        steps_an_epoch = math.ceil(len(self.new) / settings.batch_rows)
        least = settings.min_steps * (LONGER if any(row.reworded for row in self.new) else 1)
        n_epochs = max(settings.epochs, math.ceil(least / steps_an_epoch))
        passes = [self.new] * settings.epochs
        passes += [[asked_otherwise(row, self.limits.n_ctx, rng) for row in self.new] for _ in range(settings.epochs, n_epochs)]
        return night_batches(passes, self.replay, settings.batch_rows, settings.replay_rows, rng)

    def _in_time(self, plan: Plan, has_anchor: bool, found: Checkpoint | None) -> Plan:
        """Return the plan with its depth and time; a run that is gone on from keeps its depth and the parts of its steps."""
        if found:
            return replace(plan, **{name: found[1][name] for name in KEPT})
        if not self.batches:
            return plan
        by_size = sorted(self.batches, key=lambda batch: sum(len(row.ids) for row in batch))
        text = self.night.anchor[0][::EVERY] if has_anchor else None
        typical = Typical(by_size[len(by_size) // 2], text, self.sample)
        last = [id(row) for batch in self.batches[plan.freeze_step :] for row in batch]
        share_first = len(set(last)) / max(1, len(last)) if self.night.store else 1.0
        limit_s, n_steps = 60 * self.limits.minutes, len(self.batches)
        return plan_time(plan, self.decoder, self.lora, self.settings.depth, limit_s, typical, n_steps, share_first)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _facts(self, texts: list[list[int]]) -> Facts:
        """Return what this run depends on; limits change where it stops, not where it goes."""
        told = [asdict(self.settings), RECIPE, MICRO_TOKENS, sorted(self.night.in_blocks), NTH if self.night.samples else 0]
        told += [str(self.place), texts]
        measured = self.heldout if self.settings.patience else []
        rows = [row for part in (*self.batches, measured) for row in part]
        return Facts(self.night.base_sha256, run_digest(told, rows, self.night.start))

    def _go_on_from(self, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        self._put(tensors["flat"])
        self.optimizer.n_steps.fill_(progress["steps"])
        self.optimizer.exp_avg.copy_(tensors["exp_avg"])
        self.optimizer.exp_avg_sq.copy_(tensors["exp_avg_sq"])
        if self.averaged is not None:
            self.averaged.copy_(tensors["averaged"])
        if "best" in tensors:
            self.best = (progress["best"], tensors["best"].to(self.place.device))
        report = self.report
        report.steps, report.tokens, report.losses = progress["steps"], progress["tokens"], progress["losses"]
        report.heldout = {int(step): loss for step, loss in progress["heldout"].items()}
        report.resumed_at, self.spent_s = report.steps, progress["train_s"]
        self.rehearsal.met, self.rehearsal.lost = progress["met"], progress["lost"]
        if report.steps > self.evenly_until:
            self.rehearsal.deal_again(self.batches, self.evenly_until, self.settings.seed)

    def _save(self, train_s: float) -> None:
        if self.night.checkpoint is None:
            return
        optimizer, report, plan = self.optimizer, self.report, self.plan
        tensors = {"flat": optimizer.flat.detach(), "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        progress: dict[str, Any] = {name: getattr(report, name) for name in ("steps", "tokens", "losses", "heldout")}
        progress |= {name: getattr(plan, name) for name in KEPT}
        progress |= {"train_s": train_s, "met": self.rehearsal.met, "lost": self.rehearsal.lost}
        if self.averaged is not None:
            tensors["averaged"] = self.averaged
        if self.best is not None:
            progress["best"], tensors["best"] = self.best
        write_checkpoint(self.night.checkpoint, self.facts, {name: tensor.cpu() for name, tensor in tensors.items()}, progress)

    # --- steps --------------------------------------------------------------------------------------------------------

    def steps(self, progress: Progress | None) -> None:
        """Train until the last step, the time limit, or the held-out rows get worse."""
        report, n_steps = self.report, len(self.batches)
        began = saved = time.perf_counter()
        for step in range(report.steps, n_steps):
            now = time.perf_counter()
            spent_s = now - began + self.spent_s
            if self._is_getting_worse() or spent_s > 60 * self.limits.minutes:
                report.stopped_early = True
                break
            is_told = self.night.stop()
            if is_told or (step and now - saved >= self.night.checkpoint_every_s):
                self._save(spent_s)
                saved = now
            if is_told:
                raise NotNow(f"training was told to stop after {step} of {n_steps} steps")
            value = self._step(step)
            report.steps += 1
            report.tokens += sum(len(row.ids) for row in self.batches[step])
            report.losses.append(round(value, 5))
            if progress:
                progress(report.steps, n_steps, value)
            self._measure_heldout()
        report.train_s = time.perf_counter() - began + self.spent_s
        self._save(report.train_s)  # what comes next may be interrupted too
        report.tokens_per_s = report.tokens / max(report.train_s, 1e-9)

    def _step(self, step: int) -> float:
        settings = self.settings
        turn, rest = divmod(step, EVERY)
        held = self.anchors[turn % len(self.anchors)] if self.anchors and not rest else None
        if step == self.evenly_until:
            self.rehearsal.deal_again(self.batches, step, settings.seed)
        if step and step == self.plan.freeze_step:
            self._freeze(step)
        rows = self.batches[step]
        if self.latents and (step % AHEAD == 0 or step in (self.report.resumed_at, self.evenly_until, self.plan.freeze_step)):
            begin, since = step - step % AHEAD, self.plan.freeze_step if step >= self.plan.freeze_step else 0
            self.latents.look_ahead(self.batches[max(begin, since) : begin + AHEAD], self.plan.ahead_tokens)
        weight = settings.anchor_weight * EVERY
        if self.sample:
            self.sample.turn = step
        each = backward(self.decoder, self.lora, rows, held, weight, self.plan.micro_tokens, self.latents, self.sample)
        value = sum(each) / len(rows)
        if step < self.evenly_until:
            self.rehearsal.note(step, rows, each)
        self.lora.tie_gradients()
        norm = self.optimizer.clip()
        if not (math.isfinite(value) and math.isfinite(norm)):
            worst = [row for row, loss in zip(rows, each, strict=True) if not math.isfinite(loss)] or rows
            names = list(dict.fromkeys(self.names[id(row)] for row in worst))
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise Diverged(
                f"training loss is {value} and the norm of its gradient {norm} at step {step + 1} of {len(self.batches)} "
                f"(rows: {', '.join(names[:NAMED])}{more}); lower train.learning_rate, which is {settings.learning_rate}, "
                "or remove the row that causes it (`edgecl forget ID`)"
            )
        self.optimizer.step(learning_rate(settings, step, len(self.batches)), self.lora.trained)
        if self.averaged is not None:
            decay = min(settings.ema_decay, (1 + step) / (10 + step))  # the first steps are no average yet
            self.averaged.lerp_(self.lora.flat.detach(), 1 - decay)
        self.lora.refresh()
        return value

    def _freeze(self, step: int) -> None:
        """Train only the layers that are trained from a step on; what the others make of a row is computed once."""
        first = self.plan.first_layer if step < self.plan.freeze_step else self.plan.upper_layer
        self.lora.freeze_below(first)
        self.latents = Latents(self.decoder, self.lora, self.night.store) if self.night.store and first else None
        if self.latents:
            texts = [TrainRow(held.ids, [False] * len(held.ids)) for held in self.anchors]
            self.latents.look_ahead([texts], self.plan.ahead_tokens)

    def _measure_heldout(self) -> None:
        """Measure the held-out rows where it is time to, with the average where there is one."""
        settings, report = self.settings, self.report
        if not (settings.patience and self.heldout) or report.steps % settings.eval_every:
            return
        last = self.lora.flat.detach().clone()
        if self.averaged is not None:
            self._put(self.averaged)
        loss = answer_loss(self.decoder, self.lora, self.heldout, self.plan.micro_tokens)
        report.heldout[report.steps] = round(loss, 5)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.lora.flat.detach().clone())
        self._put(last)

    def _put(self, factors: torch.Tensor) -> None:
        self.lora.flat.detach().copy_(factors)
        self.lora.refresh()

    def _is_getting_worse(self) -> bool:
        """Return whether the best of the held-out rows is `patience` measurements old."""
        found, wait = self.report.heldout, self.settings.patience * self.settings.eval_every
        return bool(found) and min(found, key=found.__getitem__) <= max(found) - wait

    def finish(self) -> tuple[Adapter, TrainReport]:
        """Return the adapter that training ends with: the best on held-out rows, else the average, else the last."""
        flat = self.best[1] if self.best is not None else self.averaged
        if flat is not None:
            self._put(flat)
        self.report.unmet = self._unmet()
        return self.lora.adapter(), self.report

    def _unmet(self) -> list[int]:
        """Return the new rows that the adapter which training ends with was not trained on."""
        found, n_steps = self.report.heldout, self.report.steps
        if self.best is not None:
            n_steps = min(found, key=found.__getitem__)
        met = {id(row) for batch in self.batches[:n_steps] for row in batch}
        left_out = set(self.report.left_out)
        given = [i for i in range(len(self.new) + len(left_out)) if i not in left_out]
        return [i for i, row in zip(given, self.new, strict=True) if met.isdisjoint(map(id, (row, *row.reworded)))]
