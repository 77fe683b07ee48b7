"""A Hugging Face folder that cannot become the same model is refused in one line, and nothing is left behind."""

import re
from pathlib import Path

import numpy as np
import pytest
from gguf_helpers import child_with_small_files
from hf_models import FULL, LLAMA3, SLIDING, VOCABULARY, YARN, build, edit_config, edit_weights, export
from safetensors.numpy import load_file

from edgecl_convert import ConvertError, HfModel, UnsupportedError, open_source

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal(folder: Path, quant: str = "Q8_0") -> str:
    """Return why a folder is not converted: one line, and nothing is left behind."""
    out = folder.parent / "out"
    out.mkdir()
    with pytest.raises(ConvertError) as caught:
        export(folder, out / "out.gguf", quant)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and not list(out.iterdir())
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"model_type": "mixtral"},
            "must be one of llama, mistral, qwen2, qwen3, gemma3_text, gpt_neox; got .mixtral.",
        ),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map .*never done"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already; take the original"),
        ({"hidden_size": 32}, r"embed_tokens.weight must be \(96, 32\), got \(96, 64\)"),
        ({"hidden_size": None}, "hidden_size must be a whole number above 0, got null"),
        ({"hidden_size": "64"}, 'hidden_size must be a whole number above 0, got "64"'),
        ({"num_attention_heads": True}, "num_attention_heads must be a whole number"),
        ({"num_key_value_heads": 3}, "4 attention heads of 16 cannot share 3 key heads"),
        ({"num_key_value_heads": 4}, r"self_attn.k_proj.weight must be \(64, 64\), got \(32, 64\)"),
        ({"head_dim": 15}, "a head's size even"),
        ({"num_hidden_layers": 2}, "the weights lack model.layers.1.input_layernorm.weight.* and 6 more"),
        ({"num_hidden_layers": 2**30}, "the config has 1073741824 layers, the weights have 12 tensors"),
        ({"vocab_size": 97}, r"embed_tokens.weight must be \(97, 64\)"),
        ({"attention_bias": True}, "the weights lack model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight differs"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number above 0, got -1e-05"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number above 0, got Infinity"),
        ({"rms_norm_eps": 1e-50}, "rms_norm_eps must be a number above 0, got 1e-50; allowed: 1.2e-38 to 3.4e38"),
        ({"rope_parameters": {"rope_theta": 1e39}}, r"rotary rope_theta must be a number above 0, got 1e\+39; allowed"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rotary rope_theta must be a number above 0, got 10{59}; allowed"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported: allowed: silu'),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rotary scaling .dynamic. .*allowed: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rotary factor must be a number above 0, got null"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
        ({"rope_parameters": YARN | {"beta_fast": 64}}, "yarn's beta_fast must be 32"),
        ({"rope_parameters": YARN | {"truncate": False}}, "yarn's truncate must be True"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1 in llama, got 0.5"),
        ({"rope_parameters": [1]}, "must be JSON objects"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a whole number above 0, got 0"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(folder, changed, reason):
    edit_config(folder, **changed)
    assert re.search(reason, refusal(folder))


@pytest.mark.parametrize(
    ("family", "changed", "reason"),
    [
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary scaling .llama3."),
        ("qwen3", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("gemma3", {"query_pre_attn_scalar": 256}, "llama.cpp scales by 24"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3", {"layer_types": [FULL, SLIDING] * 3}, "every n-th layer"),
        ("gemma3", {"layer_types": [FULL]}, "6 entries are needed"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias = false"),
        ("gpt_neox", {"hidden_act": "relu"}, "allowed: gelu, gelu_pytorch_tanh"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.33}}, "5 of 16 dimensions rotate"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(family, changed, reason, tmp_path):
    build(tmp_path / "hf", family)
    edit_config(tmp_path / "hf", **changed)
    with pytest.raises(ConvertError, match=reason) as caught:
        HfModel(tmp_path / "hf", VOCABULARY)
    assert isinstance(caught.value, UnsupportedError) or "rotate" in reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model__norm__weight": None}, "the weights lack model.norm.weight"),
        ({"model__layers__0__mlp__experts__weight": np.ones(3, np.float32)}, "no place for model.layers.0.mlp.experts.weight"),
        ({"score__weight": np.ones((2, 64), np.float32)}, "the model has no place for score.weight"),
        ({"model__norm__weight": np.ones(64, np.int64)}, "tensor model.norm.weight has the dtype I64; allowed: F32, F16, BF16"),
    ],
)
def test_weights_that_contradict_the_config_are_named(folder, changed, reason):
    edit_weights(folder, **changed)
    assert reason in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", ["keep", "F16", "Q8_0"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weights_that_are_not_finite_are_named(folder, name, quant, value):
    weights = load_file(folder / "model.safetensors")[name].copy()
    weights.flat[7] = value
    edit_weights(folder, **{name.replace(".", "__"): weights})
    gguf_name = "output_norm.weight" if "norm" in name else "blk.0.attn_q.weight"
    assert f"tensor {gguf_name} has NaN or infinite weights" in refusal(folder, quant)


def test_weights_beyond_f16_are_named_and_fit_into_bf16(folder, tmp_path):
    large = load_file(folder / "model.safetensors")["lm_head.weight"] * np.float32(1e6)
    edit_weights(folder, lm_head__weight=large)
    assert "tensor output.weight has weights beyond the range of F16; give BF16 or F32" in refusal(folder, "F16")
    assert export(folder, tmp_path / "out.gguf", "BF16").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "\ud800"', "[" * 100_000])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text, "utf-8", "surrogatepass")
    assert "config.json" in refusal(folder)


def test_folders_without_what_is_needed_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match=r"config.json: cannot be read: No such file.*give a Hugging Face model folder"):
        open_source(tmp_path / "empty")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "refused: only safetensors are read, got pytorch_model.bin" in refusal(folder)


def test_no_file_of_the_folder_is_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    for out in (folder, folder / "model.safetensors", folder / ".." / folder.name / "config.json"):
        with pytest.raises(ConvertError, match="is the base itself, or a file of it"):
            export(folder, out)
    assert (folder / "model.safetensors").read_bytes() == before
    assert export(folder, folder / "model.gguf").exists()


def test_a_full_disk_leaves_nothing(folder):
    code = """
from edgecl_convert import ConvertError, HfModel, merge
try:
    merge(HfModel(sys.argv[1], {"tokenizer.ggml.model": "none"}), None, sys.argv[2], "q8_0")
except ConvertError as error:
    print(error)
"""
    out = folder.parent / "out.gguf"
    done = child_with_small_files(code, 20_000, folder, out)
    assert done.stdout == f"{out}: cannot be written: File too large\n", done.stderr
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
