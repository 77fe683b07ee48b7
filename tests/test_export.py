"""A Hugging Face folder becomes the GGUF that llama.cpp computes the same with.

Parity is against transformers on the same ids, and every way in which a converter usually goes wrong is made here on purpose
and must miss the bound.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from hf_models import (
    CONTEXT,
    EPS,
    FAMILIES,
    FULL,
    GEMMA3_EPS,
    LINEAR,
    LLAMA3,
    N_HEAD,
    N_KV,
    N_VOCAB,
    SLIDING,
    STD,
    VOCABULARY,
    WIDTH,
    WINDOW,
    YARN,
    build,
    edit_config,
    edit_weights,
    export,
)
from safetensors.numpy import load_file, save_file

from edgecl.engine import GGML_TYPE_F32, Engine
from edgecl.places import find_model
from edgecl_convert import GgufFile, HfModel, merge, resolve_quant
from edgecl_convert.ggml import QType
from edgecl_convert.gguf_file import PlannedTensor, encode_field, write_gguf
from edgecl_convert.names import from_gguf_rows

MAX_KLD, MIN_TOP1 = 1e-5, 0.995
FAR = 100 * MAX_KLD  # what a mutant must exceed
IDS = [int(token) for token in np.random.default_rng(1).integers(0, N_VOCAB, 200)]
Logits = torch.Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def reference(model: Any, n: int = len(IDS)) -> Logits:
    return model(torch.tensor([IDS[:n]])).logits[0].double()


def served(path: Path, n: int = len(IDS)) -> Logits:
    """Return llama.cpp's logits (T, V), with a KV cache in F32."""
    with Engine(path, n_ctx=512, n_threads=1, kv_type=GGML_TYPE_F32) as engine:
        return torch.from_numpy(engine.logits(IDS[:n])).double()


def kld(wanted: Logits, got: Logits) -> float:
    """Return the mean over tokens of KL(wanted, got), in nats."""
    p, q = torch.log_softmax(wanted, -1), torch.log_softmax(got, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_same(wanted: Logits, got: Logits) -> None:
    assert kld(wanted, got) < MAX_KLD
    assert float((wanted.argmax(-1) == got.argmax(-1)).double().mean()) >= MIN_TOP1


# --- parity -----------------------------------------------------------------------------------------------------------

GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama with heads of its own width": ("llama", {"head_dim": 24, "num_key_value_heads": N_HEAD}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn, attention factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
    "llama yarn, mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 1.0}}),
    "qwen2 untied, yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": False}),
    "qwen3 tied, linear": ("qwen3", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "gemma3 linear, soft cap, untied": (
        "gemma3",
        {"rope_parameters": GEMMA3_ROPE, "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
    ),
    "gemma3 every second layer": ("gemma3", {"layer_types": [SLIDING, FULL] * 3}),
    "gemma3 window everywhere": ("gemma3", {"layer_types": [SLIDING] * 6}),
    "gemma3 no window": ("gemma3", {"layer_types": [FULL] * 6}),
    "gpt_neox tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "gpt_neox in sequence, tanh": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Callable[[str], tuple[Path, Logits]]:
    """Return a function case -> (folder, transformers' logits), each built once."""

    @cache
    def made(case: str) -> tuple[Path, Logits]:
        folder = tmp_path_factory.mktemp("hf") / "model"
        family, changed = CASES[case]
        return folder, reference(build(folder, family, **changed))

    return made


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_computes(cases, case, tmp_path):
    folder, wanted = cases(case)
    assert_same(wanted, served(export(folder, tmp_path / "out.gguf")))


def test_a_window_that_llama_cpp_does_not_have_limits_the_context(tmp_path):
    model = build(tmp_path / "hf", "mistral", sliding_window=WINDOW)
    with HfModel(tmp_path / "hf", VOCABULARY) as source:
        assert source.get("llama.context_length") == WINDOW
        report = merge(source, None, tmp_path / "out.gguf", "F32")
    assert report.notes == [f"llama.cpp has no sliding window in llama: the context is limited to the window, {WINDOW} tokens"]
    assert_same(reference(model, WINDOW), served(tmp_path / "out.gguf", WINDOW))
    assert kld(reference(model), served(tmp_path / "out.gguf")) > FAR  # beyond it they differ


# --- mutants: each must be seen ---------------------------------------------------------------------------------------


def mutant(folder: Path, out: Path, fields: dict[str, Any], change: Callable[[str, Any], Any]) -> Path:
    """Export to F32 with other metadata (keys below the architecture) and tensors: `change(name, weights)`, None drops one."""
    with HfModel(folder, VOCABULARY) as source:
        weights = {name: change(name, source.weights(name).copy()) for name in source.tensors}
        if (head := change("output.weight", None)) is not None and "output.weight" not in weights:
            weights["output.weight"] = head
        weights = {name: values for name, values in weights.items() if values is not None}
        changed = {f"{source.architecture}.{key}": value for key, value in fields.items()}
        metadata = [encode_field(key, changed.get(key, source.get(key))) for key in source.keys]
    plan = [PlannedTensor(name, values.shape, QType.F32) for name, values in weights.items()]
    data = (np.ascontiguousarray(w, np.float32).reshape(-1, w.shape[-1]).view(np.uint8) for w in weights.values())
    write_gguf(out, metadata, plan, data)
    return out


def not_permuted(name: str, weights: Any) -> Any:
    n_heads = {"attn_q": N_HEAD, "attn_k": N_KV}.get(name.split(".")[-2], 0)
    return weights if weights is None else from_gguf_rows(weights, n_heads)


def fused_as_stored(name: str, weights: Any) -> Any:
    if ".attn_qkv." not in name:
        return weights
    parts = weights.reshape(3, N_HEAD, WIDTH // N_HEAD, -1)
    return parts.swapaxes(0, 1).reshape(weights.shape)


def dropped(part: str, instead: Callable[[Any], Any] = lambda _: None) -> Callable[[str, Any], Any]:
    def change(name: str, weights: Any) -> Any:
        return instead(weights) if name.startswith(part) and weights is not None else weights

    change.__name__ = f"without {part}"
    return change


def zero(part: str) -> Callable[[str, Any], Any]:
    return dropped(part, np.zeros_like)


def other_head(name: str, weights: Any) -> Any:
    drawn = np.random.default_rng(5).normal(0, STD, (N_VOCAB, WIDTH)).astype(np.float32)
    return drawn if name == "output.weight" else weights


def norms_from_zero(name: str, weights: Any) -> Any:
    return weights - 1 if name.endswith("norm.weight") else weights


def same(name: str, weights: Any) -> Any:
    return weights


RMS, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
MUTANTS: list[tuple[str, dict[str, Any], Callable[[str, Any], Any]]] = [
    *((family, {"rope.freq_base": 5e5 if family != "gemma3" else 1e4}, same) for family in FAMILIES),
    *((family, {RMS: 10 * EPS}, same) for family in ("llama", "mistral", "qwen2", "qwen3")),
    ("gemma3", {RMS: 10 * GEMMA3_EPS}, same),
    ("gpt_neox", {LAYER_NORM: 10 * EPS}, same),
    ("llama", {}, not_permuted),
    ("mistral", {}, not_permuted),
    ("gpt_neox", {}, fused_as_stored),
    ("gpt_neox", {"rope.dimension_count": WIDTH // N_HEAD}, same),
    ("gpt_neox", {"use_parallel_residual": False}, same),
    ("gpt_neox", {}, zero("blk.0.ffn_up.bias")),
    ("gpt_neox", {}, zero("blk.0.attn_qkv.bias")),
    *(("qwen2", {}, dropped(f"blk.0.attn_{x}.bias")) for x in "qkv"),
    *(("llama tied, with biases", {}, dropped(f"blk.0.{x}.bias")) for x in ("attn_q", "attn_k", "attn_output", "ffn_gate")),
    *((case, {}, other_head) for case in ("llama tied, with biases", "qwen2", "gemma3", "gpt_neox tied")),
    ("llama", {}, dropped("output.weight")),
    ("gemma3", {}, norms_from_zero),
    ("gemma3", {"attention.sliding_window": 2 * WINDOW}, same),
    ("gemma3", {"rope.freq_base_swa": 1e6}, same),
    ("gemma3 every second layer", {"attention.sliding_window_pattern": 6}, same),
    ("llama 3.1", {}, dropped("rope_freqs")),
    ("llama yarn", {"rope.scaling.original_context_length": CONTEXT}, same),
    ("llama yarn, attention factor", {"rope.scaling.attn_factor": 1.0}, same),
    ("qwen3 tied, linear", {"rope.scaling.factor": 1.0}, same),
]


@pytest.mark.parametrize(("case", "fields", "change"), MUTANTS, ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_mutant_is_seen(cases, case, fields, change, tmp_path):
    folder, wanted = cases(case)
    assert kld(wanted, served(mutant(folder, tmp_path / "mutant.gguf", fields, change))) > FAR


def test_what_makes_the_mutants_makes_no_mutant_on_its_own(cases, tmp_path):
    for case in ("llama", "gemma3", "gpt_neox"):
        folder, wanted = cases(case)
        assert_same(wanted, served(mutant(folder, tmp_path / "same.gguf", {}, same)))


# --- the file ---------------------------------------------------------------------------------------------------------


def stored_as(folder: Path, dtype: str) -> Path:
    """Store the weights of a folder in another float type."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    path = folder / "model.safetensors"
    save({name: tensor.to(getattr(torch, dtype)) for name, tensor in load(path).items()}, path)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_metadata_and_types_are_those_of_the_folder(dtype, folder, tmp_path):
    qtype = {"float32": QType.F32, "float16": QType.F16, "bfloat16": QType.BF16}[dtype]
    export(stored_as(folder, dtype), tmp_path / "keep.gguf", "keep")
    fields = GGUFReader(tmp_path / "keep.gguf").fields
    assert {key: fields[f"general.{key}"].contents() for key in ("architecture", "type", "name")} == {
        "architecture": "llama",
        "type": "model",
        "name": "mödel",
    }
    wanted = {"float32": LlamaFileType.ALL_F32, "float16": LlamaFileType.MOSTLY_F16, "bfloat16": LlamaFileType.MOSTLY_BF16}
    assert fields["general.file_type"].contents() == wanted[dtype] and "general.quantization_version" not in fields
    with GgufFile(tmp_path / "keep.gguf") as made:
        for info in made.tensors.values():
            assert info.qtype == (qtype if len(info.shape) > 1 else QType.F32), info.name
    export(folder, tmp_path / "q8.gguf", "Q8_0")
    with GgufFile(tmp_path / "q8.gguf") as made:
        assert made.get("general.file_type") == LlamaFileType.MOSTLY_Q8_0 and made.get("general.quantization_version") == 2
        assert made.tensors["token_embd.weight"].qtype == QType.Q8_0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "F16"])
def test_one_pass_gives_the_same_bytes_as_two(quant, dtype, folder, tmp_path):
    stored_as(folder, dtype)
    once = export(folder, tmp_path / "once.gguf", quant)
    with GgufFile(export(folder, tmp_path / "f32.gguf")) as between:
        merge(between, None, tmp_path / "twice.gguf", quant)
    assert once.read_bytes() == (tmp_path / "twice.gguf").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_threads_do_not_show(family, tmp_path):
    model = build(tmp_path / "one/model", family)
    model.save_pretrained(tmp_path / "many/model", max_shard_size="60KB")
    assert len(list((tmp_path / "many/model").glob("model-*.safetensors"))) > 2
    one = export(tmp_path / "one/model", tmp_path / "one.gguf", "Q8_0")
    with HfModel(tmp_path / "many/model", VOCABULARY) as source:
        merge(source, None, tmp_path / "many.gguf", "Q8_0", n_threads=3)
    assert one.read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_weights_on_a_grid_are_written_as_they_were(folder, tmp_path):
    first = export(folder, tmp_path / "first.gguf", "Q8_0")
    with GgufFile(first) as made:
        decoded = {name: made.weights(name) for name in made.tensors}
    names = {"attn_q": N_HEAD, "attn_k": N_KV}
    stored = load_file(folder / "model.safetensors")
    with HfModel(folder, VOCABULARY) as source:
        for name in source.tensors:
            weights = from_gguf_rows(decoded[name], names.get(name.split(".")[-2], 0))
            stored[source._sources[name].name] = np.ascontiguousarray(weights)
    save_file(stored, folder / "model.safetensors")
    assert export(folder, tmp_path / "second.gguf", "Q8_0").read_bytes() == first.read_bytes()


def test_quant_names_resolve_as_for_a_float_gguf(folder, tmp_path):
    export(folder, tmp_path / "f16.gguf", "F16")
    with HfModel(folder, VOCABULARY) as source, GgufFile(tmp_path / "f16.gguf") as gguf:
        for quant in ("int8", "int4", "keep", "q6_k"):
            assert resolve_quant(quant, source) == resolve_quant(quant, gguf)
    build(tmp_path / "wide", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    with HfModel(tmp_path / "wide", VOCABULARY) as source:
        assert resolve_quant("int4", source) == "Q4_K_M"


def test_rows_that_a_type_does_not_divide_are_told(folder, tmp_path):
    with HfModel(folder, VOCABULARY) as source:
        report = merge(source, None, tmp_path / "out.gguf", "Q4_K_M")
        assert merge(source, None, tmp_path / "q8.gguf", "Q8_0").notes == []
    assert sorted(report.notes) == [
        "Q4_K needs rows that are a multiple of 256: 6 tensors got Q5_0 instead",
        "Q6_K needs rows that are a multiple of 256: 3 tensors got Q8_0 instead",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_types_and_bytes_are_those_of_llama_cpp(family, tmp_path):
    build(tmp_path / "hf", family, hidden_size=256, intermediate_size=512, num_hidden_layers=9)
    half, theirs = export(tmp_path / "hf", tmp_path / "f16.gguf", "F16"), tmp_path / "theirs.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    assert llama_cpp.llama_model_quantize(str(half).encode(), str(theirs).encode(), options) == 0
    with GgufFile(half) as base:
        merge(base, None, tmp_path / "ours.gguf", "Q4_K_M")
    with GgufFile(tmp_path / "ours.gguf") as ours, GgufFile(theirs) as reference:
        assert {n: i.qtype.name for n, i in ours.tensors.items()} == {n: i.qtype.name for n, i in reference.tensors.items()}
        assert all(np.array_equal(ours.blocks(name), reference.blocks(name)) for name in ours.tensors)


def test_old_buffers_and_a_head_stored_twice_are_left_out(tmp_path):
    model = build(tmp_path / "hf", "gpt_neox", tie_word_embeddings=True)
    names = ("attention__bias", "attention__masked_bias", "attention__rotary_emb__inv_freq")
    drawn = (np.ones((1, 1, 8, 8), np.bool_), np.array(-1e9, np.float32), np.ones(4, np.float32))
    embedding = load_file(tmp_path / "hf/model.safetensors")["gpt_neox.embed_in.weight"]
    extra = {f"gpt_neox__layers__0__{name}": value for name, value in zip(names, drawn, strict=True)}
    edit_weights(tmp_path / "hf", embed_out__weight=embedding, **extra)
    assert_same(reference(model), served(export(tmp_path / "hf", tmp_path / "out.gguf")))


def test_the_settings_of_transformers_4_are_those_of_5(cases, tmp_path):
    """rope_theta and rope_scaling beside each other, rotary_pct, rope_local_base_freq, and no layer_types."""
    old = {
        "llama 3.1": {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        "llama yarn": {
            "rope_theta": 10000,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
        "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "layer_types": None, "sliding_window_pattern": 6},
        "gemma3 linear, soft cap, untied": {
            "rope_theta": 1000000,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    }
    for case, changed in old.items():
        source, _ = cases(case)
        shutil.copytree(source, tmp_path / case / "model")
        edit_config(tmp_path / case / "model", rope_parameters=None, **changed)
        before = export(source, tmp_path / "new.gguf").read_bytes()
        assert export(tmp_path / case / "model", tmp_path / "old.gguf").read_bytes() == before, case


# --- memory -----------------------------------------------------------------------------------------------------------


def test_neither_torch_nor_the_model_is_loaded(tmp_path):
    """190 MB of weights, 8 MB the largest: what a conversion adds to the process is far less than the model."""
    build(tmp_path / "hf", hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, vocab_size=64)
    weights = load_file(tmp_path / "hf/model.safetensors")
    layer = {name: w.astype(np.float16) for name, w in weights.items() if ".layers.0." in name}
    rest = {name: w for name, w in weights.items() if ".layers." not in name}
    n_layer = 6
    layers = {name.replace(".0.", f".{i}."): w.copy() for i in range(n_layer) for name, w in layer.items()}
    save_file(rest | layers, tmp_path / "hf/model.safetensors")
    edit_config(tmp_path / "hf", num_hidden_layers=n_layer)
    assert (tmp_path / "hf/model.safetensors").stat().st_size > 180e6
    code = """
import json, sys
from edgecl_convert import HfModel, merge
def peak():  # ru_maxrss would count what the parent had before exec
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
before = peak()
with HfModel(sys.argv[1], {"tokenizer.ggml.model": "none"}) as source:
    merge(source, None, sys.argv[2], "Q8_0", n_threads=2)
heavy = [name for name in ("torch", "transformers", "llama_cpp", "edgecl") if name in sys.modules]
print(json.dumps([peak() - before, heavy]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "hf"), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    added, heavy = json.loads(done.stdout)
    assert heavy == [] and added < 60e6


# --- the packaged model -----------------------------------------------------------------------------------------------


def test_the_packaged_model_comes_back_from_a_folder(tmp_path):
    """Q4_1 -> transformers' reader -> folder -> F32: the weights are what the blocks decode to, the settings the same."""
    gguf = find_model("smollm2")
    lab = Path(__file__).parent.parent / "examples/lab/gguf_to_hf.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, lab, gguf, tmp_path / "hf"], env=environment, check=True, capture_output=True)
    with GgufFile(gguf) as before, HfModel(tmp_path / "hf", VOCABULARY) as after:
        assert after.tensors.keys() == before.tensors.keys()
        for name in before.tensors:
            assert np.array_equal(after.weights(name), before.weights(name)), name
        for key in before.keys:
            if key.startswith("llama."):
                assert after.get(key) == pytest.approx(before.get(key), rel=1e-6), key


# --- the terminal, with the folder's own tokenizer --------------------------------------------------------------------


@pytest.fixture
def chat_folder(tmp_path) -> Path:
    """A folder with the tiny vocabulary of the other tests, as a tokenizer.json with a chat template."""
    import tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build(tmp_path / "chat", vocab_size=tiny.N_VOCAB, bos_token_id=tiny.START, eos_token_id=tiny.END)
    ids = {token: i for i, token in enumerate(tiny.TOKENS)}
    tokenizer = Tokenizer(models.BPE(ids, [tuple(pair.split()) for pair in tiny.MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = tiny.TEMPLATE
    fast.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def edgecl(*arguments: Any) -> tuple[int, str, str]:
    """Run the terminal app; return its exit code, stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", "from edgecl.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_convert_takes_a_folder(chat_folder, tmp_path):
    out = tmp_path / "out.gguf"
    code, text, error = edgecl("convert", chat_folder, out, "--quant", "int8", "--json")
    assert code == 0, error
    assert json.loads(text)["qtypes"] == {"Q8_0": 16, "F32": 5} and json.loads(text)["model_bytes"] == out.stat().st_size
    code, _, error = edgecl("convert", chat_folder, out, "--quant", "int4")
    assert code == 1 and "--force" in error and error.count("\n") == 1
    code, _, error = edgecl("convert", chat_folder, out, "--quant", "q4_k", "--force")
    assert code == 0 and "Q4_K needs rows that are a multiple of 256: 16 tensors got Q5_0 instead" in error
    (chat_folder / "model.safetensors").unlink()
    code, _, error = edgecl("convert", chat_folder, tmp_path / "new.gguf", "--quant", "int8")
    assert code == 1 and "has no model.safetensors" in error and error.count("\n") == 1


def test_what_a_folder_calls_its_tokens_prints_no_control_code(chat_folder, tmp_path):
    path = chat_folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    beyond = json.loads((chat_folder / "config.json").read_text())["vocab_size"]
    data["added_tokens"].append(data["added_tokens"][0] | {"id": beyond, "content": "\x1b[2J"})
    path.write_text(json.dumps(data), "utf-8")
    code, _, error = edgecl("convert", chat_folder, tmp_path / "out.gguf", "--quant", "F32", "--verify")
    assert code == 0 and "\x1b" not in error
    said = "\ufffd[2J and other added tokens beyond config.vocab_size are left out: the model has no row for them"
    assert error.splitlines() == [said, f"note: {said}"]


def test_init_keeps_its_own_conversion_of_a_folder(chat_folder, tmp_path):
    code, text, error = edgecl("--home", tmp_path / "home", "init", chat_folder, "--json")
    assert code == 0, error
    base = tmp_path / "home/base-F16.gguf"
    assert json.loads(text)["base"] == str(base)
    with GgufFile(base) as gguf:
        assert gguf.get("general.file_type") == LlamaFileType.MOSTLY_F16
    weights = load_file(chat_folder / "model.safetensors")["model.norm.weight"]
    edit_weights(chat_folder, model__norm__weight=weights * np.nan)
    before = base.read_bytes()
    code, _, error = edgecl("--home", tmp_path / "home", "init", chat_folder, "--force")
    assert code == 1 and "NaN" in error and base.read_bytes() == before
    assert edgecl("--home", tmp_path / "home", "status")[0] == 0  # the home that was there still is
