"""The probe: its statistics against brute force, its perplexity against transformers, its verdict, and the command."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgecl.engine import VocabFile
from edgecl_convert import ConvertError, GgufFile, HfModel, UnsupportedError, merge, probe, write_gguf_adapter
from edgecl_convert.ggml import F32Array, QType, dequantize, quantize
from edgecl_convert.perplexity import WINDOW, nats_per_token
from edgecl_convert.probe import Gap, ProbeReport, _verdict, default_text, round_groups, write_rounded
from edgecl_convert.weight_facts import GRID_TYPES, count_on_grid, excess_kurtosis, power_sums, tensor_facts
from tests import tiny

TEXT = default_text()[:1500]
GRIDS = [QType.Q4_0, QType.Q4_1, QType.Q8_0]


def normal(*shape: int, seed: int = 0) -> F32Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- kurtosis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "expected"),
    [("normal", 0.0), ("laplace", 3.0), ("uniform", -1.2), ("logistic", 1.2)],
)
@pytest.mark.parametrize(("mean", "size"), [(0, 1), (0.3, 0.02), (-5, 0.1)])
def test_kurtosis_of_known_distributions(draw: str, expected: float, mean: float, size: float) -> None:
    x = getattr(np.random.default_rng(0), draw)(size=(1000, 1000)).astype(np.float32)
    assert excess_kurtosis(power_sums(x * np.float32(size) + np.float32(mean))) == pytest.approx(expected, abs=0.1)


def test_kurtosis_is_that_of_the_definition_and_adds_up_over_chunks() -> None:
    x = np.random.default_rng(1).gamma(2.0, size=(50, 64)).astype(np.float32)
    centred = x.astype(np.float64) - x.mean(dtype=np.float64)
    expected = (centred**4).mean() / (centred**2).mean() ** 2 - 3
    assert excess_kurtosis(power_sums(x)) == pytest.approx(expected, rel=1e-9)
    assert excess_kurtosis(power_sums(x[:7]) + power_sums(x[7:])) == pytest.approx(expected, rel=1e-9)


def test_kurtosis_of_a_constant_is_0() -> None:
    assert excess_kurtosis(power_sums(np.full((4, 32), 0.3, np.float32))) == 0
    assert excess_kurtosis(power_sums(np.zeros((4, 32), np.float32))) == 0


# --- on the grid already ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", GRID_TYPES, ids=lambda t: t.name)
def test_a_float_tensor_is_on_no_grid(qtype: QType) -> None:
    for weights in (normal(64, 512), np.abs(normal(64, 512)) + 1, normal(64, 512) ** 3):
        assert count_on_grid(weights, qtype) == 0


@pytest.mark.parametrize("store", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.Q8_0, QType.Q4_K, QType.Q6_K], ids=str)
def test_what_a_quantized_tensor_decodes_to_is_on_its_grid(qtype: QType, store: str) -> None:
    weights = dequantize(quantize(normal(64, 512), qtype), qtype, 512)
    weights = dequantize(quantize(weights, QType[store]), QType[store], 512)
    share = count_on_grid(weights, qtype) / weights.size
    if store == "BF16" and qtype not in (QType.Q4_0, QType.Q4_1):
        return  # 8 significant bits are too few to tell
    assert share > 0.97 if qtype.name.endswith("_K") else share == 1  # ggml searches for the scales of K-quants


def test_blocks_are_judged_one_by_one() -> None:
    weights = normal(8, 64)
    weights[3, 32:] = dequantize(quantize(weights[3:4, 32:], QType.Q4_0), QType.Q4_0, 32)
    assert count_on_grid(weights, QType.Q4_0) == 32


def test_facts_of_a_tensor_do_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = tiny.build(tmp_path / "a.gguf", qtype=QType.Q4_0)
    name = "blk.1.ffn_down.weight"
    with GgufFile(path) as source:
        whole = tensor_facts(source, name, [*GRIDS, QType.Q4_K])
        monkeypatch.setattr("edgecl_convert.ggml.CHUNK_WEIGHTS", 7 * 96)
        parts = tensor_facts(source, name, [*GRIDS, QType.Q4_K])
        assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-9) and parts.on_grid == whole.on_grid
        assert whole.on_grid["Q4_0"] == 1 and whole.on_grid["Q8_0"] < 0.5
        assert whole.on_grid["Q4_K"] == 0  # rows of 96 weights do not divide by 256
        assert whole.n_weights == source.tensors[name].n_weights


# --- the group probe --------------------------------------------------------------------------------------------------


def round_groups_plainly(weights: F32Array, bits: int, group_size: int) -> F32Array:
    out = weights.copy()
    for row in out:
        for first in range(0, len(row), group_size):
            group = row[first : first + group_size]
            scale = max(abs(float(x)) for x in group) / (2 ** (bits - 1) - 1)
            for i, x in enumerate(group):
                group[i] = round(float(x) / scale) * scale if scale else 0.0
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n_per_row", "group_size"), [(256, 128), (96, 32), (576, 128), (64, 100), (5, 1)])
def test_group_rounding_is_that_of_the_definition(bits: int, n_per_row: int, group_size: int) -> None:
    weights = normal(12, n_per_row)
    weights[3, :group_size] = 0
    rounded = round_groups(weights, bits, group_size)
    np.testing.assert_allclose(rounded, round_groups_plainly(weights, bits, group_size), rtol=1e-6, atol=1e-7)
    assert group_size == 1 or not np.array_equal(rounded, weights)
    np.testing.assert_allclose(round_groups(rounded, bits, group_size), rounded, rtol=1e-6)  # on its own grid


def test_the_rounded_file_holds_the_rounded_weights_and_all_else(tmp_path: Path) -> None:
    with GgufFile(tiny.build(tmp_path / "a.gguf")[0]) as source:
        write_rounded(source, tmp_path / "b.gguf", QType.F32, 4, 32)
        with GgufFile(tmp_path / "b.gguf") as rounded:
            assert rounded.keys == source.keys and list(rounded.tensors) == list(source.tensors)
            for name, info in source.tensors.items():
                weights = source.weights(name)
                expected = round_groups(weights, 4, 32) if len(info.shape) > 1 else weights
                np.testing.assert_array_equal(rounded.weights(name), expected)


# --- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [2048, 100])
def test_nats_are_those_of_transformers(tmp_path: Path, context: int) -> None:
    path, model = tiny.build(tmp_path / "a.gguf")
    if context != 2048:
        data = path.read_bytes()
        at = data.index(b"llama.context_length") + len(b"llama.context_length") + 4
        path.write_bytes(data[:at] + context.to_bytes(4, "little") + data[at + 4 :])
    with VocabFile(path) as vocab:
        tokens = vocab.encode(TEXT)
    window, expected = min(512, context), []
    for first in range(0, len(tokens), window):
        ids = torch.tensor([tokens[first : first + window]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double().log_softmax(-1)
        expected += (-logits.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    nats = nats_per_token(path, TEXT)
    np.testing.assert_allclose(nats, expected, atol=2e-3)
    assert len(nats) == len(tokens) - -(-len(tokens) // window) and nats.std() > 1


def test_a_model_that_llama_cpp_refuses_is_an_error_in_one_line(tmp_path: Path) -> None:
    path, _ = tiny.build(tmp_path / "a.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(ConvertError, match=r"llama\.cpp could not load this model: .*blk\.1\.attn_q"):
        nats_per_token(path, TEXT)


# --- the whole probe --------------------------------------------------------------------------------------------------


def probed(path: Path, **options: object) -> ProbeReport:
    with GgufFile(path) as source:
        return probe(source, TEXT, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {t.name: tiny.build(folder / f"{t.name}.gguf", qtype=t)[0] for t in (QType.F32, QType.Q4_1)}


@pytest.fixture(scope="module")
def of_float(models: dict[str, Path]) -> ProbeReport:
    return probed(models["F32"], group_size=32)


def test_a_float_model(of_float: ProbeReport, models: dict[str, Path]) -> None:
    gaps = of_float.gaps
    assert list(gaps) == ["int8", "int4", "int8_group", "int4_group"]
    assert [gap.how for gap in gaps.values()] == ["Q8_0", "Q4_1", "8-bit groups of 32", "4-bit groups of 32"]
    # random weights: rounding them may as well lower the perplexity, but by more the coarser it is
    assert 0 < abs(gaps["int8"].percent) < abs(gaps["int4"].percent) / 3
    assert 0 < abs(gaps["int8_group"].percent) < abs(gaps["int4_group"].percent) / 3
    assert gaps["int8"].margin < gaps["int4"].margin
    assert not of_float.quantized and of_float.qtypes == {"F32": of_float.n_weights}
    assert of_float.on_grid == {"Q4_0": 0, "Q4_1": 0, "Q8_0": 0} and of_float.erased == 0
    assert abs(of_float.kurtosis_median) < 0.1 and "would mostly be kept (0%" in of_float.verdict
    assert len(of_float.tensors) == 16 and of_float.n_tokens > 1000
    assert of_float.perplexity == pytest.approx(np.exp(nats_per_token(models["F32"], TEXT).mean()), rel=1e-6)
    json.dumps(asdict(of_float))


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_1, QType.Q8_0], ids=str)
def test_a_quantized_model_is_known_by_its_types_and_its_grid(qtype: QType, tmp_path: Path) -> None:
    report = probed(tiny.build(tmp_path / "a.gguf", qtype=qtype)[0])
    assert report.quantized and report.qtypes == {qtype.name: report.n_weights}
    assert report.on_grid[qtype.name] == 1
    assert all(share < 0.5 for name, share in report.on_grid.items() if name != qtype.name)
    own = report.gaps["int8" if qtype == QType.Q8_0 else "int4"]
    assert own.how == qtype.name and abs(own.percent) < 1  # what is left is llama.cpp's rounding of activations
    if qtype == QType.Q8_0:
        assert "quantized already (Q8_0)" in report.verdict and "mostly be kept" in report.verdict
    else:
        assert "INT4 already" in report.verdict and "would be erased (100%" in report.verdict


def test_floats_that_were_quantized_once_are_seen_through(tmp_path: Path) -> None:
    path, _ = tiny.build(tmp_path / "a.gguf", qtype=QType.Q4_1)
    with GgufFile(path) as source:
        merge(source, None, tmp_path / "f16.gguf", "F16")
    report = probed(tmp_path / "f16.gguf")
    assert not report.quantized and report.on_grid["Q4_1"] == 1 and report.erased == 1
    assert "would be erased" in report.verdict


def test_a_folder_is_probed_as_its_gguf_file_is(models: dict[str, Path], of_float: ProbeReport, tmp_path: Path) -> None:
    tiny.torch_model(tiny.Tiny()).save_pretrained(tmp_path / "hf")
    with GgufFile(models["F32"]) as made:
        vocabulary = {key: made.get(key) for key in made.keys if key.startswith("tokenizer.")}
    with HfModel(tmp_path / "hf", vocabulary) as source:
        report = probe(source, TEXT, group_size=32)
    assert report.model == str(tmp_path / "hf") and report.verdict == of_float.verdict
    for key, gap in report.gaps.items():
        assert gap.percent == pytest.approx(of_float.gaps[key].percent, abs=1e-3)


def test_k_quants_are_tried_where_int4_means_them(tmp_path: Path) -> None:
    report = probed(tiny.build(tmp_path / "a.gguf", width=256, n_layer=1)[0])
    assert report.gaps["int4"].how == "Q4_K_M" and {"Q4_K", "Q6_K"} <= set(report.on_grid)
    assert report.erased == 0


def test_nothing_is_left_behind_and_every_step_is_told(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps: list[tuple[int, int, str]] = []
    probed(models["F32"], progress=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps] == list(range(steps[0][1] + 1)) and len({total for _, total, _ in steps}) == 1
    with GgufFile(models["F32"]) as source, pytest.raises(ConvertError, match=r"F32\.gguf: the text has 1 tokens"):
        probe(source, "a")
    assert list(tmp_path.iterdir()) == []


def test_missing_room_is_said(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConvertError, match=r"temporary file of 0\.[1-9] MB, .* has 0\.0 MB left; set TMPDIR"):
        probed(models["F32"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float, models: dict[str, Path], tmp_path: Path) -> None:
    name = "blk.1.attn_v.weight"
    with GgufFile(models["F32"]) as sound:
        at = sound.tensors[name].offset
    data = bytearray(models["F32"].read_bytes())
    data[at : at + 4] = np.float32(value).tobytes()
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ConvertError, match=f"tensor {name} has NaN or infinite"):
        probed(tmp_path / "bad.gguf")


def test_a_group_size_below_1_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="group size must be at least 1, got 0"):
        probed(models["F32"], group_size=0)


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("int8", "int4", "expected"),
    [
        (0.1, 0.9, "This model takes INT4 (Q4_K_M) without loss; an update"),
        (0.1, 3.0, "takes INT4 (Q4_K_M) at a cost of 3.0% of perplexity; an update"),
        (0.1, 8.0, "takes INT8 (Q8_0) without loss, but not INT4 (Q4_K_M costs 8.0%); an update"),
        (2.0, 80.0, "takes INT8 (Q8_0) at a cost of 2.0% of perplexity, but not INT4 (Q4_K_M costs 80.0%)"),
        (6.5, 80.0, "needs full precision: even Q8_0 costs 6.5% of perplexity"),
        (0.1, 4.8, "cost of 4.8% of perplexity; that is too close to the limit of 5% to be sure on 1000 tokens"),
    ],
)
def test_verdicts(int8: float, int4: float, expected: str) -> None:
    gaps = {"int8": Gap("Q8_0", 10.0, int8, 0.5), "int4": Gap("Q4_K_M", 10.0, int4, 0.5)}
    verdict = _verdict(gaps, False, [], 0.1, 1000)
    assert expected in verdict and verdict.endswith("would mostly be kept (10% of the weights are on that grid).")
    assert "every gap is against a quantized model" in _verdict(gaps, False, ["Q8_0"], 0.1, 1000)
    assert "would be erased (90%" in _verdict(gaps, True, ["Q4_0"], 0.9, 1000)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*args: str | Path, temporary: Path, limit_bytes: int = 0) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", "from edgecl.cli import main; main()", "probe", *map(str, args)],
        capture_output=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)) if limit_bytes else None,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert not list(temporary.iterdir())
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_the_command_prints_a_table_of_80_columns_and_draws(models: dict[str, Path], tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    long_name = Path(shutil.copy(models["F32"], tmp_path / f"{'a-long-name-' * 6}.gguf"))
    picture = tmp_path / "gaps.png"
    code, out, error = run(models["Q4_1"], long_name, "--text", tmp_path / "text.txt", "--plot", picture, temporary=temporary)
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "".join(lines[:5]).count("…") == 1 and lines[4].startswith("a-long-name-a-lon… ")
    assert sum(line.startswith("This model is INT4 already") for line in lines) == 1
    assert lines[-1] == f"written: {picture}" and picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json(models: dict[str, Path], temporary: Path) -> None:
    code, out, _ = run(models["F32"], "--json", "--group-size", "64", temporary=temporary)
    (report,) = json.loads(out)["models"]
    assert code == 0 and report["group_size"] == 64 and report["n_tokens"] > 2000  # the text that is shipped
    assert report["gaps"]["int4_group"]["how"] == "4-bit groups of 64"
    assert report["tensors"][0]["name"] == "token_embd.weight"


def one_line(error: str, *words: str) -> bool:
    return len(error.strip().splitlines()) == 1 and all(word in error for word in words)


def test_what_is_not_a_model_is_said_in_one_line_before_anything_is_measured(
    models: dict[str, Path], tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no model " * 100)
    with GgufFile(models["F32"]) as source:
        write_gguf_adapter(tmp_path / "lora.gguf", tiny.random_adapter(source))
    for path, words in (
        (tmp_path / "notes.txt", ["notes.txt", "not a GGUF"]),
        (tmp_path / "missing.gguf", ["missing.gguf", "cannot be read"]),
        (tmp_path / "lora.gguf", ["lora.gguf", "not a language model"]),
    ):
        code, out, error = run(models["F32"], path, temporary=temporary)
        assert (code, out) == (1, "") and one_line(error, *words), error


def test_bad_options_are_said_in_one_line(models: dict[str, Path], tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Müller".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    for options, words in (
        (["--text", tmp_path / "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--text", tmp_path / "latin1.txt"], ["latin1.txt", "not UTF-8"]),
        (["--text", tmp_path / "empty.txt"], ["empty.txt", "has no text"]),
        (["--plot", tmp_path / "gaps.docx"], ["gaps.docx", ".png"]),
    ):
        code, _, error = run(models["F32"], *options, temporary=temporary)
        assert code == 1 and one_line(error, *words), error
    assert run(models["F32"], "--group-size", "0", temporary=temporary)[0] == 2
    assert run(temporary=temporary)[0] == 2


def test_a_full_disk_is_said_in_one_line(models: dict[str, Path], temporary: Path) -> None:
    code, _, error = run(models["F32"], temporary=temporary, limit_bytes=50_000)
    assert code == 1 and one_line(error, "cannot be written"), error


def test_the_shipped_text_is_neither_anchor_nor_prose() -> None:
    import edgecl

    words = default_text().split()
    assert 700 < len(words) < 1000 and "def " in default_text()
    pieces = {" ".join(words[i : i + 8]) for i in range(len(words) - 8)}
    for name in ("prose.txt", "anchor.txt"):
        other = " ".join((Path(edgecl.__file__).parent / name).read_text("utf-8").split())
        assert not any(piece in other for piece in pieces)


def test_of_a_long_text_some_windows_are_read(models: dict[str, Path]) -> None:
    assert len(nats_per_token(models["F32"], "a b " * 40 * WINDOW, 1)) <= 32 * WINDOW
