"""A stranger's tokenizer.json, loaded and used in a bounded child.

Its regular expressions may need ages, its replacements more memory than there is, and the library
that reads it may crash.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.errors import ConfigError
from qwen35.planning import tokenizer_child
from qwen35.planning.bounded_child import Limits, run_bounded

if TYPE_CHECKING:
    from qwen35.array_types import I32

__all__ = ["TOKENIZER_NAME", "check_tokenizer", "encode_bounded", "why_not_loaded"]

TOKENIZER_NAME = "tokenizer.json"
SECONDS, SECONDS_PER_BYTE = 60, 1e-5
"""Loading the largest tokenizers takes a second or two, encoding a megabyte less than one."""

MEMORY, MEMORY_PER_BYTE = 2**32, 2**10
_MOST_TOKENS = 2
"""Tokens per byte of a text; the tokenizers of this family have one at most."""


def why_not_loaded(content: bytes) -> str:
    """Return why tokenizer.json does not load; empty if it does, or if there is no library."""
    try:
        encode_bounded(content, ())
    except ConfigError as error:
        return error.found
    return ""


def check_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Check that a folder's tokenizer, if it has one, encodes texts.

    Raises:
        ConfigError: it does not, or goes beyond the limits.
    """
    path = folder / TOKENIZER_NAME
    if path.is_file():
        encode_bounded(path.read_bytes(), [text.encode(errors="replace") for text in texts])


def encode_bounded(content: bytes, texts: Sequence[bytes]) -> list[I32]:
    """Return the ids of UTF-8 texts, without special tokens before or after; [] without a library.

    Truncation and padding that the tokenizer asks for are left out.

    Args:
        content: of tokenizer.json.
        texts: UTF-8.

    Raises:
        ConfigError: it does not load, does not encode a text, or goes beyond the limits.
    """
    if importlib.util.find_spec("tokenizers") is None:
        return []
    size = sum(map(len, texts))
    limits = Limits(
        seconds=SECONDS + size * SECONDS_PER_BYTE,
        memory=MEMORY + size * MEMORY_PER_BYTE,
        output=2**16 + 4 * _MOST_TOKENS * size,
    )
    blocks = (content, *texts)
    data = b"".join(part for block in blocks for part in (len(block).to_bytes(8, "little"), block))
    program = Path(tokenizer_child.__file__)
    try:
        found, whole = run_bounded(program, data, limits, ("tokenizers",))
    except OSError as error:
        raise _problem(f"no process to load it in: {error.strerror}") from error
    if not whole:
        what = "crashes" if not texts else f"crashes on a text of {size} bytes"
        raise _problem(f"it {what}, or takes more than {limits}")
    if found[:1] != b"I":
        raise _problem(found[1:].decode(errors="replace"))
    return _ids(found[1:], len(texts))


def _ids(data: bytes, count: int) -> list[I32]:
    import numpy as np

    numbers = np.frombuffer(data, "<u4").astype(np.int32)
    rows, at = [], 0
    for _ in range(count):
        end = at + 1 + int(numbers[at])
        rows.append(numbers[at + 1 : end])
        at = end
    return rows


def _problem(found: str) -> ConfigError:
    return ConfigError(TOKENIZER_NAME, found)
