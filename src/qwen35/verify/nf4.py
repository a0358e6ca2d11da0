"""Which NF4 codes and scales are not those that the source gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.codecs.nf4 import BLOCK, NESTED_BLOCK
from qwen35.codecs.nf4_arrays import Statistics
from qwen35.codecs.nf4_tables import BOUNDS, dynamic_map

__all__ = ["same_mean", "wrong_codes", "wrong_scales"]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

ABSMAX_SLACK = 1e-6
"""How far from a bound between two 8-bit codes a scale may lie: rounding of the division."""

CODE_SLACK = 1e-5
"""How far beyond a bound between two levels a quotient may lie: rounding of the division."""


def wrong_codes(packed: Array, expected: Array, values: F32, absmax: F32) -> int:
    """Count codes whose level is not the nearest, but for quotients on a bound.

    A block of zeros may hold any code: its scale decides, and bitsandbytes on CUDA writes code 0.
    """
    bad = np.flatnonzero(packed != expected)
    index = (2 * bad[:, None] + np.arange(2)).reshape(-1)
    pairs = packed[bad]
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1).astype(np.int64)
    scale = absmax[index // BLOCK]
    quotient = np.divide(
        values[index], scale, out=np.zeros(len(index), np.float32), where=scale > 0
    )
    lower = np.concatenate([[-np.inf], BOUNDS])[codes]
    upper = np.concatenate([BOUNDS, [np.inf]])[codes]
    near = (quotient >= lower - CODE_SLACK) & (quotient <= upper + CODE_SLACK)
    return int(np.count_nonzero(~near & (scale > 0)))


def wrong_scales(codes: Array, nested: F32, offset: float, true: F32) -> int:
    """Count 8-bit codes that neither bitsandbytes' CPU table nor the nearest value gives.

    bitsandbytes on CUDA takes the nearest value of the dynamic map, on a CPU that of a table which
    is one code off now and then.
    """
    expected = Statistics.of(true, offset)
    if not np.allclose(nested, expected.nested, rtol=1e-5, atol=0):
        return len(true)
    scale = np.repeat(expected.nested, NESTED_BLOCK)[: len(true)].astype(np.float64)
    values = (true - np.float32(offset)) / np.where(scale > 0, scale, 1)
    table = dynamic_map().astype(np.float64)
    bounds = (table[:-1] + table[1:]) / 2
    lowest = np.searchsorted(bounds, values - ABSMAX_SLACK)
    highest = np.searchsorted(bounds, values + ABSMAX_SLACK)
    near = (codes >= lowest) & (codes <= highest)
    return int(np.count_nonzero(~near & (codes != expected.codes) & (scale > 0)))


def same_mean(offset: float, true: F32) -> bool:
    """Whether an offset is the mean of the scales, but for the sum's rounding."""
    return abs(offset - float(true.mean(dtype=np.float64))) <= 1e-5 * float(np.abs(true).max())
