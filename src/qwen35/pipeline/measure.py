"""The seam to evaluation: what it is given, and what it must leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import UsageError
from qwen35.pipeline.planned import Artifact
from qwen35.progress import Progress

__all__ = ["REPORT_FOLDER", "Evaluate", "candidates", "evaluator"]

REPORT_FOLDER = "report"
"""The folder in a run's folder that holds report.json and report.html."""


class Evaluate(Protocol):
    """Measures candidates against their base on a text, and writes report.json to a folder."""

    def __call__(
        self,
        base: Checkpoint,
        candidates: Sequence[Path],
        text: Path,
        report: Path,
        *,
        threads: int,
        progress: Progress,
    ) -> None:
        """Measure; ``report`` is the folder to write to."""


def candidates(artifacts: Sequence[Artifact]) -> list[Path]:
    """Return what is measured: the folder of each artifact, or each of its GGUF models."""
    found: list[Path] = []
    for artifact in artifacts:
        if artifact.kind != "gguf":
            found.append(artifact.out)
            continue
        models = sorted(artifact.out.glob("*.gguf"))
        found += [path for path in models if not path.name.startswith("mmproj-")]
    return found


def evaluator() -> Evaluate:
    """Return what measures.

    Raises:
        UsageError: this version has nothing that does.
    """
    raise UsageError("evaluate", "not a part of this version", hint="leave the text out")
