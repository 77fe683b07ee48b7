"""Tokenizers of Hugging Face folders in llama.cpp: the same ids on the torture text, and every mutant is seen.

Every kind is trained in the test, written as GGUF fields and loaded by llama.cpp; the reference is the tokenizers library.
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from gguf import TokenType
from tiny_tokenizers import (
    BYTES,
    PREPEND,
    REPLACE,
    SPACE,
    TEMPLATE,
    added,
    byte_level,
    gemma,
    metaspace,
    save,
    sentencepiece_bpe,
    unigram,
    write_vocab,
)
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from edgecl.places import find_model
from edgecl_convert import TORTURE, ConvertError, GgufFile, UnsupportedError, read_vocabulary, verify
from edgecl_convert.hf_tokenizer import read_tokenizer
from edgecl_convert.llama_model import LlamaModel
from edgecl_convert.pretokenizer import KNOWN
from edgecl_convert.served_tokenizer import serve
from edgecl_convert.torture import probes

PRE = {known.pre: known for known in KNOWN}
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_LEVEL = GPT2 | {"use_regex": False}
TEXTS = [*TORTURE, "<tool>x</tool> <tool> a<tool>b", *list(probes())[len(TORTURE) :: 5]]


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def described(pre: str) -> dict[str, Any]:
    return sequence(*map(split, PRE[pre].splits), BYTE_LEVEL)


def differing(folder: Path, gguf: Path, texts: list[str] = TEXTS, served: bool = False) -> list[str]:
    """Texts whose ids in llama.cpp are not those of the folder's tokenizer, or of the nearest that is served."""
    tokenizer = read_tokenizer(folder)
    library = Tokenizer.from_str(json.dumps(serve(tokenizer).data if served else tokenizer.data))
    with LlamaModel(gguf, vocab_only=True) as model:
        return [text for text in texts if model.encode(text) != library.encode(text, add_special_tokens=False).ids]


def convert(folder: Path, **changed: Any) -> Path:
    return write_vocab(folder.with_suffix(".gguf"), read_vocabulary(folder).fields, **changed)


def field(folder: Path, name: str) -> Any:
    return read_vocabulary(folder).fields[f"tokenizer.ggml.{name}"]


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", PRE)
def test_every_known_pretokenizer_is_found_and_is_llama_cpps(pre: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", byte_level(described(pre), ignore_merges=PRE[pre].ignore_merges))
    assert field(folder, "pre") == pre
    assert differing(folder, convert(folder), served=True) == []
    own = differing(folder, convert(folder))
    assert bool(own) == bool(PRE[pre].limit) == bool(read_vocabulary(folder).limits)


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer"),
    [
        ("gpt-2", GPT2),
        ("smollm", sequence({"type": "Digits", "individual_digits": True}, GPT2)),
        ("qwen2", sequence(split(QWEN), BYTE_LEVEL)),
        ("smaug-bpe", sequence(split(LLAMA_3), BYTE_LEVEL)),
    ],
)
def test_what_models_ship_is_found_by_what_it_does(pre: str, pre_tokenizer: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", byte_level(pre_tokenizer))
    assert field(folder, "pre") == pre
    assert differing(folder, convert(folder)) == []


@pytest.mark.parametrize("pre", PRE)
def test_mutant_a_wrong_pretokenizer_is_seen(pre: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", byte_level(described(pre), ignore_merges=PRE[pre].ignore_merges))
    fields, texts = read_vocabulary(folder).fields, list(TORTURE[:30])
    for other in set(PRE) - {pre, *(("llama-bpe", "smaug-bpe") if pre in ("llama-bpe", "smaug-bpe") else ())}:
        assert differing(folder, write_vocab(tmp_path / "mutant.gguf", fields, pre=other), texts, served=True), other


def unreachable(data: dict[str, Any]) -> dict[str, Any]:
    """Drop the merges that make one token: only ignore_merges finds it then."""
    model = data["model"]
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != "Ġthe"]
    return data


def test_ignore_merges_decides_between_ids_that_split_alike(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", unreachable(byte_level(described("llama-bpe"), ignore_merges=True)))
    merged = save(tmp_path / "merged", unreachable(byte_level(described("llama-bpe"))))
    assert (field(whole, "pre"), field(merged, "pre")) == ("llama-bpe", "smaug-bpe")
    for folder, wrong in ((whole, "smaug-bpe"), (merged, "llama-bpe")):
        assert differing(folder, convert(folder)) == []
        assert differing(folder, convert(folder, pre=wrong))


def test_ignore_merges_is_refused_where_llama_cpp_has_it_not_and_it_matters(tmp_path: Path) -> None:
    same = save(tmp_path / "same", byte_level(GPT2, ignore_merges=True))
    assert field(same, "pre") == "gpt-2" and differing(same, convert(same)) == []
    with pytest.raises(UnsupportedError, match=r"ignore_merges is true, which llama.cpp does not have for gpt-2"):
        read_vocabulary(save(tmp_path / "hf", unreachable(byte_level(GPT2, ignore_merges=True))))


def test_composing_is_a_limit_that_is_named(tmp_path: Path) -> None:
    data = byte_level(sequence(split(QWEN), BYTE_LEVEL)) | {"normalizer": {"type": "NFC"}}
    folder = save(tmp_path / "hf", data)
    assert any("NFC" in limit for limit in read_vocabulary(folder).limits)
    gguf = convert(folder)
    assert differing(folder, gguf, ["cafe\u0301", "Größe"]) == ["cafe\u0301"]
    assert differing(folder, gguf, served=True) == []


@pytest.mark.parametrize("mutant", ["merge", "type", "token"])
def test_mutants_of_a_byte_level_vocabulary_are_seen(mutant: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", byte_level(GPT2))
    tokens, types, merges = field(folder, "tokens"), field(folder, "token_type"), field(folder, "merges")
    tool = tokens.index("<tool>")
    assert types[tool] == TokenType.USER_DEFINED and types[tool - 1] == TokenType.CONTROL
    changed: dict[str, Any] = {
        "merge": {"merges": [merge for merge in merges if merge != merges[3]]},
        "type": {"token_type": [*types[:tool], int(TokenType.NORMAL)]},
        "token": {"tokens": [*tokens[:tool], "[PAD]"]},
    }[mutant]
    assert differing(folder, convert(folder)) == []
    assert differing(folder, convert(folder, **changed))


# --- SentencePiece ----------------------------------------------------------------------------------------------------

NO_PREFIX = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix", "exact"),
    [
        ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, True, True),
        (REPLACE, NO_PREFIX, False, True),
        (None, metaspace("never"), False, True),
        (None, metaspace("first"), True, False),
        (None, metaspace("always"), True, False),
    ],
    ids=["llama-2", "gemma", "never", "first", "always"],
)
def test_sentencepiece_bpe_has_llama_cpps_ids(
    normalizer: Any, pre_tokenizer: Any, prefix: bool, exact: bool, tmp_path: Path
) -> None:
    folder = save(tmp_path / "hf", sentencepiece_bpe(normalizer, pre_tokenizer))
    fields = read_vocabulary(folder).fields
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is prefix
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert types.count(TokenType.BYTE) == 256 and types[-1] == TokenType.NORMAL
    gguf = convert(folder)
    assert differing(folder, gguf, served=True) == []
    own = differing(folder, gguf)
    assert bool(own) != exact == (not read_vocabulary(folder).limits)
    assert all(text.startswith((" ", "▁")) or "<s>" in text for text in own)
    assert differing(folder, convert(folder, add_space_prefix=not prefix), served=True)


@pytest.mark.parametrize("mutant", ["scores", "type", "token"])
def test_mutants_of_a_sentencepiece_vocabulary_are_seen(mutant: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", sentencepiece_bpe())
    tokens, types, scores = field(folder, "tokens"), field(folder, "token_type"), field(folder, "scores")
    at = tokens.index("▁the")
    changed: dict[str, Any] = {
        "scores": {"scores": [-score for score in scores]},
        "type": {"token_type": [types[0], int(TokenType.NORMAL), *types[2:]]},
        "token": {"tokens": [*tokens[:at], "[PAD]", *tokens[at + 1 :]]},
    }[mutant]
    assert differing(folder, convert(folder, **changed))


def test_gemmas_runs_and_its_tab_that_is_a_byte(tmp_path: Path) -> None:
    generation = {"eos_token_id": [1, 5]}
    folder = save(tmp_path / "hf", gemma(), {"eos_token": "<eos>", "bos_token": "<bos>", "chat_template": "<end_of_turn>"})
    (folder / "generation_config.json").write_text(json.dumps(generation))
    fields = read_vocabulary(folder).fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert types[tokens.index("\n\n")] == TokenType.USER_DEFINED and types[tokens.index("▁▁")] == TokenType.NORMAL
    assert "\t" not in tokens and fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and fields["tokenizer.ggml.eot_token_id"] == 5
    gguf = convert(folder)
    assert differing(folder, gguf, served=True) == []
    assert all(SPACE in text for text in differing(folder, gguf))


def test_merges_that_never_make_what_llama_cpp_would_are_refused(tmp_path: Path) -> None:
    data = sentencepiece_bpe()
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if "".join(pair) != "▁the"]
    with pytest.raises(UnsupportedError, match="its merges never make '▁the'"):
        read_vocabulary(save(tmp_path / "hf", data))


def test_unigram_has_llama_cpps_ids(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", unigram())
    fields = read_vocabulary(folder).fields
    assert fields["tokenizer.ggml.model"] == "t5" and fields["tokenizer.ggml.unknown_token_id"] == 2
    gguf = convert(folder)
    report = verify(folder, gguf, TEXTS, n_tokens=0)
    assert report.ok, report.failure
    ties = differing(folder, gguf, served=True)  # cuts that are equally good
    assert len(ties) < 5
    plain = [text for text in TORTURE if text == " ".join(text.split()) and SPACE not in text]
    assert len(plain) > 25 and differing(folder, gguf, [text for text in plain if text not in ties]) == []
    assert differing(folder, convert(folder, scores=[-1.0] * len(fields["tokenizer.ggml.tokens"])), served=True)


def protobuf(*fields: tuple[int, Any]) -> bytes:
    """Encode a message: int as varint, float as 32 bits, the rest as bytes."""
    import struct

    def varint(value: int) -> bytes:
        head = bytes([value & 127 | (128 if value > 127 else 0)])
        return head + (varint(value >> 7) if value > 127 else b"")

    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value.encode("utf-8") if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def model_file(*normal: str, kind: int = 2, collapse: int = 0) -> bytes:
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((text, 6) for text in BYTES), *((text, 1) for text in normal)]
    message = [(1, protobuf((1, text), (2, -float(i)), (3, type_))) for i, (text, type_) in enumerate(pieces)]
    return protobuf(*message, (2, protobuf((3, kind))), (3, protobuf((3, 1), (4, collapse))))


def test_a_tokenizer_model_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file("▁a", "ab", "abc", "▁", "a", "b", "c"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": {"content": "<s>"}}')
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 266}')
    fields = read_vocabulary(tmp_path).fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.add_bos_token"] is True and tokens[-1] == "<tool>"
    with LlamaModel(convert(tmp_path), vocab_only=True) as model:
        shown = [tokens[i] for i in model.encode("abc abcb<tool>é", add_special=True)]
    assert shown == ["<s>", "▁a", "b", "c", "▁a", "b", "c", "b", "<tool>", "▁", "<0xC3>", "<0xA9>"]


# --- what is around the tokens ----------------------------------------------------------------------------------------


def test_the_vocabulary_is_padded_to_the_models_size(tmp_path: Path) -> None:
    data = byte_level(GPT2)
    n = len(data["model"]["vocab"]) + 4
    data["added_tokens"].append(added(n, f"[PAD{n + 1}]"))
    folder = save(tmp_path / "hf", data, vocab_size=n + 3)
    tokens, types = field(folder, "tokens"), field(folder, "token_type")
    assert tokens[n:] == [f"[PAD{n + 1}]", f"[[PAD{n + 1}]]", f"[PAD{n + 2}]"]
    assert types[n + 1 :] == [TokenType.UNUSED] * 2
    assert differing(folder, convert(folder)) == []


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    data = byte_level(GPT2)
    n = len(data["model"]["vocab"]) + 4
    data["added_tokens"].append(added(n, "<image>"))
    folder = save(tmp_path / "hf", data, vocab_size=n)
    assert len(field(folder, "tokens")) == n and any("<image>" in limit for limit in read_vocabulary(folder).limits)
    assert differing(folder, convert(folder)) == []


def test_a_special_token_without_a_row_is_left_out_too_but_not_the_end(tmp_path: Path) -> None:
    data = byte_level(GPT2)
    n = len(data["model"]["vocab"]) + 4
    data["added_tokens"].append(added(n, "[PAD]"))
    folder = save(tmp_path / "hf", data, {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}, vocab_size=n)
    vocabulary = read_vocabulary(folder)
    assert "tokenizer.ggml.padding_token_id" not in vocabulary.fields and "[PAD] and other" in vocabulary.limits[0]
    with pytest.raises(ConvertError, match=r"eos_token is '\[PAD\]', which is no token of it"):
        read_vocabulary(save(folder, data, {"eos_token": "[PAD]"}, vocab_size=n))


@pytest.mark.parametrize(
    ("settings", "config", "wanted"),
    [
        ({"eos_token": "<|im_end|>"}, {}, {"eos": 2}),
        ({"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}, {}, {"eos": 2, "padding": 0}),
        ({}, {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": -1}, {"eos": 2, "bos": 0}),
        ({"eos_token": "<|im_end|>", "bos_token": None}, {"eos_token_id": 0, "bos_token_id": 1}, {"eos": 2, "bos": 1}),
        ({}, {"eos_token_id": [2, 0]}, {"eos": 2}),
    ],
)
def test_special_ids(settings: dict[str, Any], config: dict[str, Any], wanted: dict[str, int], tmp_path: Path) -> None:
    data = byte_level(GPT2)
    n = len(data["model"]["vocab"])
    config = {key: [n + i for i in v] if isinstance(v, list) else n + v if v >= 0 else v for key, v in config.items()}
    fields = read_vocabulary(save(tmp_path / "hf", data, settings, **config)).fields
    found = {key.split(".")[2].removesuffix("_token_id"): value for key, value in fields.items() if key.endswith("_token_id")}
    assert found == {name: n + i for name, i in wanted.items()}


def test_the_bos_that_is_added_goes_before_config_jsons(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", sentencepiece_bpe(), bos_token_id=7)
    assert field(folder, "bos_token_id") == 1


@pytest.mark.parametrize(("flag", "wanted"), [(None, True), (True, True), (False, False)])
def test_bos_is_added_as_the_tokenizer_does(flag: bool | None, wanted: bool, tmp_path: Path) -> None:
    settings = {"eos_token": "</s>"} | ({} if flag is None else {"add_bos_token": flag})
    folder = save(tmp_path / "hf", sentencepiece_bpe(), settings)
    assert field(folder, "add_bos_token") is wanted and field(folder, "add_eos_token") is False
    with LlamaModel(convert(folder), vocab_only=True) as model:
        assert (model.encode("a", add_special=True)[0] == 1) is wanted


def test_the_chat_template_is_the_one_transformers_takes(tmp_path: Path) -> None:
    listed = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    folder = save(tmp_path / "hf", byte_level(GPT2), {"eos_token": "<|im_end|>", "chat_template": listed})
    assert read_vocabulary(folder).fields["tokenizer.chat_template"] == TEMPLATE
    (folder / "chat_template.jinja").write_text("from the file")
    assert read_vocabulary(folder).fields["tokenizer.chat_template"] == "from the file"
    plain = save(tmp_path / "plain", byte_level(GPT2))
    assert "tokenizer.chat_template" not in read_vocabulary(plain).fields


# --- refused ----------------------------------------------------------------------------------------------------------


def broken(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer with one thing changed; a `model` is laid over its model."""
    data = byte_level(GPT2)
    return data | {key: data["model"] | value if key == "model" else value for key, value in changes.items()}


def with_added(**flags: Any) -> dict[str, Any]:
    data = byte_level(GPT2)
    data["added_tokens"][-1] |= flags
    return data


REFUSED = {
    "a WordPiece tokenizer": broken(model={"type": "WordPiece", "vocab": {"a": 0}}),
    "tried: gpt-2, smollm, llama-bpe": broken(pre_tokenizer=GPT2 | {"add_prefix_space": True}),
    "its pre-tokenizer splits text like none": broken(pre_tokenizer=sequence({"type": "Whitespace"}, BYTE_LEVEL)),
    '"type": "Lowercase"': broken(normalizer={"type": "Lowercase"}),
    "the tokenizers library refuses it: data did not match": broken(pre_tokenizer=sequence({"type": "Unheard"}, BYTE_LEVEL)),
    "Token `b` out of vocabulary": broken(model={"vocab": {"a": 0}, "merges": [["a", "b"]], "ignore_merges": True}),
    "Unk token `<none>` not found": broken(
        model={"vocab": {"a": 0, "ab": 1}, "merges": [], "ignore_merges": True, "unk_token": "<none>"}
    ),
    "neither on bytes nor with byte_fallback": broken(pre_tokenizer={"type": "Whitespace"}),
    "no token has the id 2500": with_added(id=9999) | {"added_tokens": [added(9999, "<x>")]},
    "but 'nothere' is no token": broken(
        model={"merges": [["not", "here"]], "vocab": {"not": 0, "here": 1}}, added_tokens=[added(2, "<|im_end|>")]
    ),
    "not two tokens": broken(model={"merges": ["a b c"]}),
    "GGUF cannot write one with a space": broken(model={"merges": [["a ", "b"]]}),
    "which its vocabulary contradicts": with_added(id=5),
    "has lstrip, rstrip or single_word": with_added(rstrip=True),
    "end_of_word_suffix is '</w>'": broken(model={"end_of_word_suffix": "</w>"}),
    "id 0 is two tokens": broken(model={"vocab": {"a": 0, "b": 0}, "merges": []}),
    "has a NUL": with_added(content="a\0"),
    "two ids have the text '<|im_start|>'": with_added(content="<|im_start|>"),
    'has no "model"': {"version": "1.0", "added_tokens": []},
    "is not built as a tokenizer.json": broken(added_tokens=[{"content": "<|im_end|>"}]),
    "its post-processor adds the tokens": broken(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * 2],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"x": {"id": "x", "ids": [7], "tokens": ["x"]}},
        }
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_llama_cpp_would_not_do_is_refused_in_one_line(words: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as error:
        read_vocabulary(save(tmp_path / "hf", REFUSED[words], {"eos_token": "<|im_end|>"}))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_byte_without_a_token_is_refused(tmp_path: Path) -> None:
    data = sentencepiece_bpe()
    vocab = data["model"]["vocab"]
    vocab["instead"] = vocab.pop("<0x0A>")
    with pytest.raises(UnsupportedError, match="without the token <0x0A>"):
        read_vocabulary(save(tmp_path / "hf", data))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no tokenizer.json and no tokenizer.model"),
        ({"tokenizer.json": b"{oops"}, "is not JSON"),
        ({"tokenizer.json": b"[]"}, "must hold a JSON object"),
        ({"tokenizer.model": b"\xff\xff\xff"}, "is not a SentencePiece model"),
        ({"tokenizer.model": protobuf((1, protobuf((1, 7)))) + model_file("a")}, "is not a SentencePiece model"),  # a text
        ({"tokenizer.model": model_file("a") + protobuf((3, protobuf((2, 9))))}, "is not a SentencePiece model"),  # the table
        ({"tokenizer.model": model_file("a", kind=3)}, "only SentencePiece's BPE and unigram"),
        ({"tokenizer.model": model_file("a", collapse=1)}, "normalizer"),
        ({"tokenizer.model": model_file("a", kind=1, collapse=1)}, "unigram model with byte_fallback"),
    ],
)
def test_folders_without_a_usable_tokenizer_are_refused(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConvertError, match=words):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"eos_token": "<nowhere>"}])
def test_an_end_that_is_not_named_or_no_token_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"no end-of-sequence token is named|eos_token is '<nowhere>'"):
        read_vocabulary(save(tmp_path / "hf", byte_level(GPT2), settings))


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer as a folder: transformers reads the packaged GGUF, and forgets that digits are split."""
    folder, packaged = tmp_path_factory.mktemp("smollm2"), find_model("smollm2")
    AutoTokenizer.from_pretrained(packaged.parent, gguf_file=packaged.name).save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    assert field(folder, "pre") == "gpt-2"  # it says what the folder does, not what the model was
    data["pre_tokenizer"] = sequence({"type": "Digits", "individual_digits": True}, data["pre_tokenizer"])
    path.write_text(json.dumps(data), "utf-8")
    return folder


def test_smollm2s_fields_are_those_of_its_gguf(smollm2: Path) -> None:
    fields = read_vocabulary(smollm2).fields
    with GgufFile(find_model("smollm2")) as gguf:
        original = {key: gguf.get(key) for key in gguf.keys if key.startswith("tokenizer.")}
    assert original.pop("tokenizer.ggml.add_space_prefix") is False  # means nothing to a byte-level BPE
    assert fields.pop("tokenizer.ggml.add_eos_token") is False
    assert fields == original


def test_smollm2s_ids_are_those_of_its_gguf(smollm2: Path) -> None:
    gguf = convert(smollm2)
    assert differing(smollm2, gguf) == []
    with LlamaModel(gguf, vocab_only=True) as ours, LlamaModel(find_model("smollm2"), vocab_only=True) as packaged:
        assert [text for text in TEXTS if ours.encode(text) != packaged.encode(text)] == []
