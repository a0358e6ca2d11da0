"""qwen35.json: what an output was made from, how, and what every file of it hashes to."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.plan.documents import json_bytes
from qwen35.plan.plan import Plan
from qwen35.version import __version__

__all__ = ["MANIFEST_VERSION", "Made", "manifest_bytes", "manifest_size"]

MANIFEST_VERSION = 1
"""Raised when a reader of older manifests would misread a newer one."""

_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Made:
    """What a manifest says of an output.

    Args:
        checkpoint: the source.
        recipe: name, format and rules, as plain values.
        digest: of the plan.
        sizes: bytes of every file but the manifest.
        tensors: file to tensor to type and shape.
        notes: of the plan.
    """

    checkpoint: Checkpoint
    recipe: Mapping[str, Any]
    digest: str
    sizes: Mapping[str, int]
    tensors: Mapping[str, Mapping[str, str]]
    notes: Sequence[str]

    def render(self, hashes: Mapping[str, str]) -> bytes:
        """Render the manifest; `hashes` holds the SHA-256 of every file in `sizes`."""
        return json_bytes(
            {
                "manifest": MANIFEST_VERSION,
                "tool": {"qwen35": __version__, "python": platform.python_version()},
                "source": _source(self.checkpoint),
                "recipe": self.recipe,
                "plan": self.digest,
                "files": {
                    name: {"size": size, "sha256": hashes[name]}
                    for name, size in self.sizes.items()
                },
                "tensors": self.tensors,
                "notes": list(self.notes),
            }
        )

    @property
    def nbytes(self) -> int:
        """The manifest's exact size, before there is anything to hash."""
        return len(self.render(dict.fromkeys(self.sizes, _NO_HASH)))


def manifest_bytes(plan: Plan, hashes: Mapping[str, str]) -> bytes:
    """Render the manifest.

    Args:
        plan: what was executed.
        hashes: SHA-256 of every file in `Plan.file_sizes`.
    """
    return _made(plan).render(hashes)


def _made(plan: Plan) -> Made:
    return Made(
        checkpoint=plan.checkpoint,
        recipe={
            "name": plan.recipe.name,
            "format": plan.recipe.format,
            "rules": [[r.match, r.action, r.reason] for r in plan.recipe.rules],
        },
        digest=plan.digest,
        sizes=dict(plan.file_sizes()),
        tensors={
            file.name: {
                out.name: f"{out.dtype} {list(out.shape)}"
                for step in file.steps
                for out in step.outputs
            }
            for file in plan.files
        },
        notes=plan.notes,
    )


def manifest_size(plan: Plan) -> int:
    """Return the manifest's exact size before there is anything to hash."""
    return _made(plan).nbytes


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.repo:
        return {"repo": checkpoint.repo, "revision": checkpoint.revision}
    folder = checkpoint.root.resolve() if checkpoint.root else PurePath(checkpoint.name)
    return {"folder": folder.name}
