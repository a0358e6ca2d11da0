"""What earlier runs did, so that a run does only what is missing or changed.

Nothing is believed without a look: a step counts as done if its key is the one of now, and the
files that it wrote still have the hashes that it recorded. A key is a hash of everything that
decides the result: plan digest, content of the source, tool version.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import json_bytes
from qwen35.sinks.files import write_file
from qwen35.sinks.staging import os_errors
from qwen35.version import __version__

__all__ = ["STATE_NAME", "RunState", "key_of"]

STATE_NAME = "qwen35-run.json"
"""The file in a run's folder that remembers it."""

_VERSION = 1


def key_of(*parts: Any) -> str:
    """Return a hash of `parts` and the tool's version."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class RunState:
    """What is remembered of a run's steps.

    Args:
        path: the file.
        steps: name of a step to its key and what it recorded.
    """

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read what is remembered in `folder`; a file that is damaged remembers nothing."""
        path = folder / STATE_NAME
        try:
            parsed = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls(path)
        steps = parsed.get("steps") if isinstance(parsed, dict) else None
        if not isinstance(steps, dict) or parsed.get("run") != _VERSION:
            return cls(path)
        return cls(path, {name: row for name, row in steps.items() if isinstance(row, dict)})

    def recorded(self, step: str, key: str) -> dict[str, Any] | None:
        """Return what `step` recorded, if it had this key."""
        row = self.steps.get(step)
        return row if row is not None and row.get("key") == key else None

    def record(self, step: str, key: str, **facts: Any) -> None:
        """Remember a step, on the disk too.

        Raises:
            OutputError: it cannot be written.
        """
        self.steps[step] = {"key": key, **facts}
        beside = self.path.with_name(f".{STATE_NAME}.partial")
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            write_file(beside, json_bytes({"run": _VERSION, "steps": self.steps}))
            beside.replace(self.path)
