"""The adapters that an output was made with, found again by their hashes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.codecs.registry import TRAINED_ON
from qwen35.errors import InputError, UsageError

if TYPE_CHECKING:
    from qwen35.checkpoint.adapter_files import Adapter

__all__ = ["are_recorded", "recorded_adapters"]

_TEXTS = ("name", "sha256", "config_sha256")


def are_recorded(source: object) -> bool:
    """Return whether the adapters of a manifest's source are well-formed, if it has any."""
    if not isinstance(source, dict) or "adapters" not in source:
        return True
    rows = source["adapters"]
    return isinstance(rows, list) and all(map(_is_row, rows))


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in _TEXTS):
        return False
    if row.get("onto", "") not in ("", *TRAINED_ON):
        return False
    return type(row.get("weight")) in (int, float) and math.isfinite(row["weight"])


def recorded_adapters(manifest: Mapping[str, Any], given: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """Return the adapters of an output, in its order and with its weights.

    Args:
        manifest: a manifest that was read (`qwen35.planning.manifest.read_manifest`).
        given: the adapters that the user gave, in any order.

    Raises:
        UsageError: one that the manifest names is not given, or with another weight.
        InputError: another one is given.
    """
    source = manifest.get("source")
    rows = source.get("adapters", []) if isinstance(source, dict) else []
    by_hash = {(adapter.sha256, adapter.config_sha256): adapter for adapter in given}
    pairs = [(row, by_hash.pop((row["sha256"], row["config_sha256"]), None)) for row in rows]
    for other in by_hash.values():
        expected = ", ".join(row["name"][:80] for row in rows) or "none"
        raise InputError(other.name, f"not an adapter of {MANIFEST_NAME}", expected=expected)
    found = []
    for row, adapter in pairs:
        if adapter is None:
            message = f"made with the adapter {row['name'][:80]!r}"
            raise UsageError(MANIFEST_NAME, message, hint="give its folder: --adapter DIR")
        found.append(_as_recorded(adapter, float(row["weight"]), row.get("onto", "")))
    return tuple(found)


def _as_recorded(adapter: Adapter, weight: float, onto: str) -> Adapter:
    if adapter.factor not in (1, weight):  # 1 also if none was given
        found = f"{adapter.title[:80]!r} with weight {adapter.factor:g}"
        expected = f"{weight:g}, as {MANIFEST_NAME} has it"
        raise UsageError("--adapter", found, expected=expected, hint="leave the weight out")
    return replace(adapter, factor=weight, onto=onto)
