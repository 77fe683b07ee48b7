"""The kernels: the same bytes as gguf-py in both directions, whatever the threads and with or without the library."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgecl_convert import UnsupportedError, ggml
from edgecl_convert.ggml import Bytes, F32Array, QType, block_size, dequantize, dequantize_into, quantize, row_bytes

SHARED_TYPES = [QType.Q8_0, QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.F16, QType.BF16]  # gguf-py writes them too
# mean squared error over the variance of normal weights; each bit less is about four times more
K_ERROR = {QType.Q6_K: 5e-4, QType.Q5_K: 2e-3, QType.Q4_K: 8e-3, QType.Q3_K: 3e-2, QType.Q2_K: 0.12}

names = pytest.mark.parametrize("qtype", SHARED_TYPES, ids=lambda t: t.name)
grid_types = pytest.mark.parametrize("qtype", [QType.Q8_0, QType.Q4_0, QType.Q4_1], ids=lambda t: t.name)


def normal(rows: int, n_per_row: int, seed: int = 0) -> F32Array:
    return np.random.default_rng(seed).standard_normal((rows, n_per_row), np.float32)


def awkward() -> F32Array:
    """Rows of blocks that rounding gets wrong first: zeros, one weight, ties, both extremes, tiny and large scales."""
    w = normal(12, 64)
    w[0] = 0
    w[1], w[1, 5] = 0, -3
    w[2] = np.tile([1, -1], 32)
    w[3] = np.arange(64) / 2
    w[4] = np.arange(-32, 32) + 0.5
    w[5] = 7
    w[6] *= 1e-4
    w[7] *= 1e4
    w[8, ::2] = 0
    return w


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ggml, "_LIB", None)
    ggml._to_float.cache_clear()
    yield
    ggml._to_float.cache_clear()


def test_the_library_is_in_use_for_every_type_with_a_kernel() -> None:
    assert ggml.BACKEND == "ggml"
    for qtype in [*SHARED_TYPES, *K_ERROR]:
        assert ggml._to_float(qtype) is not None, qtype.name


@names
@pytest.mark.parametrize("weights", [awkward(), normal(40, 96, seed=1)], ids=["awkward", "normal"])
def test_same_bytes_and_same_weights_as_gguf_py(qtype: QType, weights: F32Array) -> None:
    blocks = quantize(weights, qtype)
    assert blocks.dtype == np.uint8 and blocks.shape == (len(weights), row_bytes(qtype, weights.shape[1]))
    np.testing.assert_array_equal(blocks, quants.quantize(weights, qtype).view(np.uint8).reshape(blocks.shape))
    decoded = dequantize(blocks, qtype, weights.shape[1])
    np.testing.assert_array_equal(decoded, quants.dequantize(blocks, qtype).reshape(weights.shape))
    assert decoded.dtype == np.float32


@names
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_weights_are_decoded_in_place_as_float32_or_rounded_to_bfloat16_bits(
    qtype: QType, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.concatenate([awkward(), normal(40, 64)])
    blocks = quantize(weights, qtype)
    wanted = dequantize(blocks, qtype, 64)
    if dtype is np.uint16:
        wanted = torch.from_numpy(wanted).bfloat16().view(torch.uint16).numpy()
    for at_once, n_threads in ((64, 2), (7 * 64, 1), (16, 5), (1 << 20, 3)):
        monkeypatch.setattr(ggml, "DECODED_AT_ONCE", at_once)
        out = [np.empty(weights.shape, dtype), np.empty((3, 64), dtype)]
        dequantize_into([(blocks, qtype, out[0]), (blocks[20:23], qtype, out[1])], n_threads)
        np.testing.assert_array_equal(out[0], wanted)
        np.testing.assert_array_equal(out[1], wanted[20:23])
    monkeypatch.setattr(ggml, "_LIB", None)
    dequantize_into([(blocks, qtype, out[0])])
    np.testing.assert_array_equal(out[0], wanted)


def test_bfloat16_is_rounded_alike_as_compiled_for_this_cpu_and_for_every_one() -> None:
    bounds = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7F800001], np.uint32)
    weights = np.concatenate([normal(40, 63).ravel(), bounds.view(np.float32)])  # ties, tiny ones, infinity; last, no number
    kernels = [ggml._to_bf16(), ggml._row(ggml._LIB, "ggml_fp32_to_bf16_row")]
    bits = [np.zeros(len(weights), np.uint16) for _ in kernels]
    for kernel, out in zip(kernels, bits, strict=True):
        kernel(weights.ctypes.data, out.ctypes.data, len(weights))
    assert kernels[0].__name__ != kernels[1].__name__
    np.testing.assert_array_equal(*bits)
    np.testing.assert_array_equal(bits[0][:-1], torch.from_numpy(weights).bfloat16().view(torch.uint16).numpy()[:-1])


@pytest.mark.parametrize("qtype", K_ERROR, ids=lambda t: t.name)
def test_k_quants_round_trip_within_their_error_and_decode_as_gguf_py_does(qtype: QType) -> None:
    weights = normal(16, 512)
    blocks = quantize(weights, qtype)
    decoded = dequantize(blocks, qtype, 512)
    error = float(np.mean((decoded - weights) ** 2))
    assert K_ERROR[qtype] / 8 < error < K_ERROR[qtype]
    np.testing.assert_allclose(decoded, quants.dequantize(blocks, qtype), rtol=0, atol=1e-6)


def test_an_importance_matrix_moves_the_error_to_the_columns_that_matter_less() -> None:
    weights = normal(16, 256)
    importance = np.where(np.arange(256) % 2, 100, 0.01).astype(np.float32)
    plain = dequantize(quantize(weights, QType.Q4_K), QType.Q4_K, 256) - weights
    weighted = dequantize(quantize(weights, QType.Q4_K, importance), QType.Q4_K, 256) - weights
    assert np.mean(weighted[:, 1::2] ** 2) < 0.9 * np.mean(plain[:, 1::2] ** 2)
    assert np.mean(weighted[:, ::2] ** 2) > np.mean(plain[:, ::2] ** 2)


@pytest.mark.parametrize("qtype", [QType.Q2_K, QType.Q3_K, QType.Q4_0, QType.Q4_K, QType.Q5_1], ids=lambda t: t.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_unshrunk_rows_keep_their_length_along_themselves(qtype: QType, weighted: bool) -> None:
    weights = normal(32, 512)
    importance = np.random.default_rng(1).exponential(1, 512).astype(np.float32) if weighted else None
    columns = np.ones(512, np.float32) if importance is None else importance

    def shrinking(blocks: Bytes) -> float:
        decoded = dequantize(blocks, qtype, 512)
        return float(1 - np.mean((columns * weights * decoded).sum(1) / (columns * weights * weights).sum(1)))

    plain, scaled = (encode(weights, qtype, importance) for encode in (ggml.quantize_rows, ggml.quantize_unshrunk))
    assert plain.shape == scaled.shape
    assert abs(shrinking(scaled)) < abs(shrinking(plain)) / 4
    errors = [float(np.mean(columns * (dequantize(b, qtype, 512) - weights) ** 2)) for b in (plain, scaled)]
    assert errors[1] < 1.1 * errors[0]


def test_unshrunk_rows_of_zeros_and_awkward_ones_are_finite() -> None:
    for qtype in (QType.Q4_0, QType.Q8_0):
        decoded = dequantize(ggml.quantize_unshrunk(awkward(), qtype), qtype, 64)
        assert np.isfinite(decoded).all() and not decoded[0].any()


def test_f32_is_left_alone() -> None:
    weights = normal(3, 5)
    blocks = quantize(weights, QType.F32)
    assert blocks.tobytes() == weights.tobytes()
    np.testing.assert_array_equal(dequantize(blocks, QType.F32, 5), weights)


@pytest.mark.parametrize("qtype", [*SHARED_TYPES, QType.Q4_K, QType.F32], ids=lambda t: t.name)
def test_threads_and_chunks_do_not_show(qtype: QType, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = normal(37, 512)
    monkeypatch.setattr(ggml, "CHUNK_WEIGHTS", 1 << 30)
    whole = quantize(weights, qtype, n_threads=1)
    decoded = dequantize(whole, qtype, 512, n_threads=1)
    monkeypatch.setattr(ggml, "CHUNK_WEIGHTS", 4 * 512)  # ten chunks, the last one short
    for n_threads in (1, 2, 5, 0):
        np.testing.assert_array_equal(quantize(weights, qtype, n_threads=n_threads), whole)
        np.testing.assert_array_equal(dequantize(whole, qtype, 512, n_threads=n_threads), decoded)


def test_rows_longer_than_a_chunk_and_strided_weights() -> None:
    long = normal(2, ggml.CHUNK_WEIGHTS + 32)
    np.testing.assert_array_equal(quantize(long, QType.Q8_0), np.concatenate([quantize(r[None], QType.Q8_0) for r in long]))
    strided = normal(16, 128)[::2, ::2]
    np.testing.assert_array_equal(quantize(strided, QType.Q4_1), quantize(strided.copy(), QType.Q4_1))


def test_an_error_in_a_worker_comes_out() -> None:
    def work(start: int, stop: int) -> None:
        if stop == 4:
            raise UnsupportedError("from a worker")

    with pytest.raises(UnsupportedError, match="from a worker"):
        ggml.each_chunk(4, ggml.CHUNK_WEIGHTS, work, 2)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("qtype", "n_per_row"), [(QType.Q8_0, 48), (QType.Q4_0, 31), (QType.Q4_K, 128), (QType.Q6_K, 288)])
def test_rows_that_do_not_fill_blocks_are_refused(qtype: QType, n_per_row: int) -> None:
    for call in (quantize, ggml.quantize_rows):
        with pytest.raises(UnsupportedError, match=f"{qtype.name} .* multiple of {block_size(qtype)} .* got {n_per_row}"):
            call(normal(2, n_per_row), qtype)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "IQ1_S", "IQ2_XXS", "IQ2_XS"])
def test_types_that_would_end_the_process_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        quantize(normal(2, 256), QType[name])


def test_types_without_a_decoder_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="I32"):
        dequantize(np.zeros((2, 128), np.uint8), QType.I32, 32)


def test_types_are_found_by_name_in_any_case() -> None:
    assert ggml.qtype_named("q4_k") == QType.Q4_K and ggml.qtype_named("F16") == QType.F16
    with pytest.raises(UnsupportedError, match=r"Q8_0.*; got int8") as caught:
        ggml.qtype_named("int8")
    assert "\n" not in str(caught.value)


# --- without the library ----------------------------------------------------------------------------------------------


@names
def test_the_fallback_gives_the_same_bytes(qtype: QType, request: pytest.FixtureRequest) -> None:
    weights = awkward()
    blocks = quantize(weights, qtype)
    decoded = dequantize(blocks, qtype, 64)
    request.getfixturevalue("no_library")
    assert ggml._to_float(qtype) is None
    np.testing.assert_array_equal(quantize(weights, qtype), blocks)
    np.testing.assert_array_equal(dequantize(blocks, qtype, 64), decoded)


def test_the_fallback_reads_k_quants_and_says_what_it_needs_to_write_them(request: pytest.FixtureRequest) -> None:
    blocks = quantize(normal(2, 256), QType.Q4_K)
    decoded = dequantize(blocks, QType.Q4_K, 256)
    request.getfixturevalue("no_library")
    np.testing.assert_allclose(dequantize(blocks, QType.Q4_K, 256), decoded, rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedError, match="Q4_K needs llama-cpp-python"):
        quantize(normal(2, 256), QType.Q4_K)


# --- weights that are on the grid already -----------------------------------------------------------------------------


def reencoded(weights: F32Array, qtype: QType) -> tuple[F32Array, bytes, bytes]:
    blocks = quantize(weights, qtype, n_threads=1)
    decoded = dequantize(blocks, qtype, weights.shape[1], n_threads=1)
    return decoded, blocks.tobytes(), quantize(decoded, qtype, n_threads=1).tobytes()


@grid_types
@settings(max_examples=150, deadline=None)
@given(
    codes=arrays(np.int16, (2, 32), elements=st.integers(-1000, 1000)),
    scale=st.sampled_from([1e-5, 1e-3, 0.0375, 20]),
)
def test_weights_on_the_grid_encode_to_the_same_bytes(qtype: QType, codes: NDArray[np.int16], scale: float) -> None:
    # steps are 0, or above what float16 holds and above 1/30,000 of the largest weight: both matter, see below
    _, first, second = reencoded(codes * np.float32(scale), qtype)
    assert first == second


@grid_types
def test_normal_weights_on_the_grid_encode_to_the_same_bytes(qtype: QType) -> None:
    _, first, second = reencoded(normal(500, 320) * np.float32(0.05), qtype)
    assert first == second


@grid_types
def test_a_step_below_float16_decodes_to_zeros_and_is_the_exception(qtype: QType) -> None:
    decoded, first, second = reencoded(normal(1, 32) * np.float32(1e-8), qtype)
    assert first != second  # the codes are written, the scale is not
    assert not decoded.any()
    assert not np.frombuffer(second, np.uint8)[:2].view(np.float16).any()


def test_a_minimum_far_above_the_step_is_the_exception_of_q4_1() -> None:
    """float32 cannot hold minimum + 15 steps exactly there, so the step itself moves."""
    step, minimum = np.float16(2.0**-12 * (1 + 2.0**-10)), np.float16(1000)
    block = np.concatenate([np.array([step, minimum]).view(np.uint8), np.full(16, 0xF0, np.uint8)])[None]
    decoded = dequantize(block, QType.Q4_1, 32)
    again = quantize(decoded, QType.Q4_1)
    assert again.tobytes() != block.tobytes()
    assert np.abs(dequantize(again, QType.Q4_1, 32) - decoded).max() <= 2 * np.spacing(np.float32(minimum))


@pytest.mark.parametrize(
    ("cpuinfo", "is_fast"),
    [
        (None, False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16 sse2\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16x\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 sse2\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
    ],
)
def test_bfloat16_is_fast_where_the_processor_has_more_of_it_than_of_float32(tmp_path, cpuinfo, is_fast):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert ggml.bf16_is_fast(path) == is_fast
