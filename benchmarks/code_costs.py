"""What choosing refined codes takes: CPU nanoseconds a weight on one core.

    python -m benchmarks.code_costs [--columns N ...]

Random weights, scales that take the largest of a block to the last level, and a Hessian whose
eigenvalues fall; without and with coordinate descent. Preparing the Hessian and judging are not
counted.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from qwen35.array_types import F32
from qwen35.codecs.fp8.arrays import e4m3_levels
from qwen35.codecs.nf4.tables import LEVELS
from qwen35.codecs.nvfp4.arrays import e2m1_values
from qwen35.codecs.refining import SWEEPS, CodeGrid, Curvature, nearest_codes, refined_codes

ROWS = 512
EVEN = np.arange(-8, 8, dtype=np.float32)
GRIDS: dict[str, tuple[F32, int]] = {
    "16 even levels": (EVEN, 32),
    "NF4": (LEVELS, 64),
    "NVFP4": (np.unique(e2m1_values()), 16),
    "FP8": (e4m3_levels().values, 128),
}
"""Levels, and weights that share a scale."""


class Pair:
    """The same Hessian to fit and to judge."""

    def __init__(self, hessian: F32) -> None:
        self.fit = self.held_out = hessian


def curvature_of(columns: int) -> Curvature:
    """Return that of made-up inputs."""
    drawn = np.random.default_rng(0).standard_normal((columns, columns))
    mixed = drawn * np.arange(1, columns + 1) ** -0.5 / np.sqrt(columns)
    return Curvature.of(Pair((mixed @ mixed.T).astype(np.float32)))


def weights_of(rows: int, columns: int) -> F32:
    """Return random weights."""
    drawn = np.random.default_rng(1).standard_normal((rows, columns)) * 0.02
    return drawn.astype(np.float32)


def grid_of(weights: F32, levels: F32, group: int) -> CodeGrid:
    """Return the nearest codes of scales that fit the largest weights."""
    largest = np.abs(weights).reshape(len(weights), -1, group).max(-1)
    scales = (largest / levels.max()).astype(np.float32)
    grid = CodeGrid(np.zeros(weights.shape, np.uint8), scales, levels)
    return replace(grid, codes=nearest_codes(weights, grid))


def first_row(grid: CodeGrid) -> CodeGrid:
    """Return the grid of the first row, to run a function before it is measured."""
    return replace(grid, codes=grid.codes[:1], scales=grid.scales[:1])


def nanoseconds(weights: F32, grid: CodeGrid, curvature: Curvature, sweeps: int) -> float:
    """Return the CPU time of a weight, after a first run, which compiles."""
    refined_codes(weights[:1], first_row(grid), curvature, sweeps)
    started = time.process_time()
    refined_codes(weights, grid, curvature, sweeps)
    return (time.process_time() - started) / weights.size * 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 1024, 2048])
    args = parser.parse_args()
    print(f"{'columns':>8}  {'levels':<16}{'feedback':>10}{'and descent':>13}")
    for columns in args.columns:
        curvature = curvature_of(columns)
        weights = weights_of(ROWS, columns)
        for name, (levels, group) in GRIDS.items():
            grid = grid_of(weights, levels, group)
            costs = [nanoseconds(weights, grid, curvature, sweeps) for sweeps in (0, SWEEPS)]
            print(f"{columns:>8}  {name:<16}{costs[0]:>10.0f}{costs[1]:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
