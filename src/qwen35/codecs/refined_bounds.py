"""How far refined codes may be from their weights: what a comparison with the source allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qwen35.array_types import F32
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.refining import REACH, CodeGrid, Curvature, nearest_codes, row_losses

__all__ = ["GREATER", "TOLERANCE", "OutputErrors", "RefinedErrors"]

GREATER = 2.25
"""The most that errors of a weight may grow: `qwen35.execution.refiners` lets them double, relative
to codes that another scale may have chosen."""

_SLACK = 1e-4

TOLERANCE = (
    f"refined codes: errors of a weight as a whole up to {GREATER} times those of the nearest "
    f"codes, and of single codes up to {REACH + 0.5} of the largest steps between codes"
)
"""The largest differences that a comparison misses, beside those of plain codes."""


_NEARLY = 0.02
"""What the losses of plain codes and of the nearest ones for the scales as stored may differ by."""


_ROW = 1.25
"""How much more than the nearest codes those of a row may lose on the tokens that they are fitted
to: less is expected, in each row."""


@dataclass
class OutputErrors:
    """Errors of a layer's outputs, by refined codes and by the nearest ones.

    Matrices are judged on held-out tokens, as when they were written, and rows on the others.

    Args:
        curvature: returns that of a matrix, given its number; None if its codes are plain.
        height: rows of each matrix.
    """

    curvature: Callable[[int], Curvature | None]
    height: int
    _done: int = 0
    _rows: int = 0
    _losses: dict[int, tuple[float, float]] = field(default_factory=lambda: defaultdict(_nothing))

    def add(self, exact: F32, grid: CodeGrid) -> None:
        """Add the rows behind those before, of one matrix; arguments as for `RefinedErrors`."""
        number = self._done // self.height
        self._done += len(exact)
        curvature = self.curvature(number)
        if curvature is None or not curvature.useful:
            return
        nearest = nearest_codes(exact, grid)
        own, near = self._losses[number]
        own += float(row_losses(exact, grid, grid.codes, curvature).sum())
        near += float(row_losses(exact, grid, nearest, curvature).sum())
        self._losses[number] = own, near
        fitted = curvature.fitted
        rows = [row_losses(exact, grid, codes, fitted) for codes in (grid.codes, nearest)]
        self._rows += int(np.count_nonzero(rows[0] > rows[1] * _ROW))

    def report(self, result: WeightComparison) -> None:
        """Report matrices whose refined codes are worse than the nearest."""
        worse = sum(own > near * (1 + _NEARLY) for own, near in self._losses.values())
        if worse:
            message = (
                f"refined codes of {worse} of {len(self._losses)} matrices err more in outputs "
                "than the nearest codes would"
            )
            result.found("outputs", message)
        elif self._rows:
            message = f"refined codes of {self._rows} rows err more than the nearest codes would"
            result.found("outputs", message)


def _nothing() -> tuple[float, float]:
    return 0.0, 0.0


@dataclass
class RefinedErrors:
    """Errors of the refined codes of a weight, and of the nearest ones.

    Args:
        squared: sum of squared differences.
        nearest: the same of the nearest codes.
        far: codes that are further from their weight than refining goes.
        outputs: adds up errors in outputs, if they are to be judged too.
    """

    squared: float = 0.0
    nearest: float = 0.0
    far: int = 0
    outputs: OutputErrors | None = None

    def add(self, exact: F32, grid: CodeGrid) -> None:
        """Add rows.

        Args:
            exact: [rows, columns] of the source.
            grid: their codes.
        """
        _, _, step = grid.spacing()
        scales = np.repeat(grid.scales, exact.shape[1] // grid.scales.shape[1], axis=1)
        nearest = nearest_codes(exact, grid)
        least = np.abs(grid.values(nearest).astype(np.float64) - exact)
        error = np.abs(grid.values(grid.codes).astype(np.float64) - exact)
        allowed = np.maximum((REACH + 0.5) * step * np.abs(scales), least) * (1 + _SLACK)
        self.far += int(np.count_nonzero(~(error <= allowed) & (scales != 0)))
        self.squared += float(np.square(error).sum())
        self.nearest += float(np.square(least).sum())
        if self.outputs is not None:
            self.outputs.add(exact, grid)

    def report(self, result: WeightComparison) -> None:
        """Report codes that are too far, or errors that are too large as a whole."""
        if self.outputs is not None:
            self.outputs.report(result)
        if self.far:
            message = f"{self.far} codes are further from the source than refining moves any"
            result.found("codes", message)
        elif self.squared > GREATER**2 * self.nearest:
            times = (self.squared / self.nearest) ** 0.5 if self.nearest else float("inf")
            message = f"errors {times:.1f} times those of the nearest codes, at most {GREATER} here"
            result.found("codes", message)
