"""Recipes: names, what stays as it is, and the fallback of rows that a block does not divide (types: see test_merge)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import LlamaFileType
from gguf_helpers import write_model

from edgecl_convert import GgufFile, UnsupportedError
from edgecl_convert.ggml import QType, block_size, row_bytes
from edgecl_convert.gguf_file import PlannedTensor, TensorInfo, encode_field, write_gguf
from edgecl_convert.recipe import Recipe, fallback, model_shape, resolve_quant


def info(name: str, *shape: int, qtype: QType = QType.F16) -> TensorInfo:
    return TensorInfo(name, shape, qtype, 0, 0)


@pytest.mark.parametrize("name", ["keep", "q8_0", "Q8_0", "f16", "q4_k_m", "Q4_K_M"])
def test_a_recipe_is_found_in_any_case(name: str) -> None:
    assert Recipe.named(name).quant == (name if name == "keep" else name.upper())


@pytest.mark.parametrize("name", ["", "int4", "Q4_K_S", "Q8_K", "I32", "IQ2_XXS", "q8_0 "])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"keep, keep_minimums, F32, .*Q4_K_M; got"):
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


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_inp.weight", "blk.0.ssm_conv1d.weight", "blk.0.time_mix_decay_w1.weight", "position_embd.weight"],
)
def test_small_matrices_that_llama_cpp_never_quantizes_stay(name: str) -> None:
    assert Recipe("Q8_0").qtype(info(name, 64, 256, qtype=QType.F32), 2, tied=True) == QType.F32
    for like_it in ("blk.0.ffn_gate.weight", "blk.0.ffn_gate_exps.weight", "blk.0.time_mix_key.weight", "token_embd.weight"):
        assert Recipe("Q8_0").qtype(info(like_it, 64, 256, qtype=QType.F32), 2, tied=True) == QType.Q8_0


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
    [
        ("keep", None),
        ("F32", "ALL_F32"),
        ("F16", "MOSTLY_F16"),
        ("Q8_0", "MOSTLY_Q8_0"),
        ("Q2_K", "MOSTLY_Q2_K"),
        ("Q4_K", "MOSTLY_Q4_K_S"),
        ("Q4_K_M", "MOSTLY_Q4_K_M"),
    ],
)
def test_the_file_type_is_the_name_llama_cpp_shows(quant: str, expected: str | None, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "m.gguf", n_layer=1)) as base:
        assert Recipe(quant).file_type(base) == (None if expected is None else int(LlamaFileType[expected]))


# --- int8, int4 -------------------------------------------------------------------------------------------------------


def one_of_each(path: Path, **tensors: tuple[QType, int]) -> GgufFile:
    """A file with one matrix of each name (dots written as `__`), of a type and a row length."""
    plan = [PlannedTensor(name.replace("__", "."), (2, width), qtype) for name, (qtype, width) in tensors.items()]
    plan.append(PlannedTensor("blk.0.attn_norm.weight", (5,), QType.F32))
    data = [np.zeros((int(np.prod(t.shape[:-1])), row_bytes(t.qtype, t.shape[-1])), np.uint8) for t in plan]
    write_gguf(path, [encode_field("general.architecture", "llama")], plan, iter(data))
    return GgufFile(path)


Q, DOWN, EMBEDDING = "blk__0__attn_q__weight", "blk__0__ffn_down__weight", "token_embd__weight"
ROUTER, CONVOLUTION = "blk__0__ffn_gate_inp__weight", "blk__0__ssm_conv1d__weight"


@pytest.mark.parametrize(
    ("tensors", "int4"),
    [
        ({EMBEDDING: (QType.Q8_0, 64), Q: (QType.Q4_1, 64), DOWN: (QType.Q4_0, 96)}, "keep"),
        ({EMBEDDING: (QType.F16, 256), Q: (QType.Q4_K, 256)}, "keep"),
        ({Q: (QType.Q4_K, 2048), DOWN: (QType.Q6_K, 512)}, "keep"),  # as mixtures have it
        ({Q: (QType.Q4_K, 256), ROUTER: (QType.F32, 256)}, "keep"),
        ({Q: (QType.F16, 256), CONVOLUTION: (QType.F32, 4)}, "Q4_K_M"),
        ({Q: (QType.Q4_K, 256), DOWN: (QType.Q6_K, 256)}, "Q4_K_M"),
        ({Q: (QType.Q4_K, 2048), DOWN: (QType.F16, 32)}, "Q4_1"),
        ({Q: (QType.Q4_K, 2048), DOWN: (QType.Q3_K, 256)}, "Q4_K_M"),  # nights cannot move those
        ({EMBEDDING: (QType.F16, 64), Q: (QType.F16, 256), DOWN: (QType.Q4_0, 512)}, "Q4_K_M"),
        ({EMBEDDING: (QType.F16, 256), Q: (QType.F16, 256), DOWN: (QType.F16, 288)}, "Q4_1"),
        ({EMBEDDING: (QType.Q8_0, 64), Q: (QType.Q8_0, 64)}, "Q4_1"),
        ({Q: (QType.Q4_0, 64), DOWN: (QType.Q6_K, 256)}, "Q4_1"),
    ],
)
def test_int4_is_the_bases_own_types_else_what_its_rows_allow(tmp_path: Path, tensors: dict[str, Any], int4: str) -> None:
    with one_of_each(tmp_path / "m.gguf", **tensors) as base:
        assert resolve_quant("int4", base) == int4
        assert resolve_quant("int4", base, learned=True) == int4.replace("keep", "keep_minimums")
        assert resolve_quant("int8", base) == "Q8_0"


def test_layers_of_an_encoder_and_a_decoder_are_layers_and_none_are_none(tmp_path: Path) -> None:
    two = {f"{part}__blk__7__attn_v__weight": (QType.F16, 256) for part in ("enc", "dec")}
    with one_of_each(tmp_path / "m.gguf", **two) as base:
        assert resolve_quant("int4", base) == "Q4_K_M"
        assert {Recipe.named("Q4_K_M").qtype(info, 8, True).name for i, info in base.tensors.items() if "_v" in i} == {"Q6_K"}
    with one_of_each(tmp_path / "other.gguf", v__patch_embd__weight=(QType.F16, 64)) as base:
        assert resolve_quant("int4", base) != "keep"


def test_a_number_of_layers_that_is_none_is_one_line(tmp_path: Path) -> None:
    fields = [encode_field("general.architecture", "llama"), encode_field("llama.block_count", "two")]
    write_gguf(tmp_path / "m.gguf", fields, [], iter([]))
    with (
        GgufFile(tmp_path / "m.gguf") as base,
        pytest.raises(UnsupportedError, match="block_count must be a whole number, got two"),
    ):
        model_shape(base)


def test_keep_minimums_gives_layers_of_four_and_five_bits_a_type_that_has_them(tmp_path: Path) -> None:
    layers = {Q: QType.Q4_0, "blk__0__attn_k__weight": QType.Q4_1, "blk__0__attn_v__weight": QType.Q5_0, DOWN: QType.Q6_K}
    layers |= {"blk__1__ffn_up__weight": QType.Q4_K, "blk__1__ffn_gate__weight": QType.Q5_K}
    layers |= {"blk__1__attn_k__weight": QType.F16, "blk__1__attn_v__weight": QType.Q8_0, EMBEDDING: QType.Q4_0}
    tensors = {name: (qtype, 256) for name, qtype in layers.items()}
    with one_of_each(tmp_path / "m.gguf", **tensors) as base:
        recipe = Recipe.named("keep_minimums")
        changed = {n: recipe.qtype(i, 2, True).name for n, i in base.tensors.items() if recipe.qtype(i, 2, True) != i.qtype}
        assert changed == {
            "blk.0.attn_q.weight": "Q4_1",
            "blk.0.attn_v.weight": "Q5_1",
            "blk.1.ffn_up.weight": "Q4_1",
            "blk.1.ffn_gate.weight": "Q5_1",
        }
        assert recipe.file_type(base) is None


def test_other_quants_are_the_conversion_stages_own_names(tmp_path: Path) -> None:
    with one_of_each(tmp_path / "m.gguf", **{Q: (QType.F16, 64)}) as base:
        assert [resolve_quant(name, base) for name in ("keep", "q4_0", "F16", "q4_k_m")] == ["keep", "Q4_0", "F16", "Q4_K_M"]
        with pytest.raises(UnsupportedError, match=r"quant must be one of int8, int4, keep, .*; got int3"):
            resolve_quant("int3", base)
