"""Malformed safetensors files, made in memory: one row an abuse, each must be refused."""

from __future__ import annotations

import json
import struct
from typing import Any

__all__ = ["HOSTILE", "file_bytes", "valid_file"]


def file_bytes(header: bytes | dict[str, Any], data: bytes = b"", *, length: int = -1) -> bytes:
    """Return a file of this header and data; `length` lies about the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length < 0 else length) + raw + data


def valid_file() -> bytes:
    """Return a small file with nothing wrong in it, the control of every test."""
    table = {"a": _tensor("BF16", [2, 3], 0, 12), "b": _tensor("F32", [], 12, 16)}
    return file_bytes({"__metadata__": {"format": "pt"}, **table}, bytes(16))


def _tensor(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def _one(dtype: Any, shape: Any, *offsets: Any, data: int = 8) -> bytes:
    """Return a file with one tensor."""
    return file_bytes({"a": _tensor(dtype, shape, *offsets)}, bytes(data))


def _two(first: tuple[int, int], second: tuple[int, int], data: int) -> bytes:
    """Return a file with two U8 tensors at these offsets."""
    (b0, e0), (b1, e1) = first, second
    table = {"a": _tensor("U8", [e0 - b0], b0, e0), "b": _tensor("U8", [e1 - b1], b1, e1)}
    return file_bytes(table, bytes(data))


def _raw(text: str, data: int = 8) -> bytes:
    """Return a file whose header is this text."""
    return file_bytes(text.encode(), bytes(data))


_ENTRY = '{"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}'
_MANY = ", ".join(f'"k{i}": 0' for i in range(120_000))

HOSTILE: dict[str, bytes] = {
    # the eight bytes of length
    "empty file": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "length of 2^63": file_bytes(b"{}", length=2**63),
    "length of 2^64 - 1": file_bytes(b"{}", length=2**64 - 1),
    "length beyond the file": file_bytes(b"{}", length=3),
    "length of all that follows and one more": file_bytes(b"{}", bytes(8), length=11),
    "length over 100 MB": file_bytes(b"{}", bytes(64), length=100_000_001),
    "length of zero": file_bytes(b"", bytes(8)),
    "length cuts the JSON": file_bytes(b'{"__metadata__": {}}', length=12),
    # the JSON itself
    "bad UTF-8": file_bytes(b'{"\xff\xfe": 0}'),
    "UTF-16": file_bytes('{"a": 0}'.encode("utf-16-le")),
    "byte order mark": file_bytes(b"\xef\xbb\xbf{}"),
    "a list": _raw("[]", 0),
    "a string": _raw('"{}"', 0),
    "null": _raw("null", 0),
    "leading space": _raw(f' {{"a": {_ENTRY}}}'),
    "text after the object": _raw(f'{{"a": {_ENTRY}}} {{}}'),
    "trailing comma": _raw(f'{{"a": {_ENTRY},}}'),
    "only a brace": _raw("{", 0),
    "control character in a name": _raw(f'{{"a\n": {_ENTRY}}}'),
    "NaN constant": _raw('{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 8]}}'),
    "Infinity constant": _raw(
        '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, Infinity]}}'
    ),
    "number of 5,000 digits": _raw(f'{{"a": {{"dtype": "U8", "shape": [{"9" * 5000}]}}}}'),
    "duplicate name": _raw(f'{{"a": {_ENTRY}, "a": {_ENTRY}}}'),
    "duplicate name, spelled otherwise": _raw(f'{{"a": {_ENTRY}, "\\u0061": {_ENTRY}}}'),
    "duplicate field": _raw('{"a": {"dtype": "U8", "dtype": "I8", "shape": [8]}}'),
    "duplicate in the metadata": _raw('{"__metadata__": {"k": "1", "k": "2"}}', 0),
    "duplicate after 120,000 names": _raw(f'{{{_MANY}, "k119999": 1}}', 0),
    "nested 100,000 lists": _raw('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nested 100,000 objects": _raw('{"a":' * 100_000 + "0" + "}" * 100_000),
    "name of a megabyte, twice": _raw(f'{{"{"n" * 10**6}": 0, "{"n" * 10**6}": 0}}'),
    "name of a megabyte, malformed": _raw(f'{{"{"n" * 10**6}": 0}}'),
    "name of a megabyte, with a gap": _raw(
        f'{{"{"n" * 10**6}": {{"dtype": "U8", "shape": [7], "data_offsets": [1, 8]}}}}'
    ),
    # one entry
    "entry is a list": _raw('{"a": ["U8", [8], [0, 8]]}'),
    "entry is null": _raw('{"a": null}'),
    "missing dtype": _raw('{"a": {"shape": [8], "data_offsets": [0, 8]}}'),
    "missing shape": _raw('{"a": {"dtype": "U8", "data_offsets": [0, 8]}}'),
    "missing data_offsets": _raw('{"a": {"dtype": "U8", "shape": [8]}}'),
    "extra field": _raw(f'{{"a": {_ENTRY[:-1]}, "strides": [1]}}}}'),
    "unknown dtype": _one("F8", [8], 0, 8),
    "dtype of four bits": _one("F4", [16], 0, 8),
    "lower-case dtype": _one("bf16", [4], 0, 8),
    "dtype of a megabyte": _one("F" * 10**6, [8], 0, 8),
    "dtype is a number": _one(8, [8], 0, 8),
    "dtype is a list": _one(["U8"], [8], 0, 8),
    "dtype is null": _one(None, [8], 0, 8),
    # shapes
    "negative size": _one("U8", [-8], 0, 8),
    "two negative sizes": _one("U8", [-2, -4], 0, 8),
    "float size": _one("U8", [8.0], 0, 8),
    "bool size": _one("U8", [8, True], 0, 8),
    "string size": _one("U8", ["8"], 0, 8),
    "shape is a number": _one("U8", 8, 0, 8),
    "shape is null": _one("U8", None, 0, 8),
    "size of 2^64": _one("U8", [2**64], 0, 8),
    "shape overflow to zero": _one("U8", [2**32, 2**32], 0, 0, data=0),
    "shape overflow to the right size": _one("U8", [2**61, 2**3 + 8], 0, 8),
    "bytes overflow": _one("F64", [2**61 + 1], 0, 8),
    "product of 1,200 digits": _one("U8", [2**62] * 64, 0, 8),
    "product of 6,000 digits": _one("U8", [2**62] * 320, 0, 8),
    "product of 100,000 sizes": _one("U8", [2**62] * 100_000, 0, 8),
    "shape too small for its bytes": _one("U8", [7], 0, 8),
    "shape too large for its bytes": _one("BF16", [8], 0, 8),
    "scalar of eight bytes": _one("BF16", [], 0, 8),
    # offsets and data
    "offsets reversed": _one("U8", [8], 8, 0),
    "offsets negative": _one("U8", [8], -8, 0),
    "offsets are floats": _one("U8", [8], 0.0, 8.0),
    "offsets are bools": _one("U8", [1], False, True, data=1),
    "offsets are strings": _one("U8", [8], "0", "8"),
    "one offset": _one("U8", [8], 0),
    "three offsets": _one("U8", [8], 0, 8, 16),
    "offset of 2^63": _one("U8", [0], 2**63, 2**63, data=0),
    "offset far beyond the file": _one("U8", [8], 2**40, 2**40 + 8),
    "offsets do not begin at zero": _one("U8", [7], 1, 8),
    "tensors overlap": _two((0, 8), (4, 12), 12),
    "two names for the same bytes": _two((0, 8), (0, 8), 8),
    "gap between tensors": _two((0, 8), (9, 17), 17),
    "one tensor inside another": _two((0, 16), (4, 8), 16),
    "data one byte short": _one("U8", [8], 0, 8, data=7),
    "data one byte long": _one("U8", [8], 0, 8, data=9),
    "no data at all": _one("U8", [8], 0, 8, data=0),
    "data without tensors": file_bytes(b"{}", bytes(8)),
    "truncated in the data": valid_file()[:-3],
    "truncated in the header": valid_file()[:40],
    "trailing byte": valid_file() + b"\0",
    "two files in one": valid_file() * 2,
    # metadata
    "metadata is a list": _raw('{"__metadata__": []}', 0),
    "metadata is null": _raw('{"__metadata__": null}', 0),
    "metadata holds a number": _raw('{"__metadata__": {"format": 1}}', 0),
    "metadata holds an object": _raw('{"__metadata__": {"format": {}}}', 0),
    "tensor called __metadata__": _raw(f'{{"__metadata__": {_ENTRY}}}'),
    "metadata twice": _raw(f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {_ENTRY}}}'),
}
"""What it abuses to the file's bytes."""
