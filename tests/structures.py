"""Documents with a wrong value somewhere: hypothesis strategies, and how they are written to files.

A valid document is broken in one or two places: any value becomes one of another type, a key goes
or comes. JSON has what `json` writes, NaN and lone surrogates included; TOML has dates for null.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import zlib
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

__all__ = ["DEEP", "as_journal", "as_json", "as_toml", "broken", "changed"]

DEEP = "nested 3,000 deep"
"""Stands for a list in a list in a list: neither `json` nor `copy` could handle the real one."""

_NESTED = "[" * 3000 + "]" * 3000

_WORDS = (
    "",
    "abc",
    "BF16 [x]",
    "../../etc/passwd",
    "/dev/zero",
    "a\nb\x1b[31m|`<b>",
    "\ud800",
    "٣",
)
_NUMBERS = (0, 1, -1, 7, 2**31, 2**63, -(2**64), 10**400, 0.5, -1.5, 1e308, math.nan, -math.inf)
_REST: tuple[Any, ...] = (
    None,
    True,
    False,
    DEEP,
    [],
    [None],
    [[]],
    [-1],
    ["x", 2],
    {},
    {"": None},
    {"a": {"b": []}},
)

_KEYS = (
    "stranger",
    "\ud800\n",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "rope_type",
    "factor",
    "image_size",
    "auto_map",
    "added_tokens_decoder",
    "chat_template",
    "extra_special_tokens",
    "eos_token_id",
    "temperature",
    "patterns",
    "shard_bytes",
    "added",
    "amended",
    "verified",
    "measures",
    "quantized",
    "repo",
)
"""Keys that a document may get: some reader looks for each."""

_ANY = st.one_of(
    st.sampled_from(_WORDS),
    st.sampled_from(_NUMBERS),
    st.sampled_from(_REST),
    st.text(max_size=12) | st.integers() | st.floats(),
    st.lists(st.sampled_from(_WORDS + _NUMBERS), max_size=4),
    st.dictionaries(st.sampled_from(_KEYS), st.sampled_from(_WORDS + _NUMBERS + _REST), max_size=3),
)

_SHOWN = 4
"""Of a long list or table the first entries are broken, and the last: the others are like them."""

_Key = str | int


def broken(document: Any) -> st.SearchStrategy[Any]:
    """Return a strategy of the document with one or two places broken, or another value."""
    once = _broken_once(document)
    return st.one_of(once, once, once.flatmap(_broken_once), _ANY)


def _broken_once(document: Any) -> st.SearchStrategy[Any]:
    places = [place for place in _places(document) if place]
    if not places:
        return _ANY
    return st.builds(changed, st.just(document), st.sampled_from(places), _changes())


def _changes() -> st.SearchStrategy[tuple[str, str, Any]]:
    kinds = st.sampled_from(("replace", "replace", "replace", "delete", "add", "wrap"))
    return st.tuples(kinds, st.sampled_from(_KEYS), _ANY)


def _places(value: Any, at: tuple[_Key, ...] = ()) -> Iterator[tuple[_Key, ...]]:
    """Yield the place of every value, by keys and numbers from the top."""
    yield at
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    if len(keys) > 2 * _SHOWN and at and isinstance(keys[0], int | str) and _alike(value, keys):
        keys = [*keys[:_SHOWN], keys[-1]]
    for key in keys:
        yield from _places(value[key], (*at, key))


def _alike(value: Any, keys: list[Any]) -> bool:
    return len({type(value[key]) for key in keys}) == 1


def changed(document: Any, place: tuple[_Key, ...], change: tuple[str, str, Any]) -> Any:
    """Return a copy of the document with one change: what, the name of a new key, the value."""
    kind, name, new = change
    result = copy.deepcopy(document)
    parent: Any = result
    for key in place[:-1]:
        parent = parent[key]
    last: Any = place[-1]
    if kind == "delete":
        del parent[last]
    elif kind == "add" and isinstance(parent, dict):
        parent[name] = new
    elif kind == "add":
        parent.append(new)
    elif kind == "wrap":
        old = parent[last]
        parent[last] = {"": old} if isinstance(old, list) else [old]
    else:
        parent[last] = new
    return result


def as_json(value: Any) -> bytes:
    """Write JSON."""
    text = json.dumps(value).replace(json.dumps(DEEP), _NESTED)
    return text.encode()


def as_journal(lines: Any) -> bytes:
    """Write the lines of a journal, each with its checksum."""
    texts = [as_json(line) for line in lines] if isinstance(lines, list) else [as_json(lines)]
    return b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


def as_toml(value: Any) -> bytes:
    """Write TOML, all tables inline but the top one; what is no table at the top is a key."""
    table = value if isinstance(value, dict) else {"value": value}
    lines = [f"{_quoted(key)} = {_toml(item)}\n" for key, item in table.items()]
    return "".join(lines).encode()


def _toml(value: Any) -> str:
    if value is None:
        return datetime.date(1979, 5, 27).isoformat()
    if value == DEEP:
        return _NESTED
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def _quoted(text: str) -> str:
    # TOML has no lone surrogates, and no DEL
    return json.dumps(text.encode(errors="replace").decode()).replace("\x7f", "\\u007f")
