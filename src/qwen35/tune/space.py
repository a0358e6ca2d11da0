"""What a format offers: its units, their errors, and artifacts made by an allocation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qwen35.progress import Progress
from qwen35.tune.units import Allocation, Unit

__all__ = ["Space"]


class Space(Protocol):
    """The choices for one checkpoint in one format."""

    @property
    def format(self) -> str:
        """Of the recipes."""

    @property
    def units(self) -> Sequence[Unit]:
        """What can be decided."""

    @property
    def exact(self) -> str:
        """The choice that changes nothing."""

    @property
    def weights(self) -> int:
        """Weights of the artifact, decided or not: what bits per weight are counted by."""

    def size(self, chosen: Allocation) -> int:
        """Return the exact bytes of the weight files of an artifact."""

    def errors(self, threads: int, progress: Progress) -> dict[str, dict[str, float]]:
        """Measure the relative squared error of every unit in each of its choices, in one read."""

    def recipe(self, chosen: Allocation, description: str, *, explicit: bool = False) -> str:
        """Return the recipe that makes an artifact so."""

    def reference(self, folder: Path) -> str:
        """Return the unquantized model for the engine that runs the artifacts; made if need be."""

    def make(self, chosen: Allocation, out: Path, threads: int) -> str:
        """Write an artifact; return what an evaluation takes."""
