"""The importance matrix: its file, what torch measures, and llama.cpp's own bytes when it quantizes with the same one."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from gguf_helpers import write_model
from tiny import BYTES, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel, PreTrainedTokenizerFast

from edgecl_convert import ConvertError, GgufError, GgufFile, HfModel, Imatrix, Source, UnsupportedError, measure, merge
from edgecl_convert.ggml import F32Array, QType, quantize
from edgecl_convert.gguf_file import PlannedTensor, copied_fields, encode_field, write_gguf
from edgecl_convert.imatrix import CHUNK_TOKENS, read_or_measure
from edgecl_convert.names import gguf_names

TEXT = "".join(np.random.default_rng(0).choice(list("ABCDEFGHXYZ0123456789"), 3 * CHUNK_TOKENS + 100))  # no merges


def invented(source: GgufFile, seed: int = 0, names: tuple[str, ...] = ("",)) -> Imatrix:
    """Importances over five orders of magnitude for the matrices whose name contains one of `names`."""
    rng = np.random.default_rng(seed)
    matrix = Imatrix(datasets=["some text.txt", "weiß.txt"], n_chunks=3)
    for name, info in source.tensors.items():
        if len(info.shape) > 1 and any(part in name for part in names):
            matrix.sums[name] = np.exp(rng.normal(0, 2, info.shape[-1])).astype(np.float32)
            matrix.counts[name] = 3 * CHUNK_TOKENS + 1
            matrix.sensitivities[name] = float(np.float32(rng.uniform(0, 9)))
    return matrix


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf", width=256, tied=False)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(base_path: Path, tmp_path: Path) -> None:
    with GgufFile(base_path) as base:
        matrix = invented(base)
        matrix.write(tmp_path / "m.gguf")
        again = Imatrix.read(tmp_path / "m.gguf")
        again.check_fits(base)
    assert (again.counts, again.sensitivities, again.datasets) == (matrix.counts, matrix.sensitivities, matrix.datasets)
    assert (again.n_chunks, again.chunk_tokens) == (3, CHUNK_TOKENS)
    for name, sums in matrix.sums.items():
        np.testing.assert_array_equal(again.sums[name], sums)
        np.testing.assert_array_equal(again.importance(name), sums / np.float32(matrix.counts[name]))
    assert again.importance("blk.9.attn_q.weight") is None


def test_the_file_is_what_llama_imatrix_writes(base_path: Path, tmp_path: Path) -> None:
    with GgufFile(base_path) as base:
        invented(base).write(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: reader.fields[key].contents() for key in ("general.type", "imatrix.chunk_count", "imatrix.chunk_size")}
    assert fields == {"general.type": "imatrix", "imatrix.chunk_count": 3, "imatrix.chunk_size": CHUNK_TOKENS}
    assert reader.fields["imatrix.datasets"].contents() == ["some text.txt", "weiß.txt"]
    shapes = {t.name: (t.tensor_type, t.shape.tolist()) for t in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == (QType.F32, [512, 1])
    assert shapes["blk.0.ffn_down.weight.counts"] == (QType.F32, [1, 1])


def test_a_weight_that_met_no_token_counts_as_one_everywhere() -> None:
    matrix = Imatrix({"x": np.array([3, 5], np.float32)}, {"x": 0})
    assert matrix.importance("x").tolist() == [1, 1]  # type: ignore[union-attr]


def write_entries(path: Path, kind: str = "imatrix", **entries: F32Array) -> Path:
    named = {name.replace("__", "."): values for name, values in entries.items()}
    plan = [PlannedTensor(name, values.shape, QType.F32) for name, values in named.items()]
    write_gguf(path, [encode_field("general.type", kind)], plan, (v.view(np.uint8) for v in named.values()))
    return path


ONE, TWO = np.ones((1, 1), np.float32), np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("entries", "error", "expected"),
    [
        ({"kind": "model", "x__in_sum2": TWO, "x__counts": ONE}, GgufError, "is not an importance matrix"),
        ({"x__in_sum2": TWO * np.nan, "x__counts": ONE}, GgufError, r"x\.in_sum2 has values that are negative or not finite"),
        ({"x__in_sum2": -TWO, "x__counts": ONE}, GgufError, "negative or not finite"),
        ({"x__in_sum2": TWO, "x__counts": ONE * np.inf}, GgufError, r"x\.counts has values"),
        ({"x__in_sum2": TWO}, GgufError, "has sums or counts of x, but not both"),
        ({"x__counts": ONE}, GgufError, "has sums or counts of x, but not both"),
        ({"x__in_sum2": np.ones((2, 2), np.float32), "x__counts": np.ones((2, 1), np.float32)}, UnsupportedError, "experts"),
    ],
)
def test_a_file_that_cannot_be_is_refused(entries: dict, error: type[Exception], expected: str, tmp_path: Path) -> None:
    path = write_entries(tmp_path / "m.gguf", **entries)
    with pytest.raises(error, match=expected) as caught:
        Imatrix.read(path)
    assert "\n" not in str(caught.value)


def test_means_beside_the_sums_are_passed_over(tmp_path: Path) -> None:
    matrix = Imatrix.read(write_entries(tmp_path / "m.gguf", x__in_sum2=TWO, x__in_sum=-TWO, x__counts=ONE))
    assert matrix.sums.keys() == {"x"} and matrix.sums["x"].tolist() == [1, 1]


@pytest.mark.parametrize(("name", "content"), [("no.txt", None), ("bad.txt", b"\xff\xfe")])
def test_a_text_that_cannot_be_read_is_one_line(name: str, content: bytes | None, base_path: Path, tmp_path: Path) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with GgufFile(base_path) as base, pytest.raises(ConvertError, match=f"{name}: cannot be read as UTF-8 text") as caught:
        read_or_measure(tmp_path / name, base)
    assert "\n" not in str(caught.value)


# --- quantizing with it: llama.cpp's bytes ------------------------------------------------------------------------------


def quantized_by_llama_cpp(source: Path, quant: str, imatrix: Imatrix, pure: bool) -> Path:
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix.sums) + 1))()
    kept = [imatrix.importance(name) for name in imatrix.sums]
    for entry, name, values in zip(entries, imatrix.sums, kept, strict=False):
        entry.name, entry.size = name.encode(), len(values)  # type: ignore[arg-type]
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))  # type: ignore[union-attr]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}")
    options.nthread, options.pure, options.imatrix = 1, pure, entries
    out = source.with_name("theirs.gguf")
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0
    return out


@pytest.mark.parametrize(
    ("quant", "their_name", "tied"),
    [
        ("Q4_K_M", "Q4_K_M", False),
        ("Q4_K_M", "Q4_K_M", True),
        ("Q4_K", "Q4_K_S", False),
        ("Q2_K", "Q2_K", False),
        ("Q3_K", "Q3_K_S", False),
        ("Q5_K", "Q5_K_S", False),
        ("Q6_K", "Q6_K", False),
        ("Q4_0", "Q4_0", False),
        ("Q5_1", "Q5_1", False),
    ],
)
def test_bytes_are_those_of_llama_cpp_with_the_same_matrix(quant: str, their_name: str, tied: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf", width=256, tied=tied)
    with GgufFile(path) as base:
        matrix = invented(base)
        merge(base, None, tmp_path / "ours.gguf", quant, imatrix=matrix)
        merge(base, None, tmp_path / "without.gguf", quant)
    theirs_path = quantized_by_llama_cpp(path, their_name, matrix, pure=quant != "Q4_K_M")
    with (
        GgufFile(theirs_path) as theirs,
        GgufFile(tmp_path / "ours.gguf") as ours,
        GgufFile(tmp_path / "without.gguf") as without,
    ):
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, info in ours.tensors.items():
            assert info.qtype == theirs.tensors[name].qtype
            np.testing.assert_array_equal(ours.blocks(name), theirs.blocks(name), err_msg=name)
            if len(info.shape) > 1:
                assert (without.blocks(name) != ours.blocks(name)).any(), name


def test_tensors_that_it_lacks_are_quantized_without_it_and_said(base_path: Path, tmp_path: Path) -> None:
    with GgufFile(base_path) as base:
        report = merge(base, None, tmp_path / "out.gguf", "Q4_K", imatrix=invented(base, names=("blk.0",)))
        whole = merge(base, None, tmp_path / "whole.gguf", "Q4_K", imatrix=invented(base))
        with GgufFile(tmp_path / "out.gguf") as out:
            name = "blk.1.attn_q.weight"
            np.testing.assert_array_equal(out.blocks(name), quantize(base.weights(name), QType.Q4_K))
    assert [note for note in report.notes if "matrix lacks" in note and note.endswith("...")] == report.notes
    assert whole.notes == []


def test_the_matrix_that_a_source_was_quantized_with_is_not_said_of_what_is_quantized_now(
    base_path: Path, tmp_path: Path
) -> None:
    said = {"quantize.imatrix.file": "theirs.gguf", "quantize.imatrix.entries_count": 14}
    with GgufFile(base_path) as base:
        fields = [*copied_fields(base), *(encode_field(key, value) for key, value in said.items())]
        plan = [PlannedTensor(info.name, info.shape, info.qtype) for info in base.tensors.values()]
        write_gguf(tmp_path / "source.gguf", fields, plan, (base.blocks(name) for name in base.tensors))
    with GgufFile(tmp_path / "source.gguf") as source:
        for quant, kept in (("keep", said), ("Q4_K", {})):
            merge(source, None, tmp_path / "out.gguf", quant)
            with GgufFile(tmp_path / "out.gguf") as out:
                assert {key: out.get(key) for key in out.keys if "imatrix" in key} == kept


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: m.sums.update({"blk.1.attn_q.weight": np.ones(9, np.float32)}),
            r"blk\.1\.attn_q\.weight has 256 columns .* 9",
        ),
        (lambda m: m.sums.clear(), "has none of the weights"),
    ],
)
def test_the_matrix_of_another_model_is_refused(
    change: Callable[[Imatrix], None], expected: str, base_path: Path, tmp_path: Path
) -> None:
    with GgufFile(base_path) as base:
        matrix = invented(base)
        change(matrix)
        with pytest.raises(ConvertError, match=expected):
            merge(base, None, tmp_path / "out.gguf", "Q4_K", imatrix=matrix)
    assert not (tmp_path / "out.gguf").exists()


# --- measuring --------------------------------------------------------------------------------------------------------


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with a BOS token before every text if asked for."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*BYTES, "<s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def measured(request, one_thread, tmp_path_factory) -> tuple[Source, PreTrainedModel, Imatrix]:
    """What TEXT tells about a GGUF file with a head of its own (llama), and about a folder with a tied one (qwen3)."""
    folder = tmp_path_factory.mktemp(request.param)
    path, model = build(folder / "m.gguf", request.param)
    source: Source = GgufFile(path)
    if request.param == "qwen3":
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        source = HfModel(folder, vocabulary={})
    return source, model, measure(source, TEXT, "text.txt")


def chunks() -> torch.Tensor:
    """The chunks of TEXT, whose letters are a token each."""
    ids = [BYTES.index(letter) for letter in TEXT]
    n = len(ids) // CHUNK_TOKENS
    assert n == 3 and len(ids) % CHUNK_TOKENS
    return torch.tensor(ids[: n * CHUNK_TOKENS]).reshape(n, CHUNK_TOKENS)


@torch.no_grad()
def inputs_by_hand(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The input of every weight, put together from what the layers give out; (B, T, n_in) by GGUF name."""
    outputs = model(input_ids=chunks(), output_hidden_states=True, use_cache=False)
    head = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    found = {head: outputs.hidden_states[-1]}
    positions = torch.arange(CHUNK_TOKENS)[None]
    for i, layer in enumerate(model.model.layers):
        hidden = outputs.hidden_states[i]  # (B, T, D)
        x = layer.input_layernorm(hidden)
        rotary = model.model.rotary_emb(hidden, positions)
        causal = torch.full((CHUNK_TOKENS, CHUNK_TOKENS), -torch.inf).triu(1)[None, None]
        attended = layer.self_attn(x, position_embeddings=rotary, attention_mask=causal)[0]
        context = torch.linalg.lstsq(layer.self_attn.o_proj.weight.double(), attended.double().flatten(0, 1).T).solution.T
        y = layer.post_attention_layernorm(hidden + attended)
        inner = torch.nn.functional.silu(y @ layer.mlp.gate_proj.weight.T) * (y @ layer.mlp.up_proj.weight.T)
        kinds = {"attn_q": x, "attn_k": x, "attn_v": x, "ffn_gate": y, "ffn_up": y, "ffn_down": inner}
        if model.config.model_type == "llama":  # qwen3's o_proj has more columns than rows: its input cannot be solved for
            kinds["attn_output"] = context
        found |= {f"blk.{i}.{kind}.weight": value for kind, value in kinds.items()}
    return found


def test_importance_is_the_mean_square_of_what_each_weight_is_multiplied_with(measured) -> None:
    source, model, matrix = measured
    matrices = {name for name, info in source.tensors.items() if len(info.shape) > 1}
    tied = model.config.tie_word_embeddings
    assert matrix.sums.keys() == matrix.counts.keys() == matrices - (set() if tied else {"token_embd.weight"})
    assert set(matrix.counts.values()) == {3 * CHUNK_TOKENS}
    assert (matrix.n_chunks, matrix.datasets) == (3, ["text.txt"])
    by_hand = inputs_by_hand(model)
    assert len(by_hand) >= len(matrix.sums) - 2
    for name, x in by_hand.items():
        wanted = x.double().reshape(-1, x.shape[-1]).square().mean(0)
        tolerance = 1e-3 if "attn_output" in name else 1e-5
        np.testing.assert_allclose(matrix.importance(name), wanted, rtol=tolerance, err_msg=name)


def test_projections_that_share_an_input_share_their_importance(measured) -> None:
    matrix = measured[2]
    for first, second in (("attn_q", "attn_k"), ("attn_q", "attn_v"), ("ffn_gate", "ffn_up")):
        np.testing.assert_array_equal(matrix.sums[f"blk.1.{first}.weight"], matrix.sums[f"blk.1.{second}.weight"])
    assert (matrix.sums["blk.1.attn_q.weight"] != matrix.sums["blk.1.ffn_up.weight"]).any()


def test_sensitivity_predicts_the_divergence_of_a_disturbed_tensor(measured) -> None:
    source, model, matrix = measured
    generator = torch.Generator().manual_seed(3)
    parameters = dict(gguf_names(model.named_parameters(), source))
    assert matrix.sensitivities.keys() == {name for name, info in source.tensors.items() if len(info.shape) > 1}
    with torch.no_grad():
        wanted = model(input_ids=chunks()).logits.double().log_softmax(-1)
        for name, sensitivity in matrix.sensitivities.items():
            weights, ratios = parameters[name], []
            for _ in range(4):
                noise = torch.randn(weights.shape, generator=generator)
                noise *= (2e-3 / sensitivity) ** 0.5  # 0.002 nats expected: small enough to be quadratic
                weights += noise
                got = model(input_ids=chunks()).logits.double().log_softmax(-1)
                weights -= noise
                ratios.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()) / 2e-3)
            assert 0.5 < np.mean(ratios) < 1.6, (name, ratios)


@pytest.mark.usefixtures("one_thread")
def test_a_folder_with_fused_projections_and_a_token_before_every_chunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=256
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    byte_tokenizer(bos=True).save_pretrained(tmp_path)
    with HfModel(tmp_path, vocabulary={}) as source:
        matrix = measure(source, TEXT)
        matrix.check_fits(source)
        kinds = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        names = {f"blk.{i}.{kind}.weight" for i in range(2) for kind in kinds} | {"output.weight"}
        assert matrix.sums.keys() == names
        assert matrix.sensitivities.keys() == names | {"token_embd.weight"}
    ids = torch.tensor([256, *(BYTES.index(letter) for letter in TEXT)])[: 3 * CHUNK_TOKENS].reshape(3, CHUNK_TOKENS)
    ids[:, 0] = 256
    with torch.no_grad():
        x = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    np.testing.assert_allclose(matrix.importance("output.weight"), x.square().mean(0), rtol=1e-4)


def test_a_text_shorter_than_a_chunk_is_refused(measured) -> None:
    with pytest.raises(ConvertError, match=f"at least {CHUNK_TOKENS} tokens, got 100"):
        measure(measured[0], TEXT[:100])


def test_a_model_that_transformers_cannot_load_is_one_line(base_path: Path) -> None:
    with GgufFile(base_path) as base, pytest.raises(ConvertError, match="transformers cannot load it to measure it") as caught:
        measure(base, TEXT)  # it has no vocabulary
    assert "\n" not in str(caught.value)
