"""qwen35.json: what an output was made from, how, and what every file of it hashes to."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from qwen35.plan.documents import json_bytes
from qwen35.plan.plan import Plan
from qwen35.version import __version__

__all__ = ["MANIFEST_VERSION", "calibration_json", "manifest_bytes", "manifest_size"]

MANIFEST_VERSION = 1
"""Raised when a reader of older manifests would misread a newer one."""

_NO_HASH = "0" * 64


def manifest_bytes(plan: Plan, hashes: Mapping[str, str]) -> bytes:
    """Render the manifest.

    Args:
        plan: what was executed.
        hashes: SHA-256 of every file in `Plan.file_sizes`.
    """
    return json_bytes(
        {
            "manifest": MANIFEST_VERSION,
            "tool": {"qwen35": __version__, "python": platform.python_version()},
            "source": _source(plan),
            "recipe": {
                "name": plan.recipe.name,
                "format": plan.recipe.format,
                "rules": [[r.match, r.action, r.reason] for r in plan.recipe.rules],
            },
            "calibration": calibration_json(plan),
            "plan": plan.digest,
            "files": {
                name: {"size": size, "sha256": hashes[name]} for name, size in plan.file_sizes()
            },
            "tensors": {
                file.name: {
                    out.name: f"{out.dtype} {list(out.shape)}"
                    for step in file.steps
                    for out in step.outputs
                }
                for file in plan.files
            },
            "notes": list(plan.notes),
        }
    )


def calibration_json(plan: Plan) -> dict[str, Any] | None:
    """Return how FP8 scales are chosen, as plain values; None if nothing is encoded as FP8."""
    if plan.calibration is None:
        return None
    statistics = plan.activations
    return {
        **asdict(plan.calibration),
        "activations": statistics and {"name": statistics.name, "sha256": statistics.sha256},
    }


def manifest_size(plan: Plan) -> int:
    """Return the manifest's exact size before there is anything to hash."""
    return len(manifest_bytes(plan, {name: _NO_HASH for name, _ in plan.file_sizes()}))


def _source(plan: Plan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    if checkpoint.repo:
        return {"repo": checkpoint.repo, "revision": checkpoint.revision}
    folder = checkpoint.root.resolve() if checkpoint.root else PurePath(checkpoint.name)
    return {"folder": folder.name}
