"""Keys of config.json that name code or files to be loaded besides the checkpoint's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["code_keys", "without_code"]

_ALWAYS = ("auto_map", "transformers_weights")
"""Python files, and a file of weights that transformers reads instead of the checkpoint's."""

_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?\Z")
_OWN = re.compile(r"[\w|.-]*\Z", re.ASCII)
"""Transformers' own implementations; any other name is a repository of kernels: native code."""


def code_keys(raw: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of such keys, those in nested sections included."""
    for key, value in raw.items():
        if _names_code(key, value):
            yield f"{path}{key}"
        elif isinstance(value, Mapping):
            yield from code_keys(value, f"{path}{key}.")


def without_code(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without them."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if not _names_code(key, value)
    }


def _names_code(key: str, value: Any) -> bool:
    if _IMPLEMENTATION.match(key):
        return not _is_own(value)
    return key in _ALWAYS and bool(value)


def _is_own(value: Any) -> bool:
    if isinstance(value, Mapping):  # one for each section
        return all(_is_own(one) for one in value.values())
    return value is None or (isinstance(value, str) and _OWN.match(value) is not None)
