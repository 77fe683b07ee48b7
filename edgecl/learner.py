"""The learner: a home folder by day, and the door to its nights.

Threads share one Learner, processes open one home each for itself: while one adapts, the others answer and observe, and a
second `adapt` is told to come later.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecl_convert import GgufFile

from .child import Limits, Progress, run_stage
from .data import Example, parse_lines
from .errors import GenerationError, NothingToLearn, SettingError, translated
from .generations import Generation, Generations, check_files
from .home import make_home
from .lock import night_lock
from .measure import KLD, Meter, by_task
from .night import AdaptReport, Night
from .places import open_home
from .profile import Settings, load_profile
from .rebuild import restore
from .redact import redact
from .rows import ObserveReport
from .store import Store
from .template import chat_format, template_of
from .tries import last_try
from .turns import Turns

if TYPE_CHECKING:
    from .engine import Engine

GATES = ("enforce", "report")


class Learner:
    """An open home folder; close it, or use it as a context manager.

    Any thread may call any method but `engine`. Answers are given one turn at a time: `ask` and `turn` wait for the turn that
    is running, and what a night has published serves from the next turn on. `observe` and what reads the store wait for no
    turn and no night. `adapt` takes as long as a night does, so it belongs in a thread of its own. `close` waits for the turn
    that is running and stops a night; whatever is called afterwards raises an EdgeclError.
    """

    def __init__(self, home: Path | str | None = None) -> None:
        """Open a home that `init` made.

        Raises:
            EdgeclError: it is no home, or one of its parts is damaged or of a newer version.
        """
        self.home = open_home(home)
        self.settings = Settings.read(self.home / "edgecl.toml")
        self.profile = load_profile(self.settings.profile)
        self.generations = Generations(self.home)
        self.store = Store(self.home / "replay.db")
        self._engine: Engine | None = None
        self._serving = ""
        self._turns = Turns()

    @classmethod
    def open(cls, home: Path | str | None = None) -> Learner:
        """Open a home; the same as the constructor."""
        return cls(home)

    @classmethod
    def init(
        cls,
        model: Path | str,
        home: Path | str | None = None,
        *,
        quant: str = "",
        precision: str = "",
        profile: str = "",
        force: bool = False,
        **settings: Any,
    ) -> Learner:
        """Make a home for a base model and open it.

        Args:
            model: a GGUF file, a Hugging Face folder (its F16 conversion is kept in the home), or "smollm2", the packaged one.
            quant: what is served; "": the profile's, or that of `precision`. For int4, a model of more bits
                is first written so, in the home.
            precision: f16, int8 or int4: the base is written at it first, in the home; nights are then trained against exactly
                the weights that they are merged into and served with, and `quant` is that precision.
            profile: the limits, by name or by the path of a TOML file; "": what suits this machine.
            force: replace a home that exists; its store and generations are deleted.
            settings: further fields of Settings, such as replay=ReplaySettings(share=0.02).

        Raises:
            EdgeclError: the model cannot be used, or the home exists.
        """
        return cls(make_home(model, home, quant, precision, profile, force, **settings))

    def close(self) -> None:
        """Free the engine and close the store, after the turn that is running; a night stops with NotNow, nothing is lost."""
        with self._turns.closing():
            if self._engine:
                self._engine.close()
                self._engine = None
            self.store.close()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- by day -------------------------------------------------------------------------------------------------

    def observe(
        self, examples: Iterable[Example | str | bytes], task: str | None = None, source: str = "", *, replace: bool = True
    ) -> ObserveReport:
        """Store examples, or JSONL lines, to be learned; duplicates are kept once, bad lines are reported.

        Args:
            replace: an answer replaces an older one to the same prompt; False, for answers that nobody corrected: the stored
                one stays, and the new one counts as known.

        Raises:
            StoreError: the database failed; nothing was stored.
        """
        counts: Counter[str] = Counter()
        template = template_of(self.settings.base)

        def clean(example: Example) -> Example:
            if template:
                template.check(example)
            return self.redacted(example, counts)

        good, bad = parse_lines(examples, task, source, clean)
        added = self.store.add(good, self.settings.replay.heldout, replace, self.generations.undone)
        return ObserveReport(**asdict(added), bad=bad, redacted=dict(counts))

    def redacted(self, example: Example, counts: Counter[str]) -> Example:
        """Return an example as `observe` stores it, where privacy.redact is on with placeholders, whose kinds are counted.

        Raises:
            DataError: nothing but placeholders is left of the answer.
        """
        return redact(example, counts) if self.settings.privacy.redact else example

    def ask(self, prompt: str | Sequence[tuple[str, str]], max_tokens: int = 256) -> str:
        """Return the greedy answer of the serving generation to a prompt, or to a chat of (role, content).

        Raises:
            EdgeclError: the model cannot be loaded, or the prompt does not fit.
        """
        return self.answer(prompt, max_tokens)[0]

    def answer(self, prompt: str | Sequence[tuple[str, str]], max_tokens: int = 256) -> tuple[str, int, bool]:
        """Return what `ask` does, of how many tokens that is, and whether it came to its end before `max_tokens`.

        Raises:
            EdgeclError: as for `ask`.
        """
        messages = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        with self.turn() as engine:
            with translated(), GgufFile(self.settings.base) as base:
                ids = chat_format(base, engine.vocab).prompt(messages)
            tokens = list(engine.generate(ids, max_tokens))
            return engine.vocab.text_of(tokens), len(tokens), len(tokens) < min(max_tokens, engine.n_ctx - len(ids))

    @contextmanager
    def turn(self) -> Iterator[Engine]:
        """Hold llama.cpp for one turn, with the generation that serves as it begins; other turns and `close` wait for its end.

        Raises:
            EdgeclError: the learner is closed, the base changed, or the model cannot be loaded.
        """
        with self._turns.turn():
            yield self.engine()

    def engine(self, generation: Generation | None = None) -> Engine:
        """Return llama.cpp with a generation loaded (default: the one that serves; a new one is picked up here, between turns).

        For a learner that one thread has to itself; `turn` is for several.

        Raises:
            EdgeclError: the base changed, or the model cannot be loaded.
        """
        from .engine import Engine

        serving = generation or self.generations.current()
        if self._engine is None or self._serving != serving.hash:
            loads_base = serving.model == Path(self.settings.base)
            self.generations.check_base(full=loads_base, base=self.settings.base)
            check_files(serving)
        if self._engine is None:
            self._engine = Engine(serving.model, serving.adapter, **self.profile.engine_options())
        elif self._serving != serving.hash:
            self._serving = ""  # a switch that fails leaves the engine closed: the next turn must switch again
            self._engine.switch(serving.model, serving.adapter)
        self._serving = serving.hash
        return self._engine

    def rollback(self, number: int | None = None) -> Generation:
        """Serve an earlier generation (default: the parent of the one that serves); nothing is deleted.

        A merged model that was dropped to save space is written again.

        Raises:
            GenerationError: there is no such generation, or its files are not as they were.
            NotNow: a night is running.
        """
        with night_lock(self.home):
            if number is None:
                parent = self.generations.current().manifest.parent
                parents = [n for n in self.generations.numbers() if self.generations.hash_of(n) == parent]
                if not parents:
                    raise GenerationError("the base itself serves; there is nothing to roll back to")
                number = parents[0]
            target = self.generations.load(number)
            self.generations.check_base(full=False, base=self.settings.base)
            with translated():
                restore(target, self.settings.base, self.limits())
            self.generations.point(number)
            return target

    def status(self) -> dict[str, Any]:
        """Return what serves, what waits, how the last night ended, and why there was none since then."""
        serving, nights = self.generations.current(), self.store.nights()
        last = {key: nights[-1][key] for key in ("started", "accepted", "reason", "generation")} if nights else None
        return {
            "home": str(self.home),
            "base": self.settings.base,
            "quant": self.settings.quant,
            "generation": serving.number,
            "served": "base + adapter" if serving.adapter else serving.model.name,
            "generations": self.generations.numbers(),
            "tasks": self.store.counts(),
            "last_night": last,
            "last_try": last_try(self.home),
        }

    def history(self) -> list[dict[str, Any]]:
        """Return every night, oldest first, with its full report."""
        return self.store.nights()

    # --- measuring ----------------------------------------------------------------------------------------------

    def evaluate(self, number: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Measure a generation (default: the one that serves) in llama.cpp: every task's rows, prose, latency.

        Raises:
            EdgeclError: no such generation, or a child failed.
        """
        generation = self.generations.current() if number is None else self.generations.load(number)
        self.generations.check_base(full=False, base=self.settings.base)
        rows = [row.example for row in self.store.rows("heldout")]
        measured = {row.task for row in rows}
        rows += [row.example for row in self.store.rows("replay") if row.example.task not in measured]
        meter = self.meter(progress)
        scores, prose = meter.measure(generation, rows)
        return {
            "generation": generation.number,
            "tasks": by_task(scores, rows),
            "prose_nats": prose,
            "prose_nats_base": meter.measure(self.generations.load(0), [])[1],
            "prose_kld": scores[KLD].loss_nats,
            "latency": self.bench(generation.number, progress),
        }

    def bench(self, number: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Return pp512, tg128, TTFT, ITL, peak RSS and model bytes of a generation (default: the one that serves).

        Raises:
            EdgeclError: no such generation, or the child failed.
        """
        generation = self.generations.current() if number is None else self.generations.load(number)
        adapter = str(generation.adapter) if generation.adapter else None
        request = {"model": str(generation.model), "adapter": adapter, "repeats": 3, "engine": self.profile.engine_options()}
        result, peak = run_stage("bench", request, self.limits(), progress)
        return result | {"peak_rss_bytes": peak, "model_bytes": generation.model.stat().st_size}

    def meter(self, progress: Progress | None = None, limits: Limits | None = None) -> Meter:
        """Return what scores rows in a child process and remembers the scores in the store."""
        return Meter(self.store, Path(self.settings.base), self.profile.engine_options(), limits or self.limits(), progress)

    # --- by night -----------------------------------------------------------------------------------------------

    def adapt(
        self,
        task: str | None = None,
        *,
        minutes: float | None = None,
        ram_bytes: int | None = None,
        gate: str = "enforce",
        compare: Sequence[str] = (),
        progress: Progress | None = None,
        stop: Callable[[], str] = str,
    ) -> AdaptReport:
        """Run one night: learn what is pending, and publish the result unless it makes something worse.

        Args:
            task: learn only this task's rows; the others stay pending.
            gate: "enforce" refuses a night; "report" records the verdict and keeps it.
            compare: further quants to merge and measure for `survival`, such as ("int4",).
            stop: asked again and again: why the night must yield now, "" while it need not.

        Raises:
            NothingToLearn: no pending rows.
            NotNow: another night is running, or this one yielded, as at `close`; the next one goes on from it.
            EdgeclError: a stage failed; yesterday's model serves still and no row is lost.
        """
        if gate not in GATES:
            raise SettingError(f"gate must be one of {', '.join(GATES)}; got {gate}")
        with night_lock(self.home), self._turns.night(stop) as stop, translated():
            self.finish_last_night()
            check_files(self.generations.current(), "adapter.gguf")
            new = self.store.rows("pending", task)
            if not new:
                raise nothing_to_learn(task)
            self.generations.check_base(full=True, base=self.settings.base)
            minutes = self.profile.minutes if minutes is None else minutes
            limits = replace(self.limits(minutes, ram_bytes), nice=self.profile.nice, stop=stop)
            meter = self.meter(progress, limits)
            night = Night(
                self.settings, self.profile, self.store, self.generations, meter, limits, minutes, gate, compare, progress
            )
            return night.run(new)

    def finish_last_night(self) -> None:
        """Do what a night that was killed once it was published did not: settle what it learned, and write it down."""
        current = self.generations.current()
        manifest = current.manifest
        learned = self.store.claimed(manifest.number).intersection(manifest.learned)
        self.store.settle(learned, manifest.kept, manifest.number, self.settings.replay.archive)
        is_ours = manifest.number and manifest.store == self.store.number
        if is_ours and all(night["generation"] != manifest.number for night in self.store.nights()):
            with suppress(OSError, ValueError, TypeError, KeyError):  # its report is damaged
                report = json.loads((current.folder / "report.json").read_bytes())
                self.store.record_night(manifest.number, True, report["reason"], report)

    def limits(self, minutes: float | None = None, ram_bytes: int | None = None) -> Limits:
        """Return what a child may take: the profile's limits, or narrower ones.

        Raises:
            SettingError: a limit that is not above 0.
        """
        minutes = self.profile.minutes if minutes is None else minutes
        ram_bytes = self.profile.ram_bytes if ram_bytes is None else ram_bytes
        for name, limit in (("minutes", minutes), ("ram_bytes", ram_bytes)):
            if not limit > 0:  # so written that NaN is refused
                raise SettingError(f"{name} must be above 0, got {limit}")
        return Limits(ram_bytes, 60 * minutes, 0, self.profile.threads)


def nothing_to_learn(task: str | None = None) -> NothingToLearn:
    """Return the error of a night without a pending row; of a task, if it was to learn only that."""
    what = f"no pending example of task {task}" if task else "no pending example"
    return NothingToLearn(f"nothing to learn: {what}; `edgecl observe FILE.jsonl` adds some")
