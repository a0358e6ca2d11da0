"""Probing: write an artifact for an allocation and measure its divergence in its engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen35.evaluation.evaluation_run import evaluate
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import Allocation

__all__ = ["ProbeLab", "ProbeSetting", "open_lab"]

_SIDE_BY_SIDE = 8
"""Most models per evaluation, if memory allows; they share one run of the exact model."""


@dataclass(frozen=True)
class ProbeSetting:
    """How divergence is measured.

    Args:
        text: the tuning text.
        context: tokens per chunk.
        chunks: most chunks; 0 for all.
        threads: for engines.
        device: for transformers.
    """

    text: Path
    context: int
    chunks: int
    threads: int
    device: str


@dataclass(frozen=True)
class ProbeLab:
    """Writes, measures and removes artifacts.

    Args:
        space: the choices.
        setting: how divergence is measured.
        folder: for temporary files.
        reference: the exact model.
    """

    space: ChoiceSpace
    setting: ProbeSetting
    folder: Path
    reference: str

    @property
    def side_by_side(self) -> int:
        """Number of artifacts to measure at a time: together at most a quarter of memory."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        exact = {unit.name: self.space.exact for unit in self.space.units}
        # The exact model's size bounds that of any artifact.
        return max(1, min(_SIDE_BY_SIDE, memory // 4 // self.space.size(exact)))

    def measure(self, allocations: Sequence[Allocation]) -> list[float]:
        """Return the mean divergence of each allocation, in nats per token."""
        threads = self.setting.threads
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            artifacts = [
                self.space.make(chosen, Path(folder) / f"probe-{i}", threads)
                for i, chosen in enumerate(allocations)
            ]
            report = evaluate(
                self.reference,
                artifacts,
                self.setting.text,
                context=self.setting.context,
                chunks=self.setting.chunks,
                threads=threads,
                device=self.setting.device,
                simulate=False,  # weights alone are tuned
            )
        return [row.comparison.kld.value for row in report.candidates]


@contextmanager
def open_lab(
    space: ChoiceSpace, setting: ProbeSetting, folder: Path | None = None
) -> Iterator[ProbeLab]:
    """Yield a lab with the exact model in the format of its engine; remove all files after."""
    with tempfile.TemporaryDirectory(prefix="qwen35-", dir=folder) as work:
        reference = space.reference(Path(work))
        yield ProbeLab(space, setting, Path(work), reference)
