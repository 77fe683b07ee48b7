"""Limits and settings: a profile says what the machine may give, edgecl.toml what this learner is told.

Profiles are TOML files of `firmware_configs/profiles`, found in a checkout and after `pip install`. Unknown keys are
errors: a misspelt limit must not be a limit that is not kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path
from typing import Any, TypeVar

from .errors import SettingError
from .gate import GateSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEDULES = ("constant", "linear", "cosine", "oscillating")
PRECISIONS = {"f16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # of a base, and the type that all its weights get
T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """What a machine may give to a night and to serving.

    Attributes:
        threads: cores to use, 0 for all; training leaves one of more than two to who is chatting meanwhile.
        ram_bytes: what a child process may hold; training is planned to fit, and more is a refused night.
        minutes: the longest sitting of a night. Training takes at most 0.6 of it, over all sittings of its night together;
            any other stage is ended after all of it; `edgecl nightly` yields after it, and goes on the next time.
        quant: what `edgecl init` is to serve where it is not told.
        n_ctx: tokens of the served context; longer examples are cut from the left of the prompt.
        n_batch: prompt tokens that llama.cpp decodes at once.
        n_gpu_layers: layers that llama.cpp keeps on a GPU; -1 is all. Training takes CUDA where it is not 0.
        nice: added to the niceness of a night's child processes; above 0 they also run at SCHED_IDLE, on cores that nobody
            else wants, so that an answer need not wait for them.
        window: hours of local time in which `edgecl nightly` may run, such as "22:00-06:00"; "" is any time.
        needs_ac: whether it waits for mains power; a machine without a battery has it.
        max_temperature_c: it waits for, and yields at, a hotter sensor.
        idle_minutes: it waits until nobody has been at a keyboard for so long, and yields when somebody is; 0: never.
    """

    name: str = "laptop-cpu"
    threads: int = 0
    ram_bytes: int = 4_000_000_000
    minutes: float = 60.0
    quant: str = "int8"
    n_ctx: int = 2048
    n_batch: int = 512
    n_gpu_layers: int = 0
    nice: int = 10
    window: str = ""
    needs_ac: bool = True
    max_temperature_c: float = 90.0
    idle_minutes: float = 10.0

    def __post_init__(self) -> None:
        """Check every limit.

        Raises:
            SettingError: a limit is out of range.
        """
        where = f" (profile {self.name})"
        _check_least(self, "", where, threads=0, ram_bytes=1, n_ctx=64, n_batch=16, n_gpu_layers=-1, nice=0, idle_minutes=0)
        for key in ("minutes", "max_temperature_c"):
            if not getattr(self, key) > 0:
                raise SettingError(f"{key} must be above 0, got {getattr(self, key)}{where}")
        if self.window:
            try:
                begin, end = self._hours()
            except ValueError:
                begin = end = time()
            if begin == end:
                raise SettingError(
                    f'window must be hours such as "22:00-06:00", or "" for any time, got {self.window!r}{where}'
                )

    def engine_options(self) -> dict[str, int]:
        """Return how an Engine loads a model here."""
        return {"n_ctx": self.n_ctx, "n_batch": self.n_batch, "n_threads": self.threads, "n_gpu_layers": self.n_gpu_layers}

    def is_open(self, at: time) -> bool:
        """Return whether a time of day is inside the window; a window that closes before it opens goes over midnight."""
        if not self.window:
            return True
        begin, end = self._hours()
        return begin <= at < end if begin < end else not end <= at < begin

    def _hours(self) -> tuple[time, time]:
        begin, end = (datetime.strptime(clock, "%H:%M").time() for clock in self.window.split("-"))
        return begin, end


@dataclass(frozen=True)
class TrainSettings:
    """What a night's training is told.

    Attributes:
        r: rank of the adapter, for which `lora_alpha` is meant (see `rank`).
        epochs: passes over the new rows.
        min_steps: a small night repeats its rows until it has made this many steps, and half as many more if it has them in
            other words (see `replay.written`).
        depth: share of the layers that are trained, counted from the head; less is faster, learns a little less of the night
            and forgets more of earlier ones (the README has the figures).
        freeze_at: share of the steps of a first night, after which the lower half of the layers is frozen (FreezeOut, Brock
            et al. 2017), so that what it makes of a row is computed once; 1: never. Later nights would forget more by it.
        batch_rows: new rows per step; replay_rows: rows from the buffer in every step.
        anchor_weight: how much a step's KL divergence from the base on general text counts beside its answer loss.
        learning_rate: peak of the schedule: constant, linear, cosine or oscillating (see `train.schedule`).
        warmup: share of the steps in which the rate rises; cycles, bump, settled: of the oscillating schedule.
        ema_decay: of the exponential moving average of the adapter that is merged instead of the last; 0: none.
        patience: training stops when held-out answer loss was best so many measurements ago; 0: never.
        eval_every: steps between two such measurements.
    """

    r: int = 8
    lora_alpha: float = 16.0
    depth: float = 1.0
    freeze_at: float = 0.33
    epochs: int = 3
    min_steps: int = 40
    batch_rows: int = 8
    replay_rows: int = 20
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    cycles: int = 4
    bump: float = 0.5
    settled: float = 0.5
    ema_decay: float = 0.0
    patience: int = 0
    eval_every: int = 10
    weight_decay: float = 0.0
    anchor_weight: float = 1.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            SettingError: a setting is out of range.
        """
        _check_least(self, "train.", "", r=1, epochs=0, min_steps=0, batch_rows=1, replay_rows=0, learning_rate=0)
        _check_least(self, "train.", "", weight_decay=0, anchor_weight=0, max_grad_norm=0, seed=0)
        _check_least(self, "train.", "", patience=0, eval_every=1, warmup=0, cycles=1, bump=0, settled=0, ema_decay=0)
        for key in ("warmup", "settled", "ema_decay"):
            if not getattr(self, key) < 1:
                raise SettingError(f"train.{key} must be below 1, got {getattr(self, key)}")
        if self.schedule not in SCHEDULES:
            raise SettingError(f"train.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule}")
        if not 0 <= self.freeze_at <= 1:
            raise SettingError(f"train.freeze_at must be from 0 to 1, got {self.freeze_at}")
        if not 0 < self.depth <= 1:
            raise SettingError(f"train.depth must be above 0 and at most 1, got {self.depth}")
        if not self.lora_alpha > 0:
            raise SettingError(f"train.lora_alpha must be above 0, got {self.lora_alpha}")

    def rank(self, is_in_blocks: bool) -> int:
        """Return the rank of an adapter: twice `r` where lora_A is the same over blocks, which learns as much then."""
        return 2 * self.r if is_in_blocks else self.r


@dataclass(frozen=True)
class ReplaySettings:
    """What stays in the store.

    Attributes:
        share: of each night's rows, the most that may be kept for rehearsal (one row at least when above 0).
        heldout: of each task's rows, what is set aside for measuring and never trained on.
        written: rows, at most, that earlier nights' askers and generations write each night, for rehearsal beside kept ones;
            and at most 96 near the new ones of a small night, whose questions are also put in other words. None of it is
            stored. 0: nothing is written, and no asker is trained.
        archive: keep every learned row.
    """

    share: float = 0.1
    written: int = 1200
    heldout: float = 0.1
    archive: bool = False

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            SettingError: a share is not from 0 to 1, or written is below 0.
        """
        _check_least(self, "replay.", "", written=0)
        for key in ("share", "heldout"):
            if not 0 <= getattr(self, key) <= 1:
                raise SettingError(f"replay.{key} must be from 0 to 1, got {getattr(self, key)}")


@dataclass(frozen=True)
class PrivacySettings:
    """What does not reach the store.

    Attributes:
        redact: `observe` replaces e-mail addresses, phone, card and account numbers, and keys by placeholders.
    """

    redact: bool = True


@dataclass(frozen=True)
class Settings:
    """edgecl.toml: what one learner is told.

    Attributes:
        base: path of the base GGUF; `read` finds one that lies in the home where the home is now.
        quant: what is served: int8, int4, keep, or a type or mixture that `edgecl_convert` writes.
        keep_models: generations that keep their full model; older ones keep adapter and manifest.
    """

    base: str
    profile: str = "laptop-cpu"
    quant: str = "int8"
    keep_models: int = 3
    train: TrainSettings = field(default_factory=TrainSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    gate: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self) -> None:
        """Check what has no part of its own.

        Raises:
            SettingError: base is no path that can be written to a file, or keep_models is out of range.
        """
        if not isinstance(self.base, str):
            raise SettingError(f"base must be a str, got {self.base!r}")
        try:
            self.base.encode("utf-8")
        except UnicodeEncodeError:
            raise SettingError(f"base must be a path in UTF-8, got {self.base!r}; rename the file or its folder") from None
        _check_least(self, "", "", keep_models=0)

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read edgecl.toml.

        Raises:
            SettingError: it cannot be read, or has an unknown key or a value out of range.
        """
        table = read_toml(path)
        parts = {"train": TrainSettings, "replay": ReplaySettings, "privacy": PrivacySettings, "gate": GateSettings}
        for key, part in parts.items():
            if key in table:
                table[key] = from_table(part, table[key], f"{path} [{key}]")
        settings = from_table(cls, table, str(path))
        home = path.parent.resolve()
        own = home / Path(settings.base).name  # first: where a home was before it was moved, another may be now
        return dataclasses.replace(settings, base=str(own if os.path.isfile(own) else home / settings.base))

    def to_toml(self) -> str:
        """Return the text of edgecl.toml, every setting written out."""
        lines: list[str] = []
        tables: list[str] = []
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                tables += ["", f"[{name}]", *(f"{key} = {_toml(item)}" for key, item in value.items())]
            else:
                lines.append(f"{name} = {_toml(value)}")
        return "\n".join([*lines, *tables, ""])


def served_at(precision: str) -> str:
    """Return the quant at which a base of a precision is served.

    Raises:
        SettingError: no such precision.
    """
    if precision not in PRECISIONS:
        raise SettingError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision}")
    return "F16" if precision == "f16" else precision


def _toml(value: Any) -> str:
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML wants DEL escaped, JSON does not
    return repr(value)


def _check_least(settings: object, prefix: str, where: str, **least: float) -> None:
    for key, low in least.items():
        value = getattr(settings, key)
        if not value >= low:  # so written that NaN is out of range
            raise SettingError(f"{prefix}{key} must be at least {low}, got {value}{where}")


def resource_folder(name: str) -> Path:
    """Return a folder that lies inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / name
    return installed if installed.is_dir() else here.parent / name


def profile_name(typed: str) -> str:
    """Return a profile's name as a home keeps it: the path of a file is made whole, because nights start in other folders."""
    return str(Path(typed).resolve()) if typed.endswith(".toml") else typed


def load_profile(name: str) -> Profile:
    """Read a profile by its name, or by the path of a TOML file.

    Raises:
        SettingError: no such profile, not TOML, an unknown key, or a value out of range.
    """
    folder = resource_folder("firmware_configs") / "profiles"
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise SettingError(f"profile must be one of {known}, or the path of a .toml file; got {name}")
    return from_table(Profile, read_toml(path) | {"name": path.stem}, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as a dict.

    Raises:
        SettingError: it cannot be read or parsed.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"{path}: is not TOML: {error}") from None


def from_table(cls: type[T], table: dict[str, Any], where: str) -> T:
    """Return a settings dataclass filled from a TOML table.

    Raises:
        SettingError: an unknown key, or a value of another type than the default's.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(table, dict):
        raise SettingError(f"{where}: must be a table, got {table!r}")
    for key, value in table.items():
        if key not in fields:
            raise SettingError(f"{where}: unknown key {key}; allowed: {', '.join(fields)}")
        default = fields[key].default
        if default is dataclasses.MISSING:
            continue
        wanted = type(default)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, wanted) or isinstance(value, bool) is not (wanted is bool):
            raise SettingError(f"{where}: {key} must be a {wanted.__name__}, got {value!r}")
    try:
        return cls(**table)
    except TypeError as error:
        raise SettingError(f"{where}: {error}") from None
