"""The adaptive recipe: the budget holds, the choice is the best there is, and bits go where they matter."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import LlamaFileType
from gguf_helpers import write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecl.cli import cli
from edgecl_convert import ConvertError, GgufFile, Imatrix, UnsupportedError, adaptive_recipe, choose_recipe, merge
from edgecl_convert.adaptive import CANDIDATES, candidates, knapsack, rounding_errors
from edgecl_convert.ggml import QType, dequantize, quantize, row_bytes
from edgecl_convert.gguf_file import TensorInfo
from edgecl_convert.merge import planned_bytes
from edgecl_convert.recipe import Recipe

# --- the knapsack -----------------------------------------------------------------------------------------------------

item = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 100)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(items=st.lists(item, min_size=1, max_size=5), share=st.floats(0, 1.2))
def test_the_choice_is_the_best_of_all_that_fit(items: list[list[tuple[int, float]]], share: float) -> None:
    sizes, errors = [[s for s, _ in i] for i in items], [[e for _, e in i] for i in items]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    budget = low + int(share * (high - low))

    def total(values: list[list[float]] | list[list[int]], chosen: tuple[int, ...] | list[int]) -> float:
        return sum(value[i] for value, i in zip(values, chosen, strict=True))

    fitting = [c for c in itertools.product(*(range(len(i)) for i in items)) if total(sizes, c) <= budget]
    chosen = knapsack(sizes, errors, budget)
    assert total(sizes, chosen) <= budget
    assert total(errors, chosen) == pytest.approx(min(total(errors, c) for c in fitting))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), budgets=st.lists(st.floats(0, 1.1), min_size=2, max_size=4))
def test_of_large_sizes_the_budget_holds_and_more_never_costs_more(seed: int, budgets: list[float]) -> None:
    rng = np.random.default_rng(seed)
    n_items = int(rng.integers(1, 12))
    sizes = [sorted(rng.integers(1, 10**9, 5).tolist()) for _ in range(n_items)]
    errors = [sorted(rng.exponential(1, 5).tolist(), reverse=True) for _ in range(n_items)]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    found = []
    for share in sorted(budgets):
        budget = low + int(share * (high - low))
        chosen = knapsack(sizes, errors, budget)
        assert sum(size[i] for size, i in zip(sizes, chosen, strict=True)) <= budget
        found.append(sum(error[i] for error, i in zip(errors, chosen, strict=True)))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found))
    assert budgets and (max(budgets) < 1 or found[-1] == pytest.approx(sum(map(min, errors))))


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base.gguf", width=256, n_layer=2, tied=False)


def matrix_for(base: GgufFile, seed: int = 0) -> Imatrix:
    rng = np.random.default_rng(seed)
    found = Imatrix()
    for name, info in base.tensors.items():
        if len(info.shape) > 1:
            found.sensitivities[name] = float(rng.exponential(1))
            if name != "token_embd.weight":
                found.sums[name], found.counts[name] = rng.exponential(1, info.shape[1]).astype(np.float32), 1
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0, 2.0])
def test_the_file_never_exceeds_its_budget(share: float, path: Path, tmp_path: Path) -> None:
    with GgufFile(path) as base:
        matrix = matrix_for(base)
        low, high = (planned_bytes(base, adaptive_recipe(base, None, {}, budget)) for budget in (smallest(base), 1 << 40))
        budget = low + int(share * (high - low))
        recipe = adaptive_recipe(base, matrix, matrix.sensitivities, budget)
        report = merge(base, None, tmp_path / "out.gguf", recipe, imatrix=matrix)
    assert report.model_bytes == (tmp_path / "out.gguf").stat().st_size <= budget
    assert report.model_bytes > min(budget, high) - 20_000  # and it uses what it has
    if share >= 1:
        assert set(recipe.types.values()) == {QType.Q8_0}


def smallest(base: GgufFile) -> int:
    with pytest.raises(ConvertError, match="--size-budget must be at least") as caught:
        adaptive_recipe(base, None, {}, 1)
    return int(str(caught.value).split("at least ")[1].split()[0])


def test_a_byte_less_than_the_smallest_file_is_refused(path: Path) -> None:
    with GgufFile(path) as base:
        least = smallest(base)
        assert set(adaptive_recipe(base, None, {}, least).types.values()) == {QType.Q2_K}
        with pytest.raises(ConvertError, match=f"at least {least} bytes for .*, got {least - 1}"):
            adaptive_recipe(base, None, {}, least - 1)


def test_the_default_budget_is_q4_k_m_and_more_bytes_never_predict_more_error(path: Path) -> None:
    with GgufFile(path) as base:
        matrix = matrix_for(base)
        budgets = np.linspace(smallest(base), 2 * planned_bytes(base, Recipe("Q4_K_M")), 5).astype(int)
        recipes = [adaptive_recipe(base, matrix, matrix.sensitivities, int(budget)) for budget in budgets]
        default = adaptive_recipe(base, matrix, matrix.sensitivities)
        assert default == adaptive_recipe(base, matrix, matrix.sensitivities, planned_bytes(base, Recipe("Q4_K_M")))
    predicted = [recipe.predicted_nats for recipe in recipes]
    assert all(after <= before for before, after in itertools.pairwise(predicted)) and predicted[-1] < predicted[0] / 50  # type: ignore[operator]


def test_bits_go_to_the_tensor_that_matters(path: Path) -> None:
    name = "blk.1.attn_k.weight"
    with GgufFile(path) as base:
        even = dict.fromkeys(base.tensors, 1.0)
        matters = adaptive_recipe(base, None, even | {name: 1e4})
        ignored = adaptive_recipe(base, None, even | {name: 1e-4})
    assert matters.types[name] == QType.Q8_0
    assert ignored.types[name] == QType.Q2_K
    assert {matters.types[other] for other in matters.types if other != name} <= {
        QType.Q3_K,
        QType.Q4_K,
        QType.Q5_K,
        QType.Q6_K,
    }


def test_with_equal_sensitivities_per_weight_all_tensors_get_the_same_type(path: Path) -> None:
    """Independent normal weights of one scale: a bit less costs four times more, so unequal bits cost more than equal ones."""
    with GgufFile(path) as base:
        even = {name: float(info.n_weights) for name, info in base.tensors.items()}
        recipe = adaptive_recipe(base, None, even, planned_bytes(base, Recipe("Q5_K")))
    assert set(recipe.types.values()) == {QType.Q5_K}


def test_the_prior_favours_the_head_and_the_first_layers(path: Path) -> None:
    with GgufFile(path) as base:
        recipe = adaptive_recipe(base, None, {})
        bits = {name: base.tensors[name].n_weights and row_bytes(qtype, 256) for name, qtype in recipe.types.items()}
    assert recipe.predicted_nats is None
    assert min(bits["output.weight"], bits["token_embd.weight"]) > bits["blk.1.ffn_up.weight"]
    assert bits["blk.0.ffn_up.weight"] >= bits["blk.1.ffn_up.weight"]


def test_the_prediction_is_the_weighted_error_of_the_written_file(path: Path, tmp_path: Path) -> None:
    with GgufFile(path) as base:
        matrix = matrix_for(base)
        recipe = adaptive_recipe(base, matrix, matrix.sensitivities)
        merge(base, None, tmp_path / "out.gguf", recipe, imatrix=matrix)
        total = 0.0
        with GgufFile(tmp_path / "out.gguf") as out:
            for name, sensitivity in matrix.sensitivities.items():
                square = (out.weights(name) - base.weights(name)).astype(np.float64) ** 2
                importance = matrix.importance(name)
                columns = np.ones(square.shape[1]) if importance is None else importance
                total += sensitivity * float(np.average(square.mean(0), weights=columns))
    assert recipe.predicted_nats == pytest.approx(total, rel=1e-4)


def test_threads_do_not_show(path: Path) -> None:
    with GgufFile(path) as base:
        matrix = matrix_for(base)
        assert len({str(adaptive_recipe(base, matrix, matrix.sensitivities, 0, n)) for n in (1, 3)}) == 1


@pytest.mark.parametrize("n_per_row", [512, 96, 40, 7])
def test_candidates_divide_the_row_and_can_be_written_and_read(n_per_row: int) -> None:
    weights = np.random.default_rng(0).standard_normal((4, n_per_row), np.float32)
    importance = np.random.default_rng(1).exponential(1, n_per_row).astype(np.float32)
    types = candidates(TensorInfo("blk.0.ffn_up.weight", (4, n_per_row), QType.F32, 0, 0))
    assert types == (CANDIDATES if n_per_row == 512 else tuple(t for t in CANDIDATES if "K" not in t.name)) or n_per_row % 32
    assert (types == (QType.F16,)) == (n_per_row % 32 != 0)
    for qtype in types:
        blocks = quantize(weights, qtype, importance)
        assert blocks.shape == (4, row_bytes(qtype, n_per_row))
        assert np.mean((dequantize(blocks, qtype, n_per_row) - weights) ** 2) < 0.3


def test_norms_and_vectors_keep_their_type(path: Path) -> None:
    with GgufFile(path) as base:
        recipe = adaptive_recipe(base, None, {})
        matrices = {name for name, info in base.tensors.items() if len(info.shape) > 1}
        assert recipe.types.keys() == matrices
        assert recipe.qtype(base.tensors["output_norm.weight"], 2, tied=False) == QType.F32


def test_what_keeps_its_type_costs_nothing(tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf", QType.Q4_K, width=256)) as base:
        errors, _ = rounding_errors(base, base.tensors["blk.0.ffn_up.weight"], CANDIDATES, None)
    assert [e == 0 for e in errors] == [qtype == QType.Q4_K for qtype in CANDIDATES]


def test_of_a_large_tensor_some_rows_tell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GgufFile(path) as base:
        info = base.tensors["blk.0.ffn_up.weight"]
        whole, mean_square = rounding_errors(base, info, CANDIDATES, None)
        assert mean_square == pytest.approx(np.mean(base.weights(info.name) ** 2), rel=1e-5)
        monkeypatch.setattr("edgecl_convert.adaptive._SAMPLE_WEIGHTS", 1 << 14)
        sampled, _ = rounding_errors(base, info, CANDIDATES, None)
    assert sampled != whole
    np.testing.assert_allclose(sampled, whole, rtol=0.1)


def test_the_file_type_is_what_most_weights_are(path: Path) -> None:
    with GgufFile(path) as base:
        types = dict.fromkeys((n for n, i in base.tensors.items() if len(i.shape) > 1), QType.Q5_K)
        types["blk.0.attn_q.weight"] = QType.Q2_K
        assert Recipe("adaptive", types).file_type(base) == int(LlamaFileType.MOSTLY_Q5_K_M)


# --- when int4 is adaptive --------------------------------------------------------------------------------------------


def test_int4_is_adaptive_with_measured_sensitivities_or_a_budget(path: Path, tmp_path: Path) -> None:
    with GgufFile(path) as base:
        matrix = matrix_for(base)
        bare = replace(matrix, sensitivities={})
        budget = planned_bytes(base, Recipe("Q4_K_M"))
        assert choose_recipe(base, "int4", matrix).quant == "adaptive"
        assert choose_recipe(base, "int4", None, budget).quant == "adaptive"
        assert choose_recipe(base, "int4", bare).quant == choose_recipe(base, "int4").quant == "Q4_K_M"
        assert choose_recipe(base, "int8", matrix).quant == "Q8_0"
        assert choose_recipe(base, "q4_k", matrix).quant == "Q4_K"
        with pytest.raises(ConvertError, match="--size-budget goes with --quant int4, got Q8_0"):
            choose_recipe(base, "Q8_0", None, budget)
        with pytest.raises(UnsupportedError, match="quant must be one of"):
            choose_recipe(base, "adaptive")
        merge(base, None, tmp_path / "q.gguf", "Q4_K")
    with GgufFile(tmp_path / "q.gguf") as quantized:
        assert choose_recipe(quantized, "int4", matrix).quant == "keep"


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("no/out.gguf", ["--quant", "int4"], "no is no folder; make it"),
        ("", ["--quant", "int4", "--force"], "is the base itself"),
        ("out.gguf", ["--quant", "Q8_0", "--size-budget", "9"], "--size-budget goes with --quant int4, got Q8_0"),
        ("out.gguf", ["--quant", "Q9"], "quant must be one of .*; got Q9"),
    ],
)
def test_convert_refuses_what_it_can_before_it_measures(
    target: str, options: list[str], words: str, path: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / target) if target else str(path)
    unread = ["--imatrix", str(tmp_path / "no.txt")]  # reading it would be the first step of measuring
    with pytest.raises(ConvertError, match=words):
        CliRunner().invoke(cli, ["convert", str(path), out, *unread, *options], catch_exceptions=False)


def test_sensitivities_of_some_tensors_are_not_mixed_with_the_prior(path: Path) -> None:
    with GgufFile(path) as base, pytest.raises(ConvertError, match=r"sensitivities lack token_embd\.weight"):
        adaptive_recipe(base, None, {"blk.0.attn_q.weight": 1.0})


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    bad = np.full((256, 256), np.nan, np.float32)
    with (
        GgufFile(write_model(tmp_path / "base.gguf", width=256, blk__1__attn_q__weight=bad)) as base,
        pytest.raises(ConvertError, match=r"blk\.1\.attn_q\.weight has NaN"),
    ):
        adaptive_recipe(base, None, {})


def test_convert_tells_which_tensor_got_what(path: Path, tmp_path: Path) -> None:
    with GgufFile(path) as base:
        matrix_for(base).write(tmp_path / "m.gguf")
        budget = planned_bytes(base, Recipe("Q4_K_M"))
    arguments = ["convert", str(path), str(tmp_path / "out.gguf"), "--quant", "int4", "--imatrix", str(tmp_path / "m.gguf")]
    done = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    with GgufFile(tmp_path / "out.gguf") as out:
        assert facts["types"] == {name: out.tensors[name].qtype.name for name in facts["types"]}
        assert len(facts["types"]) == 16 and len(set(facts["types"].values())) > 2
    assert facts["quant"] == "adaptive" and facts["model_bytes"] <= budget and facts["predicted_nats"] > 0
    assert facts["notes"] == ["the importance matrix lacks token_embd.weight"]
    done = CliRunner().invoke(cli, [*arguments, "--force", "--size-budget", str(budget - 30_000), "--json"])
    assert json.loads(done.stdout)["model_bytes"] <= budget - 30_000
