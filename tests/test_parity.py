"""What is trained is what is served: torch's logits are llama.cpp's, with and without an adapter, and mutants are seen.

A check that cannot fail proves nothing, so every way in which a converter usually goes wrong is built here on purpose and
must miss the bound by orders of magnitude.
"""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, build, random_adapter, random_tokens, with_b_in_torch_order
from transformers import PreTrainedModel

from edgecl.engine import GGML_TYPE_F32, Engine
from edgecl.train.decoder import Decoder
from edgecl.train.forward import hidden_states
from edgecl.train.lora import Lora
from edgecl.train.weights import Placement
from edgecl_convert import (
    Adapter,
    AdapterError,
    GgufError,
    GgufFile,
    UnsupportedError,
    merge,
    read_peft_adapter,
    write_gguf_adapter,
    write_peft_adapter,
)

MAX_KLD, MIN_TOP1 = 1e-5, 0.995
CPU32 = Placement(torch.device("cpu"), torch.float32)
FAR = 1000 * MAX_KLD  # what a mutant must exceed
IDS = random_tokens(200, seed=1)  # many times gemma3's window
Logits = torch.Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function architecture -> (GGUF path, torch model), each built once."""
    folder = tmp_path_factory.mktemp("parity")
    return cache(lambda architecture: build(folder / f"{architecture}.gguf", architecture))


def served(path: Path, adapter: Adapter | None = None) -> Logits:
    """Return llama.cpp's logits (T, V)."""
    file = None
    if adapter is not None:
        file = path.with_suffix(".adapter.gguf")
        write_gguf_adapter(file, adapter)
    with Engine(path, file, n_ctx=512, n_threads=1, kv_type=GGML_TYPE_F32) as engine:
        return torch.from_numpy(engine.logits(IDS)).double()


def trained(path: Path, adapter: Adapter | None = None) -> Logits:
    """Return the logits (T, V) of the model as training has it, warm-started from the adapter."""
    with GgufFile(path) as base:
        decoder = Decoder(base, CPU32)
        lora = None
        if adapter is not None:
            lora = Lora(base, decoder.shape, len(next(iter(adapter.pairs.values()))[0]), 32.0, 9, CPU32)
            lora.warm_start(adapter)
        return logits(decoder, lora)


@torch.no_grad()
def logits(decoder: Decoder, lora: Lora | None) -> Logits:
    hidden = hidden_states(decoder, lora, [IDS], [(0, t) for t in range(len(IDS))])
    return torch.cat([hidden @ rows.T for _, rows in decoder.weights.head()], -1).double()


@torch.no_grad()
def reference(model: PreTrainedModel) -> Logits:
    """Return the logits (T, V) of transformers' own decoder."""
    return model(torch.tensor([IDS])).logits[0].double()


def kld(wanted: Logits, got: Logits) -> float:
    """Return the mean over tokens of KL(wanted, got), in nats."""
    p, q = torch.log_softmax(wanted, -1), torch.log_softmax(got, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def top1(wanted: Logits, got: Logits) -> float:
    return float((wanted.argmax(-1) == got.argmax(-1)).double().mean())


def assert_same(wanted: Logits, got: Logits) -> None:
    assert kld(wanted, got) < MAX_KLD
    assert top1(wanted, got) >= MIN_TOP1


def adapter_of(path: Path, **options: float) -> Adapter:
    with GgufFile(path) as base:
        return random_adapter(base, **options)


# --- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_logits_are_those_of_transformers_own_attention_and_of_llama_cpp(models, architecture):
    path, written = models(architecture)
    assert_same(reference(written), trained(path))
    assert_same(reference(written), served(path))


def test_k_quant_base_of_256_wide_rows_is_decoded_as_llama_cpp_decodes_it(tmp_path):
    path, _ = build(tmp_path / "wide.gguf", width=256)
    with GgufFile(path) as base:
        merge(base, None, tmp_path / "q6.gguf", "Q6_K")
        merge(base, None, tmp_path / "f32.gguf", "F32")
    with GgufFile(tmp_path / "q6.gguf") as base:
        merge(base, None, tmp_path / "decoded.gguf", "F32")
    # llama.cpp multiplies a Q6_K file with 8-bit activations, so the decoded file is compared
    assert_same(served(tmp_path / "decoded.gguf"), trained(tmp_path / "q6.gguf"))
    assert kld(served(tmp_path / "f32.gguf"), trained(tmp_path / "q6.gguf")) > MAX_KLD


def test_f16_base_is_read(tmp_path):
    path, _ = build(tmp_path / "half.gguf", qtype=gguf.GGMLQuantizationType.F16)
    assert kld(served(path), trained(path)) < 1e-4  # llama.cpp rounds activations to F16 here


# --- base + adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_gives_the_same_logits_in_torch_and_in_llama_cpp(models, architecture):
    path, _ = models(architecture)
    adapter = adapter_of(path)
    torch_logits = trained(path, adapter)
    assert_same(served(path, adapter), torch_logits)
    assert kld(torch_logits, trained(path)) > 0.1  # no adapter: visibly another model
    assert kld(torch_logits, served(path)) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_in_f32_equals_the_adapter_beside_the_base(models, architecture, tmp_path):
    path, _ = models(architecture)
    adapter = adapter_of(path)
    with GgufFile(path) as base:
        report = merge(base, adapter, tmp_path / "merged.gguf", "keep")
    assert set(report.rounded) == {"float"}
    assert_same(served(path, adapter), served(tmp_path / "merged.gguf"))
    assert_same(served(tmp_path / "merged.gguf"), trained(tmp_path / "merged.gguf"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_survives_the_way_through_torch_and_through_peft(models, architecture, tmp_path):
    path, _ = models(architecture)
    adapter = adapter_of(path)
    with GgufFile(path) as base:
        lora = Lora(base, Decoder(base, CPU32).shape, 4, adapter.lora_alpha, 9, CPU32)
        lora.warm_start(adapter)
        write_peft_adapter(tmp_path / "peft", adapter, base)
        for other in (lora.adapter(), read_peft_adapter(tmp_path / "peft", base)):
            assert other.lora_alpha == adapter.lora_alpha and other.pairs.keys() == adapter.pairs.keys()
            for name, pair in adapter.pairs.items():
                assert all(np.array_equal(x, y) for x, y in zip(pair, other.pairs[name], strict=True)), name


def test_peft_loads_the_written_folder_and_computes_the_same(models, tmp_path):
    from peft import PeftModel

    path, written = models("llama")
    adapter = adapter_of(path)
    with GgufFile(path) as base:
        write_peft_adapter(tmp_path / "peft", adapter, base)
    peft = PeftModel.from_pretrained(deepcopy(written), str(tmp_path / "peft"))
    assert_same(served(path, adapter), reference(peft.get_base_model()))


def test_warm_start_takes_a_smaller_rank_and_refuses_a_larger_one(models):
    path, _ = models("llama")
    small = adapter_of(path, r=2)
    with GgufFile(path) as base:
        decoder = Decoder(base, CPU32)
        lora = Lora(base, decoder.shape, 4, 8.0, 9, CPU32)
        lora.warm_start(small)
        with pytest.raises(AdapterError, match=r"r 4.*train\.r is 2.*at least 4"):
            Lora(base, decoder.shape, 2, 8.0, 9, CPU32).warm_start(adapter_of(path, r=4))
        assert_same(served(path, small), logits(decoder, lora))


# --- mutants: each must be seen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mutant_alpha_twice_as_large_is_seen(models, architecture):
    path, _ = models(architecture)
    adapter = adapter_of(path)
    assert kld(served(path, replace(adapter, lora_alpha=2 * adapter.lora_alpha)), trained(path, adapter)) > FAR


def test_mutant_lora_b_of_q_and_k_not_permuted_is_seen(models):
    path, _ = models("llama")
    adapter = adapter_of(path)
    with GgufFile(path) as base:
        mutant = with_b_in_torch_order(adapter, base)
    assert kld(served(path, mutant), trained(path, adapter)) > FAR


def test_mutant_base_q_and_k_not_permuted_is_seen(tmp_path):
    path, written = build(tmp_path / "mutant.gguf", permute=False)
    assert kld(reference(written), served(path)) > FAR
    assert kld(reference(written), trained(path)) > FAR


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mutant_rotary_base_is_seen(models, architecture, tmp_path):
    path, _ = models(architecture)
    mutant, _ = build(tmp_path / "mutant.gguf", architecture, theta_in_file=1e6)
    assert kld(served(mutant), trained(path)) > FAR
    assert_same(served(mutant), trained(mutant))  # but a file's own base is followed


# --- fields that change what llama.cpp computes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope.freq_base_swa", 5e5), ("attention.sliding_window_pattern", 3), ("attention.sliding_window", 5)],
)
def test_gemma3_fields_are_followed(models, tmp_path, field, value):
    plain, _ = models("gemma3")
    options = {"window": value} if field.endswith("sliding_window") else {"fields": {field: value}}
    path, _ = build(tmp_path / "other.gguf", "gemma3", **options)
    assert_same(served(path), trained(path))
    assert kld(served(path), trained(plain)) > FAR


def test_gemma3_of_62_layers_scales_its_scores_as_llama_cpp_does(tmp_path):
    path, _ = build(tmp_path / "deep.gguf", "gemma3", n_layer=62)
    assert_same(served(path), trained(path))


def test_llama_3_1_rotary_factors_are_followed(models, tmp_path):
    plain, _ = models("llama")
    path, _ = build(tmp_path / "factors.gguf", rope_factors=tuple(np.linspace(1, 8, 8)))
    assert_same(served(path), trained(path))
    assert kld(served(path), trained(plain)) > FAR


def test_gemma3_without_window_is_refused(tmp_path):
    path, _ = build(tmp_path / "bare.gguf", "gemma3", window=0)
    with GgufFile(path) as base, pytest.raises(GgufError, match="sliding_window"):
        Decoder(base, CPU32)


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("llama", "rope.scaling.type", "linear"),
        ("llama", "rope.scaling.factor", 4.0),
        ("qwen2", "rope.scale_linear", 4.0),
        ("qwen3", "rope.scaling.attn_factor", 2.0),
        ("gemma3", "final_logit_softcapping", 3.0),
    ],
)
def test_what_is_not_carried_over_is_refused(tmp_path, architecture, field, value):
    path, _ = build(tmp_path / "other.gguf", architecture, fields={field: value})
    with GgufFile(path) as base, pytest.raises(UnsupportedError, match=field.replace(".", r"\.")):
        Decoder(base, CPU32)
