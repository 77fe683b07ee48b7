"""Base + adapter -> GGUF: the arithmetic, what stays byte for byte, what rounding keeps, and llama.cpp's own files."""

import hashlib
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf_helpers import child_with_small_files, in_blocks, lora, write_model

from edgecl_convert import Adapter, AdapterError, ConvertError, GgufFile, UnsupportedError, ggml, merge, update_survival
from edgecl_convert.ggml import QType, block_size
from edgecl_convert.gguf_file import PlannedTensor, copied_fields, write_gguf
from edgecl_convert.grid import GRID_TYPES, WITH_MINIMUMS

FLOATS = [QType.F32, QType.F16, QType.BF16]
GRID = [*GRID_TYPES]
TOUCHED = ["blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"]


def ids(qtype: QType) -> str:
    return qtype.name


def width_for(qtype: QType) -> int:
    return max(64, block_size(qtype))


def merged(base: GgufFile, adapter: Adapter | None, tmp_path: Path, **options: object) -> GgufFile:
    merge(base, adapter, tmp_path / "out.gguf", **options)  # type: ignore[arg-type]
    return GgufFile(tmp_path / "out.gguf")


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_a_float_merge_adds_scaling_times_b_a(tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf")) as base:
        adapter = lora(base, TOUCHED, r=4, scale=0.3, alpha=10.0)
        with merged(base, adapter, tmp_path) as out:
            for name in base.tensors:
                before, after = base.weights(name), out.weights(name)
                if name not in TOUCHED:
                    np.testing.assert_array_equal(after, before)
                    continue
                a, b = adapter.pairs[name]
                np.testing.assert_array_equal(after, before + (b * np.float32(2.5)) @ a)
                exact = before.astype(np.float64) + 2.5 * b.astype(np.float64) @ a.astype(np.float64)
                np.testing.assert_allclose(after, exact, rtol=0, atol=1e-6)
                assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("qtype", [QType.F16, QType.BF16, QType.Q8_0, QType.Q4_K], ids=ids)
def test_a_merge_into_another_type_is_the_float_merge_encoded(qtype: QType, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf", QType.F16, width=256, n_layer=1)) as base:
        name = "blk.0.attn_q.weight"
        adapter = lora(base, [name])
        a, b = adapter.pairs[name]
        expected = ggml.quantize(base.weights(name) + (b * np.float32(2)) @ a, qtype)
        with merged(base, adapter, tmp_path, quant=qtype.name.lower()) as out:
            assert out.tensors[name].qtype == qtype
            np.testing.assert_array_equal(out.blocks(name), expected)
            assert out.tensors["blk.0.attn_norm.weight"].qtype == QType.F32


def test_the_report_counts_what_was_done(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    with GgufFile(write_model(tmp_path / "base.gguf", QType.Q4_0)) as base:
        report = merge(base, lora(base, TOUCHED), tmp_path / "out.gguf", progress=lambda *done: seen.append(done))
        n = len(base.tensors)
        assert report.rounded == {"stochastic": 3} and report.copied == n - 3
        assert report.qtypes == {"Q4_0": n - 5, "F32": 5} and report.merge_s > 0
        assert report.model_bytes == (tmp_path / "out.gguf").stat().st_size
        assert seen == [*((i, n, name) for i, name in enumerate(base.tensors)), (n, n, "")]
        assert merge(base, lora(base, TOUCHED), tmp_path / "out.gguf", rounding="nearest").rounded == {"nearest": 3}
        assert merge(base, lora(base, TOUCHED), tmp_path / "out.gguf", "f16").rounded == {"float": 3}


# --- what stays byte for byte -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", [*FLOATS, *GRID, QType.Q3_K, QType.IQ4_NL], ids=ids)
def test_keep_changes_the_touched_tensors_alone(qtype: QType, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf", qtype, width=width_for(qtype))
    base_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    with GgufFile(path) as base, merged(base, lora(base, TOUCHED, scale=0.2), tmp_path) as out:
        assert out.tensors == base.tensors
        header = min(info.offset for info in base.tensors.values())
        assert (tmp_path / "out.gguf").read_bytes()[:header] == path.read_bytes()[:header]
        changed = [name for name in base.tensors if not np.array_equal(base.blocks(name), out.blocks(name))]
        assert sorted(changed) == TOUCHED
    assert hashlib.sha256(path.read_bytes()).hexdigest() == base_hash


@pytest.mark.parametrize(
    ("qtype", "rounding"),
    # ggml searches for the scales of a K-quant, and does not always find the same ones again
    [*((t, "stochastic") for t in (*FLOATS, *GRID)), *((t, "nearest") for t in (*FLOATS, *GRID) if "_K" not in t.name)],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_zero_adapter_gives_the_base_byte_for_byte(qtype: QType, rounding: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf", qtype, width=width_for(qtype))
    with GgufFile(path) as base:
        adapter = lora(base, TOUCHED)
        adapter.pairs = {name: (a, np.zeros_like(b)) for name, (a, b) in adapter.pairs.items()}
        merge(base, adapter, tmp_path / "zero.gguf", rounding=rounding)
        merge(base, None, tmp_path / "none.gguf", rounding=rounding)
    assert (tmp_path / "zero.gguf").read_bytes() == path.read_bytes() == (tmp_path / "none.gguf").read_bytes()


@pytest.mark.parametrize("options", [{}, {"rounding": "nearest"}, {"quant": "q8_0"}, {"quant": "q4_k_m"}], ids=str)
def test_threads_do_not_show(options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "CHUNK_WEIGHTS", 5 * 256)  # many chunks, the last one short
    with GgufFile(write_model(tmp_path / "base.gguf", QType.Q4_0, width=256)) as base:
        adapter = lora(base, TOUCHED)
        for n_threads in (1, 2):
            merge(base, adapter, tmp_path / f"{n_threads}.gguf", n_threads=n_threads, **options)  # type: ignore[arg-type]
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf", QType.Q4_0)) as base:
        adapter = lora(base, TOUCHED)
        for name, pair in adapter.pairs.items():  # short fractions: their products are exact in whatever order they are summed
            adapter.pairs[name] = (np.round(pair[0] * 4096) / np.float32(4096), np.round(pair[1] * 4096) / np.float32(4096))
        for chunk in (7 * 64, 1 << 18):
            monkeypatch.setattr(ggml, "CHUNK_WEIGHTS", chunk)
            merge(base, adapter, tmp_path / f"{chunk}.gguf")
    assert (tmp_path / "448.gguf").read_bytes() == (tmp_path / "262144.gguf").read_bytes()


# --- what rounding keeps ----------------------------------------------------------------------------------------------


NEAREST = {  # follows only what sets a block's scales: 1 weight of 32, or 2 where a block has a minimum
    QType.Q4_0: 1 / 32, QType.Q4_1: 2 / 32, QType.Q5_0: 1 / 32, QType.Q5_1: 2 / 32,
    QType.Q4_K: 0, QType.Q5_K: 0, QType.Q6_K: 0,  # a super-block's scales are rounded themselves
}  # fmt: skip


@pytest.mark.parametrize("qtype", NEAREST, ids=ids)
def test_a_small_update_survives_on_the_grid_where_nearest_erases_it(qtype: QType, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf", qtype, width=256, n_layer=1)) as base:
        names = [name for name, info in base.tensors.items() if info.shape == (512, 256)]
        adapter = lora(base, names, r=8, scale=0.008)  # a few percent of a step
        survival = {}
        for rounding in ("stochastic", "nearest"):
            with merged(base, adapter, tmp_path, rounding=rounding) as out:
                survival[rounding] = update_survival(base, adapter, out)
        with merged(base, adapter, tmp_path, quant="F32") as out:
            assert update_survival(base, adapter, out) == pytest.approx(1, abs=1e-3)
        assert update_survival(base, adapter, base) == 0
    assert survival["stochastic"] == pytest.approx(1, abs=0.15)
    assert survival["nearest"] == pytest.approx(NEAREST[qtype], abs=0.025)


@pytest.mark.parametrize("qtype", WITH_MINIMUMS, ids=ids)
def test_an_update_that_is_the_same_over_blocks_survives_whole_in_minimums(qtype: QType, tmp_path: Path) -> None:
    """What is left out is what float16 rounds: a hundredth, at most, of the noise of the same update in codes."""
    with GgufFile(write_model(tmp_path / "base.gguf", qtype, width=256)) as base:
        adapter = in_blocks(lora(base, TOUCHED, r=8, scale=0.03))
        report = merge(base, adapter, tmp_path / "out.gguf", "keep_minimums")
        target = WITH_MINIMUMS[qtype]
        assert report.rounded == {"minimums": 3} and target.name in report.qtypes
        noise = {}
        with GgufFile(tmp_path / "out.gguf") as out:
            assert update_survival(base, adapter, out) == pytest.approx(1, abs=2e-3)
            for name in TOUCHED:
                a, b = adapter.pairs[name]
                missed = out.weights(name) - base.weights(name) - (b * np.float32(adapter.scaling(name))) @ a
                noise[name] = (missed**2).mean()
            rounded = 4e-3 if "_K" in qtype.name else 0  # steps and minimums that are products
            for name in base.tensors.keys() - set(TOUCHED):
                np.testing.assert_allclose(out.weights(name), base.weights(name), rtol=0, atol=rounded)
        whole = lora(base, TOUCHED, r=8, scale=0.03)
        report = merge(base, whole, tmp_path / "out.gguf", "keep_minimums")
        assert report.rounded == {"stochastic": 3}
        with GgufFile(tmp_path / "out.gguf") as out:
            assert {out.tensors[name].qtype for name in TOUCHED} == {target}
            assert update_survival(base, whole, out) == pytest.approx(1, abs=0.15)
            for name in TOUCHED:
                a, b = whole.pairs[name]
                missed = out.weights(name) - base.weights(name) - (b * np.float32(whole.scaling(name))) @ a
                assert noise[name] < 0.01 * (missed**2).mean()


def test_a_zero_adapter_gives_a_mixture_back_byte_for_byte(tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "float.gguf", QType.F16, width=256, n_layer=3)) as source:
        merge(source, None, tmp_path / "base.gguf", "Q4_K_M")
    with GgufFile(tmp_path / "base.gguf") as base:
        touched = ["blk.0.attn_q.weight", "blk.2.attn_v.weight"]
        assert [base.tensors[name].qtype for name in touched] == [QType.Q4_K, QType.Q6_K]
        report = merge(base, lora(base, touched, scale=0), tmp_path / "out.gguf")
        assert report.rounded == {"stochastic": 2}
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()


def test_survival_of_an_adapter_that_changes_nothing_is_1(tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf")) as base:
        assert update_survival(base, Adapter("llama", 8.0), base) == 1
        assert update_survival(base, lora(base, TOUCHED, scale=0), base) == 1


# --- llama.cpp's own files --------------------------------------------------------------------------------------------


def quantized_by_llama_cpp(source: Path, quant: str, pure: bool) -> Path:
    out = source.with_name("theirs.gguf")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}")
    options.nthread, options.pure = 1, pure
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0
    return out


@pytest.mark.parametrize(
    ("quant", "their_name", "width", "n_layer", "tied"),
    [
        ("Q4_K_M", "Q4_K_M", 256, 9, True),
        ("Q4_K_M", "Q4_K_M", 256, 1, False),
        ("Q4_K_M", "Q4_K_M", 96, 17, False),  # rows that K-quants do not divide
        ("Q8_0", "Q8_0", 64, 2, False),
        # a single type for every matrix is what llama.cpp calls pure
        ("Q4_0", "Q4_0", 64, 2, True),
        ("Q4_1", "Q4_1", 64, 2, False),
        ("BF16", "BF16", 64, 1, True),
        ("Q6_K", "Q6_K", 256, 1, True),
        ("Q6_K", "Q6_K", 96, 1, True),
        ("Q5_K", "Q5_K_S", 96, 1, True),
        ("Q4_K", "Q4_K_S", 96, 1, True),
        ("Q3_K", "Q3_K_S", 96, 1, True),
        ("Q2_K", "Q2_K", 96, 1, True),
        ("Q4_0", "Q4_0", 72, 1, True),  # rows that nothing divides
    ],
)
def test_types_and_bytes_are_those_of_llama_cpp(
    quant: str, their_name: str, width: int, n_layer: int, tied: bool, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "base.gguf", QType.F16, width=width, n_layer=n_layer, tied=tied)
    theirs_path = quantized_by_llama_cpp(path, their_name, pure=quant != "Q4_K_M")
    with GgufFile(path) as base, GgufFile(theirs_path) as theirs, merged(base, None, tmp_path, quant=quant) as ours:
        types = {name: info.qtype.name for name, info in ours.tensors.items()}
        assert types == {name: theirs.tensors[name].qtype.name for name in types}
        for name in types:
            np.testing.assert_array_equal(ours.blocks(name), theirs.blocks(name), err_msg=name)
        assert theirs.tensors.keys() == ours.tensors.keys()
        assert ours.get("general.file_type") == theirs.get("general.file_type")


def test_what_llama_cpp_never_quantizes_is_what_stays(tmp_path: Path) -> None:
    times = ("first", "w0", "v1", "a2", "g1", "decay_w2", "lerp_fused", "key", "output")
    in_layer = ("ffn_gate_inp", "ffn_gate_tid2eid", "ssm_conv1d", "ssm_in", "shortconv.conv", "shortconv.in_proj")
    in_layer += ("attn_rel_b", "indexer.k_proj", "altup_proj", "laurel_l", *(f"time_mix_{part}" for part in times))
    outside = ("position_embd", "token_types", "per_layer_model_proj", "per_layer_token_embd", "v.patch_embd")
    extra = [*(f"blk.0.{name}.weight" for name in in_layer), *(f"{name}.weight" for name in outside)]
    with GgufFile(write_model(tmp_path / "plain.gguf", QType.F16, n_layer=1)) as plain:
        plan = [PlannedTensor(info.name, info.shape, info.qtype) for info in plain.tensors.values()]
        plan += [PlannedTensor(name, (2, 64), QType.F16) for name in extra]
        blocks = [*(plain.blocks(name) for name in plain.tensors), *(np.zeros((2, 128), np.uint8) for _ in extra)]
        path = tmp_path / "base.gguf"
        write_gguf(path, copied_fields(plain), plan, iter(blocks))
    theirs_path = quantized_by_llama_cpp(path, "Q8_0", pure=True)
    with GgufFile(path) as base, GgufFile(theirs_path) as theirs, merged(base, None, tmp_path, quant="Q8_0") as ours:
        types = {name: theirs.tensors[name].qtype.name for name in extra}
        assert types == {name: ours.tensors[name].qtype.name for name in extra}
        assert {name for name, qtype in types.items() if qtype == "Q8_0"} == {
            "blk.0.ssm_in.weight",
            "blk.0.shortconv.in_proj.weight",
            "blk.0.time_mix_key.weight",
            "blk.0.time_mix_output.weight",
            "per_layer_token_embd.weight",
        }


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf")


def test_the_base_is_never_overwritten(base_path: Path) -> None:
    link = base_path.with_name("link.gguf")
    link.symlink_to(base_path)
    before = base_path.read_bytes()
    with GgufFile(base_path) as base:
        for out in (base_path, base_path.parent / "x" / ".." / "base.gguf", link):
            with pytest.raises(ConvertError, match="is the base itself"):
                merge(base, None, out)
    assert base_path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quant": "int3"}, "quant must be one of int8, int4, keep, keep_minimums, F32, .*Q4_K_M; got int3"),
        ({"quant": "IQ1_S"}, "quant must be one of"),
        ({"rounding": "up"}, "rounding must be one of stochastic, nearest; got up"),
    ],
)
def test_an_unknown_option_is_refused(options: dict[str, str], expected: str, base_path: Path) -> None:
    with GgufFile(base_path) as base, pytest.raises(UnsupportedError, match=expected):
        merge(base, None, base_path.with_name("out.gguf"), **options)  # type: ignore[arg-type]
    assert [path.name for path in base_path.parent.iterdir()] == ["base.gguf"]


def test_an_adapter_that_does_not_fit_is_refused_before_a_byte_is_written(base_path: Path) -> None:
    with GgufFile(base_path) as base:
        adapter = lora(base, TOUCHED)
        adapter.pairs["blk.7.attn_q.weight"] = adapter.pairs[TOUCHED[0]]
        with pytest.raises(AdapterError, match=r"changes blk\.7\.attn_q\.weight"):
            merge(base, adapter, base_path.with_name("out.gguf"))
    assert [path.name for path in base_path.parent.iterdir()] == ["base.gguf"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("qtype", "quant"), [(QType.F16, "q4_0"), (QType.F16, "keep"), *((t, "keep") for t in GRID)])
def test_weights_that_are_not_finite_are_refused_by_name(qtype: QType, quant: str, value: float, tmp_path: Path) -> None:
    path, name = write_model(tmp_path / "base.gguf", qtype, width=width_for(qtype)), TOUCHED[1]
    with GgufFile(path) as sound:
        at = sound.tensors[name].offset  # the first weight, or the scale of the first block
        at += 208 if qtype == QType.Q6_K else 0  # whose scale comes last
    content = bytearray(path.read_bytes())
    content[at : at + 2] = np.float16(value).tobytes()
    path.write_bytes(content)
    with GgufFile(path) as base, pytest.raises(ConvertError, match=f"tensor {name} has NaN or infinite"):
        merge(base, lora(base, TOUCHED), tmp_path / "out.gguf", quant)
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]


def test_a_full_disk_leaves_nothing(base_path: Path) -> None:
    code = """
from edgecl_convert import ConvertError, GgufFile, merge
try:
    merge(GgufFile(sys.argv[1]), None, sys.argv[2], "q8_0")
except ConvertError as error:
    print(error)
"""
    out = base_path.with_name("out.gguf")
    done = child_with_small_files(code, 20_000, base_path, out)
    assert done.stdout == f"{out}: cannot be written: File too large\n", done.stderr
    assert [path.name for path in base_path.parent.iterdir()] == ["base.gguf"]
