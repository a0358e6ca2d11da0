"""What differs between the keys of two runs, in words: why one cannot continue the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["key_differences"]

_SHOWN = 3


def key_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the parts of a run's key that differ from an earlier one's.

    Each tool is listed with both versions, and files of a source with what changed.

    Args:
        then: the earlier key, read from a file: its values may be of any JSON type.
        now: the key of this run (`qwen35.planning.manifest.work_key`).

    >>> files = {"a": [5, 1], "b": [5, 1]}
    >>> touched = {**files, "b": [5, 2]}
    >>> key_differences({"source": {"files": files}}, {"source": {"files": touched}})
    ['source (b has another time)']
    """
    names = []
    for name in now:
        before, after = then.get(name), now[name]
        if name == "tool version" and isinstance(after, dict):
            tools = before if isinstance(before, dict) else {}
            changed = (tool for tool in after if tools.get(tool) != after[tool])
            names += [f"{tool} ({tools.get(tool)}, here {after[tool]})" for tool in changed]
        elif before != after:
            names.append(f"{name}{_files(before, after)}")
    return names


def _files(then: Any, now: Any) -> str:
    """Return what differs between two states of the same source's files; empty if it is another."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return ""
    before, after = then.get("files"), now.get("files")
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return ""
    if {**then, "files": None} != {**now, "files": None}:
        return ""
    changes = list(_changes(before, after))
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return f" ({', '.join(changes[:_SHOWN])}{more})"


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if before is None or after is None:
            yield f"{name} is {'new' if before is None else 'gone'}"
        elif isinstance(before, list) and before[:1] == after[:1]:  # size and time
            yield f"{name} has another time"
        else:
            yield f"{name} has another size"
