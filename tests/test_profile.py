"""Profiles and edgecl.toml: what is shipped loads, a misspelt or impossible limit is named, what is written is read back."""

import dataclasses
from datetime import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecl.errors import SettingError
from edgecl.gate import GateSettings
from edgecl.profile import (
    SCHEDULES,
    PrivacySettings,
    Profile,
    ReplaySettings,
    Settings,
    TrainSettings,
    from_table,
    load_profile,
    resource_folder,
)

SHIPPED = sorted((resource_folder("firmware_configs") / "profiles").glob("*.toml"))


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_profile_loads_and_says_every_limit(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert load_profile(str(path)) == profile
    keys = {line.split("=")[0].strip() for line in path.read_text("utf-8").splitlines() if "=" in line.split("#")[0]}
    assert keys == {f.name for f in dataclasses.fields(Profile)} - {"name"}


def test_laptop_cpu_is_shipped_and_is_the_default() -> None:
    assert "laptop-cpu" in [path.stem for path in SHIPPED]
    assert Settings(base="b").profile == "laptop-cpu"
    assert load_profile("laptop-cpu") == Profile()


def test_an_unknown_profile_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"one of .*laptop-cpu.*; got toaster"):
        load_profile("toaster")
    with pytest.raises(SettingError, match=r"got .*missing\.toml"):
        load_profile(str(tmp_path / "missing.toml"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("minuets = 5", "unknown key minuets; allowed: name, threads"),
        ("minutes = '5'", "minutes must be a float, got '5'"),
        ("minutes = true", "minutes must be a float, got True"),
        ("threads = 1.5", "threads must be a int, got 1.5"),
        ("threads = false", "threads must be a int, got False"),
        ("nice = [1]", "nice must be a int"),
        ("threads = -1", "threads must be at least 0, got -1 (profile mine)"),
        ("ram_bytes = 0", "ram_bytes must be at least 1, got 0"),
        ("minutes = 0", "minutes must be above 0, got 0"),
        ("minutes = nan", "minutes must be above 0, got nan"),
        ("n_ctx = 1", "n_ctx must be at least 64"),
        ("n_batch = 0", "n_batch must be at least 16"),
        ("n_gpu_layers = -2", "n_gpu_layers must be at least -1"),
        ("nice = -5", "nice must be at least 0"),
        ("window = '22:00'", """window must be hours such as "22:00-06:00", or "" for any time, got '22:00'"""),
        ("window = '22-6'", "window must be hours"),
        ("window = '22:00-24:00'", "window must be hours"),
        ("window = '01:00-02:00-03:00'", "window must be hours"),
        ("window = '06:00-06:00'", "window must be hours"),
        ("max_temperature_c = nan", "max_temperature_c must be above 0, got nan"),
        ("idle_minutes = -1", "idle_minutes must be at least 0, got -1"),
        ("needs_ac = 1", "needs_ac must be a bool, got 1"),
        ("minutes = ", "is not TOML"),
        ("minutes = 1\nminutes = 2", "is not TOML"),
    ],
)
def test_a_wrong_limit_is_named_with_its_file(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(SettingError) as caught:
        load_profile(str(path))
    assert reason in str(caught.value) and "mine" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_that_cannot_be_read_as_text_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# gr\xfcn\nnice = 1\n")
    with pytest.raises(SettingError, match="is not TOML"):
        load_profile(str(tmp_path / "latin.toml"))


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("22:00-06:00", ("22:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "21:59")),
        ("01:30-04:00", ("01:30", "03:59"), ("01:29", "04:00", "23:00")),
        ("", ("00:00", "12:00"), ()),
    ],
)
def test_a_window_opens_and_closes_also_over_midnight(window: str, inside: tuple[str, ...], outside: tuple[str, ...]) -> None:
    profile = Profile(window=window)
    for clock in (*inside, *outside):
        assert profile.is_open(time.fromisoformat(clock)) is (clock in inside), clock


def test_what_a_profile_leaves_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("minutes = 5\nname = 'other'", "utf-8")
    assert load_profile(str(tmp_path / "mine.toml")) == Profile(name="mine", minutes=5)


# --- edgecl.toml ------------------------------------------------------------------------------------------------------


def values_of(cls: type[Any], **named: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Settings with any value in range for every field."""
    by_type = {
        int: st.integers(1, 2**40),
        float: st.floats(0.0, 1.0, exclude_min=True),
        bool: st.booleans(),
        str: st.text(max_size=9),
    }
    fields = [f for f in dataclasses.fields(cls) if f.name not in named]
    return st.builds(cls, **{f.name: by_type[type(f.default)] for f in fields}, **named)


BELOW_ONE = st.floats(0.0, 1.0, exclude_max=True)
SETTINGS = values_of(
    Settings,
    base=st.text(st.characters(codec="utf-8"), max_size=30),
    train=values_of(
        TrainSettings,
        learning_rate=st.floats(0, 1e300),
        schedule=st.sampled_from(SCHEDULES),
        warmup=BELOW_ONE,
        settled=BELOW_ONE,
        ema_decay=BELOW_ONE,
    ),
    replay=values_of(ReplaySettings),
    privacy=values_of(PrivacySettings),
    gate=values_of(GateSettings, max_prose_nats=st.floats(allow_nan=False)),
)


@settings(deadline=None)
@given(made=SETTINGS)
def test_settings_are_read_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, made: Settings) -> None:
    path = tmp_path_factory.getbasetemp() / "edgecl.toml"
    path.write_bytes(made.to_toml().encode("utf-8"))
    assert Settings.read(path) == dataclasses.replace(made, base=str(path.parent / made.base))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "base"),
        ("base = 5", "base must be a str, got 5"),
        ("base = 'b'\nquannt = 'int8'", "unknown key quannt; allowed: base, profile, quant"),
        ("base = 'b'\nquant = 8", "quant must be a str, got 8"),
        ("base = 'b'\nkeep_models = -1", "keep_models must be at least 0, got -1"),
        ("base = 'b'\ntrain = 3", "[train]: must be a table, got 3"),
        ("base = 'b'\n[train]\nrank = 4", "[train]: unknown key rank"),
        ("base = 'b'\n[train]\nr = 0", "train.r must be at least 1, got 0"),
        ("base = 'b'\n[train]\nr = 4.0", "r must be a int, got 4.0"),
        ("base = 'b'\n[train]\nbatch_rows = 0", "train.batch_rows must be at least 1, got 0"),
        ("base = 'b'\n[train]\nlearning_rate = nan", "train.learning_rate must be at least 0, got nan"),
        ("base = 'b'\n[train]\nlora_alpha = 0", "train.lora_alpha must be above 0, got 0"),
        ("base = 'b'\n[train]\nseed = -1", "train.seed must be at least 0, got -1"),
        ("base = 'b'\n[train]\ndepth = 0", "train.depth must be above 0 and at most 1, got 0"),
        ("base = 'b'\n[train]\nfreeze_at = 2", "train.freeze_at must be from 0 to 1, got 2"),
        ("base = 'b'\n[train]\nfreeze_at = nan", "train.freeze_at must be from 0 to 1, got nan"),
        ("base = 'b'\n[train]\nema_decay = 1", "train.ema_decay must be below 1, got 1"),
        ("base = 'b'\n[train]\nschedule = 'zigzag'", "train.schedule must be one of constant, linear, cosine, oscillating"),
        ("base = 'b'\n[replay]\nshare = 1.1", "replay.share must be from 0 to 1, got 1.1"),
        ("base = 'b'\n[replay]\nheldout = nan", "replay.heldout must be from 0 to 1, got nan"),
        ("base = 'b'\n[replay]\narchive = 1", "archive must be a bool, got 1"),
        ("base = 'b'\n[gate]\nmax_prose_nats = nan", "gate.max_prose_nats must be a number, got nan"),
        ("base = 'b'\n[gate]\nmax_drop = nan", "gate.max_drop must be from 0 to 1, got nan"),
        ("base = 'b'\n[gate]\nmin_recall = 75", "gate.min_recall must be from 0 to 1, got 75"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "edgecl.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(SettingError) as caught:
        Settings.read(path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_no_file_can_hold_is_refused_at_once() -> None:
    with pytest.raises(SettingError, match="path in UTF-8"):
        Settings(base="models/gr\udcfcn.gguf")


def test_a_settings_file_that_is_gone_is_a_setting_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read: No such file"):
        Settings.read(tmp_path / "edgecl.toml")


def test_whole_numbers_may_stand_for_fractions_and_true_for_neither() -> None:
    assert from_table(TrainSettings, {"lora_alpha": 32}, "x").lora_alpha == 32
    with pytest.raises(SettingError, match="seed must be a int, got True"):
        from_table(TrainSettings, {"seed": True}, "x")
