"""Cut a GGUF file into several, with the heads that llama-gguf-split gives them.

Source: https://github.com/ggml-org/llama.cpp/blob/b5734/tools/gguf-split/gguf-split.cpp
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from qwen35.checkpoint.split_gguf import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.planning.gguf_files.metadata import RenderedHeader, padded, squeezed
from qwen35.tensors import TensorSpec

__all__ = ["grouped", "split_heads", "split_nbytes"]

_NO_KEYS = 24
"""Bytes before the keys: magic, version, and the numbers of tensors and keys."""

_UINT16, _INT32 = 2, 5
_COUNTS = struct.Struct("<QQ")
_COUNTS_AT = 8


def grouped(units: Iterable[Sequence[TensorSpec]], limit: int) -> list[list[TensorSpec]]:
    """Group a file's tensors into files.

    Only tensors count towards the limit, not heads, and a tensor larger than it has a file of its
    own, as in llama-gguf-split.

    Args:
        units: tensors in the file's order; those of one unit stay together.
        limit: bytes of a file's tensors.
    """
    groups: list[list[TensorSpec]] = [[]]
    held = 0
    for unit in units:
        nbytes = sum(padded(part.nbytes) for part in unit)
        if groups[-1] and held + nbytes > limit:
            groups.append([])
            held = 0
        groups[-1] += unit
        held += nbytes
    return groups


def split_heads(
    head: RenderedHeader, groups: Sequence[Sequence[TensorSpec]]
) -> list[RenderedHeader]:
    """Return the head of each file; all but the keys of the split are in the first.

    Args:
        head: of the file in one piece.
        groups: its tensors by file, from `grouped`.
    """
    _, count = _COUNTS.unpack_from(head.content, _COUNTS_AT)
    total = sum(map(len, groups))
    heads = []
    for number, group in enumerate(groups):
        own = head.content[_NO_KEYS : head.keys] if number == 0 else b""
        keys = 3 + (count if number == 0 else 0)
        content = head.content[:_COUNTS_AT] + _COUNTS.pack(len(group), keys)
        content += own + _split_keys(number, total, len(groups))
        heads.append(_with_records(content, group))
    return heads


def split_nbytes(keys: int, groups: Sequence[Sequence[TensorSpec]]) -> int:
    """Return the bytes of all files.

    Args:
        keys: where the keys end in the file in one piece.
        groups: its tensors by file, from `grouped`.
    """
    total, split = 0, len(_split_keys(0, 0, 0))
    for number, group in enumerate(groups):
        records = sum(len(_record(part, 0)) for part in group)
        total += padded((keys if number == 0 else _NO_KEYS) + split + records)
        total += sum(padded(part.nbytes) for part in group)
    return total


def _with_records(content: bytes, group: Sequence[TensorSpec]) -> RenderedHeader:
    keys, position = len(content), 0
    begins: dict[str, int] = {}
    for part in group:
        begins[part.name] = position
        content += _record(part, position)
        position += padded(part.nbytes)
    records = len(content)
    data = padded(records)
    content += bytes(data - records)
    offsets = {name: data + begin for name, begin in begins.items()}
    return RenderedHeader(content, keys, records, offsets, data + position)


def _split_keys(number: int, tensors: int, count: int) -> bytes:
    # In this order, since llama-gguf-split sets the count last.
    return b"".join(
        (
            _text(SPLIT_NUMBER) + struct.pack("<IH", _UINT16, number),
            _text(SPLIT_TENSORS) + struct.pack("<Ii", _INT32, tensors),
            _text(SPLIT_COUNT) + struct.pack("<IH", _UINT16, count),
        )
    )


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _record(part: TensorSpec, begin: int) -> bytes:
    """Return a tensor's record: name, sizes from the innermost on, type and offset."""
    sizes = tuple(reversed(squeezed(part.shape)))
    kind = GGML_TYPES[part.dtype].code
    return _text(part.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, begin)
