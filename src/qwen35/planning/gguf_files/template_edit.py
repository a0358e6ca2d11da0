"""Put another chat template into a written GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path

from qwen35.checkpoint.gguf_header import read_container
from qwen35.errors import InputError
from qwen35.planning.container import EditedFile

__all__ = ["with_template"]

_KEY = b"tokenizer.chat_template"
_STRING = struct.pack("<I", 8)
_COUNT = struct.Struct("<Q")
_COUNT_AT = 16
"""The number of keys follows magic, version and number of tensors."""


def with_template(path: Path, template: str) -> EditedFile:
    """Return a file with another chat template; offsets of tensors count from their data's begin.

    Raises:
        InputError: the file cannot be read, or is not one that this package writes.
    """
    header = read_container(path)
    with path.open("rb") as file:
        head = file.read(header.data)
    value = _string(template.encode())
    if _KEY.decode() in header.spans:
        if not isinstance(header.keys[_KEY.decode()], str):
            raise InputError(path.name, f"its {_KEY.decode()} is no text")
        begin, end = header.spans[_KEY.decode()]
    else:  # as the last key
        begin = end = max((end for _, end in header.spans.values()), default=_COUNT_AT + 8)
        value = _string(_KEY) + _STRING + value
        (count,) = _COUNT.unpack_from(head, _COUNT_AT)
        head = head[:_COUNT_AT] + _COUNT.pack(count + 1) + head[_COUNT_AT + 8 :]
    head = head[:begin] + value + head[end : header.records]
    return EditedFile(head + bytes(-len(head) % header.alignment), path, header.data)


def _string(content: bytes) -> bytes:
    return _COUNT.pack(len(content)) + content
