"""Block-wise FP8 (E4M3, blocks of 128 x 128) back to numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.storage import FP8_BLOCK

__all__ = ["decode_rows", "e4m3_values"]


@lru_cache(maxsize=1)
def e4m3_values() -> npt.NDArray[np.float32]:
    """Return the value of each of the 256 E4M3 codes; 0x7F and 0xFF are NaN.

    One sign bit, four of exponent with bias 7, three of mantissa, no infinities.
    Source: OCP 8-bit floating point specification 1.0, table 1.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where(codes & 127 == 127, np.nan, values)
    return np.where(codes & 128, -values, values).astype(np.float32)


def decode_rows(codes: npt.NDArray[np.uint8], scale: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return ``value * scale`` in float32.

    Args:
        codes: [rows, columns]; the first row begins a block.
        scale: [ceil(rows / 128), ceil(columns / 128)] float32.
    """
    values = e4m3_values()[codes]
    rows, columns = codes.shape
    wide = np.repeat(scale, FP8_BLOCK, axis=1)[:, :columns]
    for block in range(len(scale)):
        values[block * FP8_BLOCK : min(rows, (block + 1) * FP8_BLOCK)] *= wide[block]
    return values
