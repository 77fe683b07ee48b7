"""One metadata value as GGUF stores it: a type, then the value."""

from __future__ import annotations

import struct
from typing import Any

from gguf import GGUFValueType

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


def encode_string(text: str) -> bytes:
    """Return a string with its length before it."""
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def encode_value(value: Any) -> bytes:
    """Return type and value by the Python type: bool, uint32, float32, string, uint8 array (bytes), or an array (list).

    Whole numbers in a list are int32, since token types are; an empty list is one of strings.
    """
    if isinstance(value, bytes):
        return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, len(value)) + value
    if not isinstance(value, list):
        value_type = _type_of(value, GGUFValueType.UINT32)
        return struct.pack("<I", value_type) + _encode_items(value_type, [value])
    item_type = _type_of(value[0], GGUFValueType.INT32) if value else GGUFValueType.STRING
    return struct.pack("<IIQ", GGUFValueType.ARRAY, item_type, len(value)) + _encode_items(item_type, value)


def _type_of(value: bool | int | float | str, whole: GGUFValueType) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return whole
    return GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.STRING


def _encode_items(value_type: GGUFValueType, items: list[Any]) -> bytes:
    if value_type == GGUFValueType.STRING:
        return b"".join(map(encode_string, items))
    return struct.pack(f"<{len(items)}{SCALARS[value_type]}", *items)
