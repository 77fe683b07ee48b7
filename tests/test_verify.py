"""Verification accepts what is right and names what is wrong: token ids, then logits, each with mutants that must fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import hf_models
import pytest
import tiny
from tiny_tokenizers import add_fields, added, byte_level, gemma, metaspace, save, sentencepiece_bpe, write_vocab

from edgecl_convert import TORTURE, ConvertError, GgufError, GgufFile, merge, open_source, read_vocabulary, verify
from edgecl_convert.ggml import QType
from edgecl_convert.verify import bounds_of

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
Built = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a function architecture -> (Hugging Face folder, GGUF file of the same model); the rest makes the file wrong."""
    root = tmp_path_factory.mktemp("verify")
    folders: dict[str, Path] = {}

    def build(architecture: str, changed: dict[str, Any] | None = None, **wrong: Any) -> tuple[Path, Path]:
        shape = tiny.Tiny(architecture)
        model = tiny.torch_model(shape)
        if architecture not in folders:
            folders[architecture] = hf_folder(root / architecture, model)
        folder = folders[architecture]
        fields = read_vocabulary(folder).fields
        path = tiny.write_model(
            root / f"{architecture}-{len(list(root.iterdir()))}.gguf",
            model,
            replace(shape, **wrong),
            lambda writer: add_fields(writer, fields, **(changed or {})),
        )
        return folder, path

    return build


def hf_folder(folder: Path, model: Any) -> Path:
    """Save a model, with the tiny vocabulary as a tokenizer.json."""
    vocab = {text: i for i, text in enumerate(tiny.TOKENS)}
    data = {
        "version": "1.0",
        "added_tokens": [added(tiny.START, "<|im_start|>"), added(tiny.END, "<|im_end|>")],
        "pre_tokenizer": GPT2,
        "model": {"type": "BPE", "vocab": vocab, "merges": tiny.MERGES},
    }
    save(folder, data, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True})
    model.save_pretrained(folder)
    return folder


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_same_model_is_verified(built: Built, architecture: str) -> None:
    report = verify(*built(architecture), n_threads=1)
    assert report.ok, report.failure
    assert (report.texts, report.texts_limited, report.texts_wrong) == (len(TORTURE) + 1, 0, 0)
    assert report.kld_nats is not None and report.kld_nats < 1e-6 and report.top1 == 1.0 and report.n_tokens == 256
    assert (report.worst_type, report.max_kld_nats, report.min_top1) == ("F32", 1e-5, 0.995)
    assert json.loads(json.dumps(asdict(report))) == asdict(report)


def test_a_gguf_is_verified_against_a_gguf(built: Built, tmp_path: Path) -> None:
    _, path = built("llama")
    with GgufFile(path) as source:
        merge(source, None, tmp_path / "q8.gguf", "Q8_0")
    report = verify(path, tmp_path / "q8.gguf", n_threads=1)
    assert report.ok, report.failure
    assert report.worst_type == "Q8_0" and report.kld_nats is not None and report.kld_nats > 1e-6
    back = verify(tmp_path / "q8.gguf", path, n_threads=1)  # a source that rounds is not held against its float copy
    assert back.ok and back.worst_type == "Q8_0"


def neox() -> dict[str, Any]:
    """As Pythia's: composed first, runs of spaces as added tokens."""
    data = byte_level(GPT2) | {"normalizer": {"type": "NFC"}}
    n = len(data["model"]["vocab"]) + len(data["added_tokens"])
    runs = [added(n + i, " " * (24 - i), special=False, normalized=True) for i in range(22)]
    return data | {"added_tokens": data["added_tokens"] + runs}


@pytest.mark.parametrize(
    ("family", "data"),
    [
        ("llama", sentencepiece_bpe()),
        ("mistral", sentencepiece_bpe(None, metaspace("first"))),
        ("qwen3", byte_level(GPT2)),
        ("gemma3", gemma()),
        ("gpt_neox", neox()),
    ],
)
def test_a_folder_is_converted_and_verified_with_its_own_tokenizer(family: str, data: dict[str, Any], tmp_path: Path) -> None:
    folder, path = tmp_path / "hf", tmp_path / "out.gguf"
    n_used = max([*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])]) + 1
    hf_models.build(folder, family, vocab_size=n_used + 10)
    config = json.loads((folder / "config.json").read_text())
    save(folder, data, **config)
    with open_source(folder) as source:
        merge(source, None, path, "F32")
    report = verify(folder, path, n_threads=1)
    assert report.ok, report.failure
    assert report.kld_nats is not None and report.texts_wrong == 0 and bool(report.texts_limited) <= bool(report.limits)
    first = data["added_tokens"].pop(0)["content"]
    save(folder, data, **config)
    assert verify(folder, path, [f"x{first}y"], n_tokens=0).text == f"x{first}y"


def test_other_texts_can_be_given_and_logits_left_out(built: Built, tmp_path: Path) -> None:
    folder, path = built("llama")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    rows = (json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    report = verify(folder, path, rows, n_tokens=0)
    assert report.ok and report.texts == 6 and report.kld_nats is None


# --- mutants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "wrong"),
    [
        ("llama", {"permute": False}),
        ("llama", {"theta_in_file": 1e6}),
        ("qwen2", {"theta_in_file": 1e6}),
        ("gemma3", {"window": 5}),
        ("qwen3", {"fields": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}}),
    ],
)
def test_mutants_of_the_weights_are_seen(built: Built, architecture: str, wrong: dict[str, Any]) -> None:
    report = verify(*built(architecture, **wrong), n_threads=1)
    assert not report.ok and report.texts_wrong == 0 and report.text == ""
    assert report.kld_nats is not None and report.kld_nats > 1000 * report.max_kld_nats
    assert report.failure.startswith("logits differ: KLD") and "with F32 at most 1e-05 nats" in report.failure


def test_a_mutant_is_seen_behind_four_bits(built: Built, tmp_path: Path) -> None:
    folder, path = built("llama", permute=False)
    with GgufFile(path) as source:
        merge(source, None, tmp_path / "q4.gguf", "Q4_0")
    report = verify(folder, tmp_path / "q4.gguf", n_threads=1)
    assert not report.ok and report.worst_type == "Q4_0"


def types_with(index: int, kind: gguf.TokenType) -> list[int]:
    types = [int(gguf.TokenType.NORMAL)] * (tiny.N_VOCAB - 2) + [int(gguf.TokenType.CONTROL)] * 2
    types[index] = int(kind)
    return types


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"merges": tiny.MERGES[:2]}, "lighthouse"),
        ({"token_type": types_with(tiny.START, gguf.TokenType.NORMAL)}, "<|im_start|>"),
        ({"tokens": [*tiny.TOKENS[:-2], "[GONE]", tiny.TOKENS[-1]]}, "<|im_start|>"),
        ({"add_bos_token": False}, "a"),
    ],
    ids=["merges", "type", "token", "bos"],
)
def test_mutants_of_the_vocabulary_are_seen(built: Built, changed: dict[str, Any], text: str) -> None:
    folder, path = built("llama", changed)
    report = verify(folder, path, n_tokens=0)
    assert not report.ok and text in report.text and "llama.cpp gives" in report.failure
    assert report.expected != report.got and "\n" not in report.failure


def test_mutant_a_wrong_pretokenizer_is_seen(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", byte_level(GPT2))
    fields = read_vocabulary(folder).fields
    assert verify(folder, write_vocab(tmp_path / "right.gguf", fields), n_tokens=0).ok
    report = verify(folder, write_vocab(tmp_path / "wrong.gguf", fields, pre="qwen2"), n_tokens=0)
    assert not report.ok and report.texts_wrong > 20


def test_the_first_difference_is_shown_with_the_ids_around_it(built: Built) -> None:
    folder, path = built("llama", {"merges": tiny.MERGES[:3]})  # without "i n" and "a n"
    report = verify(folder, path, ["the", "hehehe in"], n_tokens=0)
    ids = {text: i for i, text in enumerate(tiny.TOKENS)}
    assert (report.text, report.position, report.texts_wrong) == ("hehehe in", 4, 2)  # PLAIN is the other
    assert report.expected == [ids["he"], ids["he"], ids["he"], ids["Ġ"], ids["in"]]
    assert report.got == [ids["he"], ids["he"], ids["he"], ids["Ġ"], ids["i"], ids["n"]]


def test_a_limit_of_llama_cpp_is_counted_and_named(tmp_path: Path) -> None:
    data = sentencepiece_bpe(None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False})
    folder = save(tmp_path / "hf", data)
    path = write_vocab(tmp_path / "v.gguf", read_vocabulary(folder).fields)
    report = verify(folder, path, [" two", "two", "<s>two"], n_tokens=0)
    assert report.ok and report.texts_limited == 2 and "puts a space before text" in report.limits[0]
    wrong = write_vocab(tmp_path / "w.gguf", read_vocabulary(folder).fields, add_space_prefix=False)
    assert verify(folder, wrong, ["two"], n_tokens=0).texts_wrong == 2


# --- bounds, bad input ------------------------------------------------------------------------------------------------


def test_fewer_bits_are_held_to_looser_bounds() -> None:
    order = [
        bounds_of(QType[name]) for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL")
    ]
    assert sorted(order[:-1]) == order[:-1] and sorted(order[:-1], key=lambda pair: -pair[1]) == order[:-1]
    assert order[-1] == bounds_of(QType.Q4_0) and bounds_of(QType.Q5_0) == bounds_of(QType.Q5_1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": [*tiny.TOKENS[:-1], tiny.TOKENS[0]]}, "same token text at two ids"),
        ({"tokens": [*tiny.TOKENS[:-1], tiny.TOKENS[0] + "\0x"]}, "same token text at two ids"),
        ({"bos_token_id": 9999}, "asks for bos around a text"),
        ({"model": "llama"}, "lacks the byte token <0x00>"),
        ({"model": "unheard-of"}, "llama.cpp could not load this model"),
    ],
)
def test_files_that_would_end_the_process_are_refused(built: Built, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConvertError, match=words):
        verify(*built("llama", changed), n_tokens=0)


def test_a_truncated_file_and_a_folder_without_weights_are_errors(built: Built, tmp_path: Path) -> None:
    folder, path = built("llama")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(GgufError, match="truncated"):
        verify(folder, tmp_path / "cut.gguf")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConvertError, match="transformers could not load this model"):
        verify(bare, path)


def test_llama_cpps_log_goes_back_to_who_had_it_before(built: Built) -> None:
    folder, path = built("llama")
    code = f"""
import llama_cpp
heard = []
keep = llama_cpp.llama_log_callback(lambda level, text, user: heard.append(text))
llama_cpp.llama_log_set(keep, None)
from edgecl_convert import verify
assert verify({str(folder)!r}, {str(path)!r}, n_tokens=0).ok
assert not heard, heard
llama_cpp.llama_model_load_from_file(b"/nowhere.gguf", llama_cpp.llama_model_default_params())
assert heard
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
