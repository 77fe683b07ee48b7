"""Stages in real child processes: results, progress, and every way in which a child can end badly."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf_helpers import lora, write_model

from edgecl.child import ROOM, Limits, room, run_stage
from edgecl.errors import EdgeclError, StageError
from edgecl_convert import GgufFile, write_gguf_adapter
from edgecl_convert.ggml import QType
from edgecl_convert.process import run_python

pytestmark = pytest.mark.alone

PLENTY = Limits(ram_bytes=4_000_000_000, seconds=120)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("child") / "base.gguf", QType.F16)


@pytest.fixture(scope="module")
def slow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes seconds to become Q4_K, so that its stage can be stopped in the middle."""
    return write_model(tmp_path_factory.mktemp("child") / "slow.gguf", QType.F16, width=1024, n_layer=2)


def request(base: Path, out: Path, **changed: Any) -> dict[str, Any]:
    return {"base": str(base), "adapter": "", "out": str(out), "quant": "Q8_0"} | changed


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "edgecl.stages" in child.cmdline()]


def test_a_stage_returns_its_result_and_its_peak_memory_and_reports_progress(base: Path, tmp_path: Path) -> None:
    with GgufFile(base) as gguf:
        adapter = lora(gguf, ["blk.0.attn_q.weight"])
        write_gguf_adapter(tmp_path / "adapter.gguf", adapter)
    seen: list[tuple[str, int, int, str]] = []
    out = tmp_path / "mörged.gguf"
    sent = request(base, out, adapter=str(tmp_path / "adapter.gguf"))
    result, peak = run_stage("merge", sent, PLENTY, lambda *event: seen.append(event))
    with GgufFile(out) as merged:
        assert {merged.tensors[name].qtype.name for name in adapter.pairs} == {"Q8_0"}
        assert result["model_bytes"] == out.stat().st_size
        n_tensors = len(merged.tensors)
    assert seen and seen[-1] == ("merge", n_tensors, n_tensors, "")
    assert [done for _, done, _, _ in seen] == sorted({done for _, done, _, _ in seen})
    assert 10_000_000 < peak < 4_000_000_000
    assert not children()


def test_a_file_of_the_users_folder_is_no_module(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "numpy", "gguf"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/nowhere")  # its empty first path is the folder, too
    assert run_stage("merge", request(base, tmp_path / "out.gguf"), PLENTY)[0]["model_bytes"]
    assert run_python("import random, numpy, sys; print(sys.argv[1])", "read").stdout == b"read\n"


def test_a_watch_that_fails_ends_its_stage(slow_base: Path, tmp_path: Path) -> None:
    asked = iter([""])

    def stop() -> str:
        return next(asked)  # StopIteration from the second time on

    with pytest.raises(StageError, match=r"^merge: its watch failed: StopIteration: $"):
        run_stage("merge", request(slow_base, tmp_path / "out.gguf", quant="Q4_K"), replace(PLENTY, stop=stop))
    assert not children()


def test_what_a_stage_refuses_comes_back_as_one_line(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(base.read_bytes()[:1000])
    for sent, reason in (
        (request(broken, tmp_path / "out.gguf"), r"broken\.gguf: has a string of 19 bytes at offset 985, past its end"),
        (request(tmp_path / "none.gguf", tmp_path / "out.gguf"), r"none\.gguf: cannot be read: No such file"),
        (request(base, tmp_path / "out.gguf", quant="int3"), "quant must be one of .*; got int3"),
    ):
        with pytest.raises(EdgeclError, match=reason) as caught:
            run_stage("merge", sent, PLENTY)
        assert "\n" not in str(caught.value) and not isinstance(caught.value, StageError)
        assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.parametrize("size", [0, 3_000_000])
def test_a_stage_that_does_not_exist_ends_with_its_log(size: int) -> None:
    """The child is gone before it has read a long request: a broken pipe is not what the user is told."""
    with pytest.raises(StageError, match=r"^dream: the process ended with exit code 1 \(KeyError: 'dream'\)") as caught:
        run_stage("dream", {"padding": "x" * size}, PLENTY)
    assert caught.value.stage == "dream"
    assert "Traceback" in caught.value.log and "\n" not in str(caught.value)


def test_an_unforeseen_error_is_a_stage_error_with_its_log() -> None:
    with pytest.raises(StageError, match=r"merge: the process ended with exit code 1 \(KeyError: 'base'\)") as caught:
        run_stage("merge", {}, PLENTY)
    assert 'request["base"]' in caught.value.log


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(ram_bytes=5_000_000, seconds=120), r"merge: took more than 0\.0 GB of memory; raise ram_bytes"),
        (Limits(ram_bytes=4_000_000_000, seconds=0.01), r"merge: took longer than 0\.0 minutes; raise minutes"),
    ],
)
def test_a_child_past_its_limits_is_ended(base: Path, tmp_path: Path, limits: Limits, reason: str) -> None:
    with pytest.raises(StageError, match=reason):
        run_stage("merge", request(base, tmp_path / "out.gguf"), limits)
    assert not children() and not (tmp_path / "out.gguf").exists()


def test_after_a_child_took_too_much_memory_its_run_is_planned_with_less(base: Path, tmp_path: Path) -> None:
    runs, sent = tmp_path / "runs", request(base, tmp_path / "out.gguf", runs=str(tmp_path / "runs"))
    runs.mkdir()
    with pytest.raises(StageError, match="took longer than"):
        run_stage("merge", sent, replace(PLENTY, seconds=0.01))
    assert room(runs, 5_000_000) == 1.0
    for share in (0.85, 0.85**2):
        with pytest.raises(StageError, match=r"raise ram_bytes \(.*\); the next try is planned with less$"):
            run_stage("merge", sent, replace(PLENTY, ram_bytes=5_000_000))
        assert room(runs, 5_000_000) == pytest.approx(share)
    assert room(runs, 6_000_000) == 1.0, "another limit begins anew"
    for damaged in ("", "{", "7", "[5000000, 0]", "[5000000, 3]", '[5000000, "x"]'):
        (runs / ROOM).write_text(damaged)
        assert room(runs, 5_000_000) == 1.0


def test_a_child_that_is_killed_is_a_stage_error(slow_base: Path, tmp_path: Path) -> None:
    def kill(*_: object) -> None:
        for child in children():
            child.kill()
        time.sleep(0.1)

    with pytest.raises(StageError, match=r"merge: the process was killed by signal 9 \(.*\)"):
        run_stage("merge", request(slow_base, tmp_path / "out.gguf", quant="Q4_K"), PLENTY, kill)
    assert not (tmp_path / "out.gguf").exists()


def test_a_child_does_not_outlive_its_caller(slow_base: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("merge", request(slow_base, tmp_path / "out.gguf", quant="Q4_K"), PLENTY, interrupt)
    assert not children()


def test_a_child_is_as_nice_as_its_limits_ask_and_gets_its_threads(slow_base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    def look(*_: object) -> None:
        for child in children():
            seen.append((child.nice(), child.environ().get("OMP_NUM_THREADS", "")))
            child.kill()

    with pytest.raises(StageError, match="signal 9"):
        run_stage("merge", request(slow_base, tmp_path / "out.gguf", quant="Q4_K"),
                  Limits(4_000_000_000, 120, nice=7, threads=1), look)  # fmt: skip
    assert seen[0] == (psutil.Process().nice() + 7, "1")
