"""Safetensors: read as the safetensors library reads them, refused in one line when anything is wrong."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgecl_convert import ConvertError
from edgecl_convert.safetensors_file import SafetensorsFile, SafetensorsFolder


def raw(header: Any, data: int = 64, length: int | None = None) -> bytes:
    """A whole file from its header and `data` bytes of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(shape: list[Any], start: int, stop: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ConvertError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


# --- one file ---------------------------------------------------------------------------------------------------------


def test_views_are_what_was_saved(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    saved = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, 2, 6, generator=generator).to(torch.bfloat16),
        "c.weight": torch.randn(7, generator=generator).to(torch.float16),
        "flags": torch.ones(3, dtype=torch.bool),
    }
    path = tmp_path / "m.safetensors"
    save_file(saved, path, {"format": "pt"})
    file = SafetensorsFile(path)
    assert file.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        stored = file.tensors[name]
        blocks = file.blocks(name)
        assert stored.shape == tuple(tensor.shape) and not blocks.flags.writeable
        assert blocks.shape == (tensor.numel() // tensor.shape[-1], tensor.shape[-1] * tensor.element_size())
        assert blocks.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        file.release(name)
        assert blocks.tobytes() == tensor.view(torch.uint8).numpy().tobytes()  # read again
    assert {name: stored.dtype for name, stored in file.tensors.items()} == {
        "a": "F32",
        "b": "BF16",
        "c.weight": "F16",
        "flags": "BOOL",
    }
    file.close()
    assert blocks.sum() == 3  # an array that was handed out lives on


def test_data_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    header = json.dumps({"a": entry([2, 3], 0, 24)}).encode()
    header += b" " * (1 + len(header) % 2)  # the data starts at an odd byte
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(header, 0) + values.tobytes())
    assert SafetensorsFile(path).blocks("a").view(np.float32).tolist() == values.reshape(2, 3).tolist()


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "short": (b"\0\0", "it has 2 bytes"),
    "no safetensors": (b"GGUF" + bytes(100), "truncated|sound JSON"),
    "header past the end": (raw({}, 8, length=1 << 40), "its header claims 1099511627776 bytes of"),
    "no JSON": (raw(b"{oops"), "not sound JSON"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "not sound JSON"),
    "deep": (raw(b"[" * 100_000), "not sound JSON"),
    "a list": (raw([]), "not a JSON object"),
    "a name twice": (raw(b'{"a": 1, "a": 2}'), "a name is there twice"),
    "a name with a line break": (raw({"a\nb": entry([16], 0, 64)}), r"tensor 'a\\nb' has a name that"),
    "no entry": (raw({"a": 5}), "tensor 'a' has the dtype None"),
    "dtype": (raw({"a": entry([16], 0, 64, "F4")}), "has the dtype 'F4'; allowed: BOOL"),
    "dtype is a list": (raw({"a": entry([16], 0, 64, [])}), r"has the dtype \[\]"),
    "shape is negative": (raw({"a": entry([-16], 0, 64)}), r"the shape \[-16\]"),
    "shape is no number": (raw({"a": entry([True, 16], 0, 64)}), r"the shape \[True, 16\]"),
    "shape is huge": (raw({"a": entry([1 << 70], 0, 64)}), "not sound"),
    "shape overflows": (raw({"a": entry([1 << 40] * 9, 0, 64)}), "but has 64 bytes"),
    "three offsets": (raw({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 1, 64]}}), "not sound"),
    "size": (raw({"a": entry([15], 0, 64)}), "60 bytes, but has 64 bytes"),
    "backwards": (raw({"a": entry([16], 64, 0)}), "but has -64 bytes"),
    "past the end": (raw({"a": entry([17], 0, 68)}), "is truncated: its header accounts for"),
    "bytes of nobody": (raw({"a": entry([15], 0, 60)}), "bytes that no tensor owns"),
    "a hole": (raw({"a": entry([4], 0, 16), "b": entry([8], 32, 64)}), "'b' overlaps another, or leaves a hole"),
    "overlap": (raw({"a": entry([12], 0, 48), "b": entry([8], 32, 64)}), "'b' overlaps another"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[case]
    assert re.search(expected, refusal(tmp_path / "m.safetensors", content))


def test_the_parts_of_those_files_are_sound_on_their_own(tmp_path: Path) -> None:
    path, shapes = tmp_path / "m.safetensors", {"b": (8,), "a": (2, 4), "none": (0,)}
    header = {"__metadata__": {"format": "pt"}, "b": entry([8], 32, 64), "a": entry([2, 4], 0, 32), "none": entry([0], 32, 32)}
    path.write_bytes(raw(header))
    assert {name: stored.shape for name, stored in SafetensorsFile(path).tensors.items()} == shapes


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    for length in range(len(content)):
        refusal(tmp_path / "cut.safetensors", content[:length])
    refusal(tmp_path / "cut.safetensors", content + b"\0")


def test_a_changed_byte_of_the_header_is_read_or_refused(tmp_path: Path) -> None:
    save_file({"a name " * 20: torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / "m.safetensors")
    content, rng = (tmp_path / "m.safetensors").read_bytes(), np.random.default_rng(0)
    n_read = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[int(rng.integers(len(content) - 68))] ^= int(rng.integers(1, 256))
        (tmp_path / "x.safetensors").write_bytes(changed)
        try:
            file = SafetensorsFile(tmp_path / "x.safetensors")
        except ConvertError:
            continue
        assert sum(file.blocks(name).size for name in file.tensors) == 68
        n_read += 1
    assert 20 < n_read < 280


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards with a tensor each."""
    for number, name in enumerate("ab"):
        save_file({name: torch.full((2, 3), float(number))}, tmp_path / f"model-{number}.safetensors")
    write_index(tmp_path, a="model-0.safetensors", b="model-1.safetensors")
    return tmp_path


def write_index(folder: Path, **shards: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def test_shards_are_one_set_of_weights(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    assert list(folder.tensors) == ["a", "b"]
    assert folder.blocks("b").view(np.float32).tolist() == [[1.0] * 3] * 2
    folder.close()


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        (
            {"a": "model-0.safetensors", "b": "model-2.safetensors"},
            "model-2.safetensors: is missing, but .* names it",
        ),
        ({"a": "model-0.safetensors", "b": "model-0.safetensors"}, "says that b is in model-0.safetensors, where it is not"),
        ({"a": "model-1.safetensors", "b": "model-0.safetensors"}, "says that a is in model-1.safetensors, where it is not"),
        ({"a": "../model-0.safetensors"}, "names the shard '../model-0.safetensors'"),
        ({"a": "/etc/passwd"}, "names the shard '/etc/passwd'"),
        ({"a": "pytorch_model.bin"}, "names the shard 'pytorch_model.bin'; a .safetensors file"),
        ({"a": 5}, "names the shard 5"),
        ({}, "weight_map is empty"),
    ],
)
def test_an_index_that_contradicts_the_shards_is_refused(shards: dict[str, Any], reason: str, sharded: Path) -> None:
    write_index(sharded, **shards)
    with pytest.raises(ConvertError, match=reason):
        SafetensorsFolder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, sharded / "model-1.safetensors")
    with pytest.raises(ConvertError, match=r"model-1.safetensors: has the tensor a, which model-0.safetensors has too"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConvertError, match="is not a safetensors index"):
        SafetensorsFolder(sharded)


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConvertError, match=r"model-1.safetensors: is truncated"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ConvertError, match=re.escape(f"refused: only safetensors are read, got {name}")):
        SafetensorsFolder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"has no model.*json; give a Hugging Face model folder"):
        SafetensorsFolder(tmp_path)
