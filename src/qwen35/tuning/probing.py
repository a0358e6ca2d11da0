"""True divergences: artifacts made by an allocation, run in their engine beside the exact model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen35.evaluation.evaluation_run import evaluate
from qwen35.tuning.fit import UnitGroup
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import Allocation

__all__ = ["ProbeLab", "ProbeSetting", "opened", "probe_choices"]

_SIDE_BY_SIDE = 8
"""Models that run at a time, if memory allows; the exact one runs once for all of them."""


@dataclass(frozen=True)
class ProbeSetting:
    """How divergence is measured.

    Args:
        text: what on.
        context: tokens a chunk.
        chunks: at most so many; 0 for all.
        threads: of engines.
        device: for transformers.
    """

    text: Path
    context: int
    chunks: int
    threads: int
    device: str


@dataclass(frozen=True)
class ProbeLab:
    """Where artifacts are made, measured and removed.

    Args:
        space: the choices.
        setting: how divergence is measured.
        folder: for files of a moment.
        reference: the exact model.
    """

    space: ChoiceSpace
    setting: ProbeSetting
    folder: Path
    reference: str

    @property
    def side_by_side(self) -> int:
        """How many artifacts are measured at a time, by the memory that they take."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        exact = {unit.name: self.space.exact for unit in self.space.units}
        return max(1, min(_SIDE_BY_SIDE, memory // 4 // self.space.size(exact)))

    def measure(self, allocations: Sequence[Allocation]) -> list[float]:
        """Return the mean divergence of each allocation, in nats a token."""
        threads = self.setting.threads
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            made = [
                self.space.make(chosen, Path(folder) / f"probe-{i}", threads)
                for i, chosen in enumerate(allocations)
            ]
            report = evaluate(
                self.reference,
                made,
                self.setting.text,
                context=self.setting.context,
                chunks=self.setting.chunks,
                threads=threads,
                device=self.setting.device,
            )
        return [row.comparison.kld.value for row in report.candidates]


@contextmanager
def opened(
    space: ChoiceSpace, setting: ProbeSetting, folder: Path | None = None
) -> Iterator[ProbeLab]:
    """Make the exact model for the engine of `space`, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="qwen35-", dir=folder) as work:
        reference = space.reference(Path(work))
        yield ProbeLab(space, setting, Path(work), reference)


def probe_choices(space: ChoiceSpace, group: UnitGroup) -> list[str]:
    """Return the types that a group is measured in: a small one and the most precise.

    The smallest of all is often far from where the divergence is still a sum, so it is left out
    where there are enough others.
    """
    sizes = {unit.name: unit.sizes for unit in space.units}
    common = [c for c in sizes[group.units[0]] if all(c in sizes[name] for name in group.units)]
    packed = [choice for choice in common if choice != space.exact]
    if len(packed) <= 1:
        return packed
    return [packed[min(2, len(packed) - 2)], packed[-1]]
