"""Malformed GGUF files, made in memory: one row an abuse, each must be refused."""

from __future__ import annotations

import struct

__all__ = ["ARRAY", "HOSTILE", "STRING", "U32", "file_bytes", "key", "record", "text"]

U32, STRING, ARRAY = 4, 8, 9


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def record(
    name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def file_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 128,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys = [key("general.architecture", STRING, text("qwen35"))] if keys is None else keys
    tensors = [record()] if tensors is None else tensors
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def nested(depth: int) -> bytes:
    value = struct.pack("<IQ", U32, 1) + struct.pack("<I", 1)
    for _ in range(depth):
        value = struct.pack("<IQ", ARRAY, 1) + value
    return key("deep", ARRAY, value)


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"GGU",
    "only the magic": b"GGUF",
    "other magic": file_bytes(magic=b"GGML"),
    "version 1": file_bytes(version=1),
    "big-endian": file_bytes(version=3 << 24),
    "2^63 tensors": file_bytes(counts=(2**63, 1)),
    "2^64 - 1 keys": file_bytes(counts=(1, 2**64 - 1)),
    "more tensors than bytes": file_bytes(counts=(1000, 1)),
    "a key too many": file_bytes(counts=(1, 2)),
    "key of 2^62 bytes": file_bytes([struct.pack("<Q", 2**62) + b"x"]),
    "string of 2^40 bytes": file_bytes([key("a", STRING, struct.pack("<Q", 2**40))]),
    "value type 13": file_bytes([key("a", 13, bytes(8))]),
    "array of 2^60": file_bytes([key("a", ARRAY, struct.pack("<IQ", U32, 2**60))]),
    "array of 2^24 strings in a short file": file_bytes(
        [key("a", ARRAY, struct.pack("<IQ", STRING, 2**24))]
    ),
    "array of type 99": file_bytes([key("a", ARRAY, struct.pack("<IQ", 99, 1) + bytes(8))]),
    "arrays a thousand deep": file_bytes([nested(1000)]),
    "key twice": file_bytes([key("a", U32, bytes(4))] * 2),
    "alignment zero": file_bytes([key("general.alignment", U32, bytes(4))]),
    "alignment 24": file_bytes([key("general.alignment", U32, struct.pack("<I", 24))]),
    "alignment a string": file_bytes([key("general.alignment", STRING, text("32"))]),
    "tensor without a name": file_bytes(tensors=[record("")]),
    "tensor with a long name": file_bytes(tensors=[record("n" * 500)]),
    "tensor of no dimension": file_bytes(tensors=[record(shape=())]),
    "tensor of five dimensions": file_bytes(tensors=[record(shape=(32, 1, 1, 1, 1))]),
    "tensor of size zero": file_bytes(tensors=[record(shape=(32, 0))]),
    "sizes that overflow": file_bytes(tensors=[record(shape=(2**32, 2**32))]),
    "size of 2^64 - 1": file_bytes(tensors=[record(shape=(2**64 - 1,))]),
    "type 4, removed": file_bytes(tensors=[record(kind=4)]),
    "type 1000": file_bytes(tensors=[record(kind=1000)]),
    "q4_K rows of 32": file_bytes(tensors=[record(kind=12)]),
    "tensor twice": file_bytes(tensors=[record(), record(offset=128)], data=256),
    "offset beyond the file": file_bytes(tensors=[record(offset=2**40)]),
    "offset not aligned": file_bytes(tensors=[record(offset=1)]),
    "overlapping tensors": file_bytes(tensors=[record(), record("u", offset=0)], data=256),
    "a gap between tensors": file_bytes(tensors=[record(), record("u", offset=160)], data=512),
    "data one byte short": file_bytes(data=127),
    "no data": file_bytes(data=0),
    "cut in the head": file_bytes()[:60],
}
