"""The result of comparing settings, and equality of JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.source import read_json
from qwen35.display import cut
from qwen35.errors import Finding, InputError

__all__ = ["ABSENT", "SettingsComparison", "same_value", "settings_of", "shown", "text_of"]

ABSENT = object()
"""Stands for the value of a key that one side lacks."""


@dataclass
class SettingsComparison:
    """Everything but weights, compared with the source.

    Args:
        findings: differences that change behaviour.
        notes: differences that do not.
        skipped: what could not be compared, and why.
        kin: whether this can be the artifact's source.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    kin: bool = True

    def differ(
        self,
        check: str,
        subject: str,
        here: Mapping[str, Any],
        there: Mapping[str, Any],
        *,
        unknown: Set[str] = frozenset(),
    ) -> None:
        """Add a finding for each key whose values differ; keys may be missing.

        Keys in `unknown`, which only one side has and nothing here understands, are skipped.
        """
        if unknown:
            names = cut(", ".join(sorted(unknown)), 200)
            self.skipped.append(f"{subject}: unknown keys that only one side has: {names}")
        for key in dict.fromkeys((*there, *here)):
            if key in unknown:
                continue
            ours, theirs = here.get(key, ABSENT), there.get(key, ABSENT)
            if not same_value(ours, theirs):
                message = f"{key} is {shown(ours, theirs)}, the source has {shown(theirs, ours)}"
                self.findings.append(Finding(check, subject, message))


def same_value(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; 1 equals 1.0, but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return bool(one == other)


def shown(value: Any, other: Any = None) -> str:
    """Format a value for a message; for two long lists, show only the first difference."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, list | tuple) and isinstance(other, list | tuple) and len(value) > 8:
        if len(value) != len(other):
            return f"{len(value)} values long"
        at = next((i for i, (a, b) in enumerate(zip(value, other, strict=True)) if a != b), 0)
        return f"{cut(repr(value[at]), 80)} at {at}"
    return cut(repr(value), 80)


def settings_of(place: FileLocation, name: str) -> dict[str, Any] | None:
    """Return a parsed JSON file of a checkpoint; None if it is missing.

    Raises:
        InputError: it is damaged, or not a JSON object.
    """
    if name not in place.sizes():
        return None
    parsed = read_json(place, name)
    if not isinstance(parsed, dict):
        raise InputError(name, "not a JSON object")
    return parsed


def text_of(place: FileLocation, name: str, limit: int) -> str | None:
    """Return a text file of a checkpoint; None if it is missing.

    Raises:
        InputError: it is larger than `limit` bytes, or not UTF-8.
    """
    size = place.sizes().get(name)
    if size is None:
        return None
    if size > limit:
        raise InputError(name, f"{size} bytes", expected=f"at most {limit}")
    try:
        return place.read(name, 0, size).decode()
    except UnicodeDecodeError as error:
        raise InputError(name, "not UTF-8 text") from error
