"""Adapters as PEFT folders and GGUF files: the same tensors both ways, real peft agrees, and nothing is dropped in silence."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_helpers import N_HEAD, N_HEAD_KV, N_VOCAB, lora, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file
from transformers import LlamaConfig, LlamaForCausalLM

from edgecl_convert import (
    Adapter,
    AdapterError,
    ConvertError,
    GgufError,
    GgufFile,
    UnsupportedError,
    read_adapter,
    read_gguf_adapter,
    write_gguf_adapter,
    write_peft_adapter,
)
from edgecl_convert.ggml import QType
from edgecl_convert.gguf_file import PlannedTensor, encode_field, write_gguf
from edgecl_convert.names import PROJECTIONS

WIDTH = 64
ALL = [f"blk.{layer}.{short}.weight" for layer in (0, 1) for short in PROJECTIONS]
Q, K = "blk.1.attn_q.weight", "blk.1.attn_k.weight"
PREFIX = "base_model.model.model.layers.1."
Q_MODULE = PREFIX + "self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Iterator[GgufFile]:
    with GgufFile(write_model(tmp_path / "base.gguf")) as model:
        yield model


@pytest.fixture
def folder(base: GgufFile, tmp_path: Path) -> Path:
    """A sound PEFT folder for two tensors of the base."""
    write_peft_adapter(tmp_path / "peft", lora(base, [Q, "blk.0.ffn_down.weight"]), base)
    return tmp_path / "peft"


def assert_same(adapter: Adapter, other: Adapter) -> None:
    assert replace(adapter, pairs={}) == replace(other, pairs={})
    np.testing.assert_equal(adapter.pairs, other.pairs)


def configure(folder: Path, **changed: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def retensor(folder: Path, changed: dict[str, np.ndarray[Any, Any] | None]) -> None:
    """Replace tensors of a PEFT folder, None removes one."""
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in (load_file(path) | changed).items() if value is not None}, path)


def refusal(path: Path, base: GgufFile, expected: str, error: type[ConvertError] = AdapterError) -> None:
    with pytest.raises(error, match=expected) as caught:
        read_adapter(path, base)
    assert "\n" not in str(caught.value)


# --- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf_and_peft_hold_the_same_adapter(architecture: str, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "base.gguf", architecture=architecture)) as base:
        adapter = lora(base, ALL)
        adapter.pairs |= lora(base, [K], r=7, seed=3).pairs  # a rank of its own
        adapter.base_sha256 = "0123abcd"
        assert write_gguf_adapter(tmp_path / "a.gguf", adapter) == (tmp_path / "a.gguf").stat().st_size
        first = read_adapter(tmp_path / "a.gguf", base)
        write_peft_adapter(tmp_path / "peft", first, base)
        second = read_adapter(tmp_path / "peft", base)
        write_gguf_adapter(tmp_path / "b.gguf", second)
        for other in (first, second, read_gguf_adapter(tmp_path / "b.gguf")):
            assert_same(adapter, other)
        assert second.scaling(Q) == 8 / 4 and second.scaling(K) == 8 / 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_of_peft_may_be_of_any_float_type_of_weights(dtype: torch.dtype, folder: Path, base: GgufFile) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: torch.from_numpy(value).to(dtype) for key, value in load_file(path).items()}
    torch_save_file(tensors, path)
    adapter = read_adapter(folder, base)
    a = tensors[f"{PREFIX.replace('layers.1', 'layers.0')}mlp.down_proj.lora_A.weight"]
    np.testing.assert_array_equal(adapter.pairs["blk.0.ffn_down.weight"][0], a.float().numpy())
    torch_save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, path)
    refusal(folder, base, "is of F8_E4M3; factors are of F32, F16, BF16")


def test_q_and_k_rows_are_interleaved_for_llama_alone(tmp_path: Path) -> None:
    """Row i of the first rotary half of a head is row 2 i of the head in GGUF, row i of the second half is row 2 i + 1."""
    half = WIDTH // N_HEAD // 2
    for architecture, names in (("llama", {Q, K}), ("qwen2", set())):
        with GgufFile(write_model(tmp_path / "base.gguf", architecture=architecture)) as base:
            adapter = lora(base, ALL)
            write_peft_adapter(tmp_path / "peft", adapter, base)
        written = load_file(tmp_path / "peft/adapter_model.safetensors")
        for short, module in PROJECTIONS.items():
            name = f"blk.1.{short}.weight"
            expected = adapter.pairs[name][1]
            if name in names:
                heads = expected.reshape({Q: N_HEAD, K: N_HEAD_KV}[name], 2 * half, -1)
                expected = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(expected.shape)
                assert not np.array_equal(expected, adapter.pairs[name][1])
            np.testing.assert_array_equal(written[f"{PREFIX}{module}.lora_B.weight"], expected)
            np.testing.assert_array_equal(written[f"{PREFIX}{module}.lora_A.weight"], adapter.pairs[name][0])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": N_HEAD, "num_key_value_heads": N_HEAD_KV}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "vocab_size": N_VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def test_what_peft_saves_is_read_and_what_is_written_loads_with_peft(base: GgufFile, tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, rank_pattern={"k_proj": 2}, task_type="CAUSAL_LM")
    trained = get_peft_model(tiny_llama(), config)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    trained.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", base)
    assert len(adapter.pairs) == 10
    assert adapter.scaling(Q) == 12 / 4 and adapter.scaling(K) == 12 / 2

    write_gguf_adapter(tmp_path / "a.gguf", adapter)
    write_peft_adapter(tmp_path / "ours", read_adapter(tmp_path / "a.gguf", base), base)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(loaded), logits(trained.eval()), rtol=0, atol=0)
    assert (logits(loaded) - logits(tiny_llama())).abs().max() > 0.01


# --- what GGUF cannot express -----------------------------------------------------------------------------------------

INEXPRESSIBLE = {
    "use_rslora": True,
    "use_dora": True,
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "trainable_token_indices": [3],
    "init_lora_weights": "pissa_niter_4",
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"r": 1},
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_a_field_that_gguf_cannot_express_is_refused_by_name(name: str, folder: Path, base: GgufFile) -> None:
    assert name in LoraConfig.__dataclass_fields__
    configure(folder, **{name: INEXPRESSIBLE[name]})
    refusal(folder, base, f"{name}=.* cannot be expressed in GGUF LoRA")


def test_the_defaults_of_peft_are_expressible(folder: Path, base: GgufFile) -> None:
    configure(folder, **{name: getattr(LoraConfig(), name) for name in INEXPRESSIBLE})
    assert len(read_adapter(folder, base).pairs) == 2


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head", "model.layers.0.self_attn", "model.layers.x.mlp.up_proj"])
def test_a_module_outside_the_seven_projections_is_refused(module: str, folder: Path, base: GgufFile) -> None:
    a = np.ones((4, WIDTH), np.float32)
    retensor(folder, {f"base_model.model.{module}.lora_{half}.weight": a for half in "AB"})
    refusal(folder, base, f"trains {module}, which")


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_B.bias", "modules_to_save.weight", "lora_embedding_A"])
def test_a_tensor_that_is_not_part_of_a_pair_is_refused(key: str, folder: Path, base: GgufFile) -> None:
    retensor(folder, {f"{Q_MODULE}.{key}": np.ones(4, np.float32)})
    refusal(folder, base, f"holds {Q_MODULE}.{key}, which is not a lora_A or lora_B weight")


# --- adapters that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "expected"), [("A", "lora_B without its lora_A"), ("B", "lora_A but no lora_B")])
def test_half_a_pair_is_refused(half: str, expected: str, folder: Path, base: GgufFile) -> None:
    retensor(folder, {f"{Q_MODULE}.lora_{half}.weight": None})
    refusal(folder, base, expected)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, WIDTH), (2 * WIDTH, 4)),  # another output width, whole heads
        ((4, WIDTH), (WIDTH + 1, 4)),  # not even whole heads
        ((4, WIDTH), (WIDTH, 5)),  # ranks that differ
        ((4, 32), (WIDTH, 4)),  # another input width
        ((4, WIDTH), (WIDTH,)),
        ((4, WIDTH), ()),
        ((WIDTH,), (WIDTH, 4)),
        ((0, WIDTH), (WIDTH, 0)),
    ],
)
def test_wrong_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...], folder: Path, base: GgufFile) -> None:
    changed = {"A": np.ones(a, np.float32), "B": np.ones(b, np.float32)}
    retensor(folder, {f"{Q_MODULE}.lora_{half}.weight": tensor for half, tensor in changed.items()})
    refusal(folder, base, "use its own base")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_values_that_are_not_finite_are_refused(half: int, value: float, base: GgufFile, tmp_path: Path) -> None:
    adapter = lora(base, [Q])
    adapter.pairs[Q][half][1, 2] = value
    write_gguf_adapter(tmp_path / "a.gguf", adapter)
    refusal(tmp_path / "a.gguf", base, f"{Q} has NaN or infinite")


def test_an_adapter_of_another_model_is_refused(base: GgufFile, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "qwen2.gguf", architecture="qwen2")) as other:
        write_gguf_adapter(tmp_path / "a.gguf", lora(other, [Q]))
    refusal(tmp_path / "a.gguf", base, "for architecture qwen2, .* is llama")
    with GgufFile(write_model(tmp_path / "deeper.gguf", n_layer=3)) as deeper:
        write_gguf_adapter(tmp_path / "b.gguf", lora(deeper, ["blk.2.attn_q.weight"]))
    refusal(tmp_path / "b.gguf", base, r"changes blk\.2\.attn_q\.weight, which .* does not have")


def test_a_base_of_an_unknown_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "gpt2.gguf", architecture="gpt2")) as other:
        refusal(folder, other, "architecture gpt2 is not supported; allowed: llama", UnsupportedError)


def test_the_hash_of_the_base_is_checked_where_the_adapter_has_one(base: GgufFile, folder: Path, tmp_path: Path) -> None:
    read_adapter(folder, base).check_hash("anything")
    adapter = lora(base, [Q])
    adapter.base_sha256 = "a" * 64
    write_gguf_adapter(tmp_path / "a.gguf", adapter)
    write_peft_adapter(tmp_path / "hashed", adapter, base)
    for path in (tmp_path / "a.gguf", tmp_path / "hashed"):
        read_adapter(path, base).check_hash("a" * 64)
        with pytest.raises(AdapterError, match="sha256 aaaaaaaaaaaa, got one with bbbbbbbbbbbb; use its own base"):
            read_adapter(path, base).check_hash("b" * 64)


ADAPTER = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}


def write_pairs(path: Path, fields: dict[str, Any], names: tuple[str, ...] = (f"{Q}.lora_a", f"{Q}.lora_b")) -> Path:
    shapes = {"a": (4, WIDTH), "b": (WIDTH, 4)}
    plan = [PlannedTensor(name, shapes.get(name[-1], (4, 4)), QType.F32) for name in names]
    data = (np.zeros((1, tensor.n_bytes), np.uint8) for tensor in plan)
    write_gguf(path, [encode_field(key, value) for key, value in fields.items()], plan, data)
    return path


@pytest.mark.parametrize("alpha", [0.0, -8.0, "8", float("inf"), float("nan")])
def test_a_scaling_that_is_no_number_above_0_is_refused(alpha: Any, folder: Path, base: GgufFile, tmp_path: Path) -> None:
    configure(folder, lora_alpha=alpha)
    refusal(folder, base, "lora_alpha must be a .*number above 0")
    refusal(write_pairs(tmp_path / "a.gguf", ADAPTER | {"adapter.lora.alpha": alpha}), base, "alpha must be a .*number")


@pytest.mark.parametrize("content", ["", "{", "[1]", "[]", "null", '{"peft_type": "IA3"}', "\xff"])
def test_a_config_that_is_not_one_of_lora_is_refused(content: str, folder: Path, base: GgufFile) -> None:
    (folder / "adapter_config.json").write_bytes(content.encode("latin-1"))
    refusal(folder, base, "is not JSON|peft_type must be LORA, got")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_the_folder_that_is_missing_or_garbage_is_refused(name: str, folder: Path, base: GgufFile) -> None:
    (folder / name).write_bytes(b"\xff" * 40)
    refusal(folder, base, name)
    (folder / name).unlink()
    refusal(folder, base, f"{name}: cannot be read")


def test_a_path_that_is_missing_or_no_adapter_is_refused(base: GgufFile, tmp_path: Path) -> None:
    refusal(tmp_path / "no", base, "no such adapter; give a GGUF LoRA file or a PEFT folder")
    refusal(base.path, base, "is a GGUF model, not a LoRA adapter")
    (tmp_path / "a.gguf").write_bytes(b"PK" * 40)
    refusal(tmp_path / "a.gguf", base, "is not a GGUF file", GgufError)


def test_a_gguf_that_is_not_all_pairs_is_refused(base: GgufFile, tmp_path: Path) -> None:
    path, fields = tmp_path / "a.gguf", dict(ADAPTER)
    assert len(read_adapter(write_pairs(path, fields), base).pairs) == 1
    refusal(write_pairs(path, fields, (f"{Q}.lora_a",)), base, f"{Q} has a lora_a but no lora_b")
    for names in ((f"{Q}.lora_b",), (f"{Q}.lora_a", f"{Q}.lora_b", "token_embd.weight"), ()):
        refusal(write_pairs(path, fields, names), base, "has no lora_a/lora_b pairs, or tensors other than those")
    refusal(write_pairs(path, fields | {"adapter.type": "alora"}), base, "not a LoRA adapter")
    activated = fields | {"adapter.alora.invocation_tokens": [1, 2]}
    refusal(write_pairs(path, activated), base, r"alora_invocation_tokens=\[1, 2\] cannot be expressed in GGUF LoRA")
    fields.pop("adapter.lora.alpha")
    refusal(write_pairs(path, fields), base, r"lacks the field adapter\.lora\.alpha", GgufError)
