"""Weights, what their codes can stand for, and Hessians of made-up inputs, in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hessian_folders import inputs
from qwen35.array_types import F32, U8
from qwen35.codecs.refining import CodeGrid

INTEGERS = np.arange(16, dtype=np.float32)


@dataclass(frozen=True)
class Pair:
    """Hessians in memory."""

    fit: F32
    held_out: F32


def pair_of(columns: int, tokens: int = 400, *, seed: int = 1, spectrum: float = 1.0) -> Pair:
    return Pair(*inputs(columns, tokens, seed=seed, spectrum=spectrum))


def weights_of(rows: int, columns: int, seed: int = 0) -> F32:
    drawn = np.random.default_rng(seed).standard_t(5, (rows, columns)) * 0.02
    return drawn.astype(np.float32)


def grid_for(weights: F32, levels: F32 = INTEGERS, group: int = 32) -> CodeGrid:
    """Return the nearest codes of scales that take the extremes of a group to those of levels."""
    rows, columns = weights.shape
    groups = weights.reshape(rows, columns // group, group)
    low, high = groups.min(-1), groups.max(-1)
    scales = ((high - low) / (levels[-1] - levels[0])).astype(np.float32)
    offsets = (low - levels[0] * scales).astype(np.float32)
    grid = CodeGrid(np.zeros(weights.shape, np.uint8), scales, levels, offsets)
    return replace(grid, codes=nearest(weights, grid))


def nearest(weights: F32, grid: CodeGrid) -> U8:
    """Return the nearest codes, one by one."""
    group = weights.shape[1] // grid.scales.shape[1]
    offsets = grid.offsets if grid.offsets is not None else np.zeros_like(grid.scales)
    scales, offsets = (np.repeat(one, group, axis=1)[..., None] for one in (grid.scales, offsets))
    values = scales * grid.levels + offsets
    codes: U8 = np.abs(values - weights[..., None]).argmin(-1).astype(np.uint8)
    return codes
