"""Recipes: names, what stays as it is, and the fallback of rows that a block does not divide (types: see test_merge)."""

from pathlib import Path

import pytest
from gguf import LlamaFileType
from gguf_helpers import write_model

from edgecl_convert import GgufFile, UnsupportedError
from edgecl_convert.ggml import QType, block_size
from edgecl_convert.gguf_file import TensorInfo
from edgecl_convert.recipe import Recipe, fallback


def info(name: str, *shape: int, qtype: QType = QType.F16) -> TensorInfo:
    return TensorInfo(name, shape, qtype, 0, 0)


@pytest.mark.parametrize("name", ["keep", "q8_0", "Q8_0", "f16", "q4_k_m", "Q4_K_M"])
def test_a_recipe_is_found_in_any_case(name: str) -> None:
    assert Recipe.named(name).quant == (name if name == "keep" else name.upper())


@pytest.mark.parametrize("name", ["", "int4", "Q4_K_S", "Q8_K", "I32", "IQ2_XXS", "q8_0 "])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"keep, F32, .*Q4_K_M; got"):
        Recipe.named(name)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "F16"])
def test_vectors_norms_and_biases_stay(quant: str) -> None:
    for kept in (
        info("output_norm.weight", 64, qtype=QType.F32),
        info("blk.0.attn_q_norm.weight", 4, 64, qtype=QType.F32),
        info("blk.0.attn_q.bias", 64, qtype=QType.F32),
        info("rope_freqs.weight", 32, qtype=QType.F32),
    ):
        assert Recipe(quant).qtype(kept, 2, tied=True) == QType.F32


def test_keep_gives_every_tensor_its_own_type() -> None:
    for qtype in (QType.Q4_1, QType.IQ2_XXS, QType.F32):
        assert Recipe("keep").qtype(info("blk.0.attn_q.weight", 64, 256, qtype=qtype), 2, tied=True) == qtype


@pytest.mark.parametrize("n_per_row", [256, 96, 72, 1])
def test_the_type_taken_instead_divides_the_row(n_per_row: int) -> None:
    for qtype in (QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0, QType.Q4_0, QType.F32):
        taken = fallback(qtype, n_per_row)
        assert n_per_row % block_size(taken) == 0
        assert (taken == qtype) == (n_per_row % block_size(qtype) == 0)
        assert (taken == QType.F16) == (qtype != QType.F32 and n_per_row % 32 != 0)


@pytest.mark.parametrize(
    ("quant", "expected"),
    [("keep", None), ("F32", "ALL_F32"), ("F16", "MOSTLY_F16"), ("Q8_0", "MOSTLY_Q8_0"), ("Q4_K_M", "MOSTLY_Q4_K_M")],
)
def test_the_file_type_is_the_name_llama_cpp_shows(quant: str, expected: str | None, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "m.gguf", n_layer=1)) as base:
        assert Recipe(quant).file_type(base) == (None if expected is None else int(LlamaFileType[expected]))
