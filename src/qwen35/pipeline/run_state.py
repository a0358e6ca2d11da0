"""State of earlier runs, so that a run does only what is missing or changed.

Records are checked, not trusted: a step counts as done if its key is unchanged and the files it
wrote still have the recorded hashes. A key is a hash of everything that decides the result: plan
digest, content of the source, tool version.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.locations import read_bounded
from qwen35.errors import InputError
from qwen35.sinks.files import write_file
from qwen35.sinks.staging import os_errors
from qwen35.version import __version__

__all__ = ["STATE_NAME", "RunState", "key_of"]

STATE_NAME = "qwen35-run.json"
"""The state file in a run's folder."""

_VERSION = 1


def key_of(*parts: Any) -> str:
    """Return a hash of `parts` and the tool's version."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class RunState:
    """The recorded state of a run's steps.

    Args:
        path: the state file.
        steps: each step's key and recorded facts, by name.
    """

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the state in `folder`; a damaged file counts as empty."""
        path = folder / STATE_NAME
        try:
            parsed = json.loads(read_bounded(path))
        except (InputError, ValueError, RecursionError):  # costs a rebuild, not the run
            return cls(path)
        steps = parsed.get("steps") if isinstance(parsed, dict) else None
        if not isinstance(steps, dict) or parsed.get("run") != _VERSION:
            return cls(path)
        return cls(path, {name: row for name, row in steps.items() if isinstance(row, dict)})

    def recorded(self, step: str, key: str) -> dict[str, Any] | None:
        """Return the record of `step` if it has this key."""
        row = self.steps.get(step)
        return row if row is not None and row.get("key") == key else None

    def record(self, step: str, key: str, **facts: Any) -> None:
        """Record a step in memory and on disk.

        Raises:
            OutputError: the file cannot be written.
        """
        self.steps[step] = {"key": key, **facts}
        partial = self.path.with_name(f".{STATE_NAME}.partial")
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            write_file(partial, json_bytes({"run": _VERSION, "steps": self.steps}))
            partial.replace(self.path)  # atomic: a kill leaves the old state or the new one
