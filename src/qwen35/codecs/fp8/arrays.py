"""FP8 on arrays: encode and decode rows of a weight."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.codec import Refine
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8.layout import BLOCK, ScaleChoice
from qwen35.codecs.refining import CodeGrid, Levels

__all__ = ["decode_rows", "e4m3_levels", "e4m3_values", "encode_rows", "refined", "row_grid"]


def encode_rows(
    values: Array,
    dtype: str,
    scale_choice: ScaleChoice,
    weights: npt.NDArray[np.float32] | None,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint16],
) -> bool:
    """Quantize whole rows of tiles.

    Args:
        values: [rows, columns] elements of `dtype` (BF16 as uint16 bits), multiples of 128.
        dtype: BF16, F16 or F32.
        scale_choice: how to choose scales.
        weights: [columns] error weight of each column; None for equal weights.
        codes: [rows, columns], output.
        scales: [rows / 128, columns / 128] bfloat16 bits, output.

    Returns:
        True if all values are finite.
    """
    from qwen35.codecs.fp8 import kernels

    mode = kernels.MODES.index(scale_choice.mode)
    parameters = {
        "rms": scale_choice.rms_factor,
        "percentile": scale_choice.percentile,
        "mse": scale_choice.grid_size,
    }
    unweighted = weights is None or not scale_choice.weighted
    columns = np.ones(values.shape[1], np.float32) if unweighted else weights
    floats = values if dtype == "BF16" else f32_from(values, dtype)
    parameter = float(parameters.get(scale_choice.mode, 0.0))
    return int(kernels.encode(floats, mode, parameter, columns, codes, scales)) == 0


@lru_cache(maxsize=1)
def e4m3_values() -> npt.NDArray[np.float32]:
    """Return the value of each of the 256 E4M3 codes; 0x7F and 0xFF are NaN.

    One sign bit, four exponent bits with bias 7, three mantissa bits, no infinities.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where(codes & 127 == 127, np.nan, values)
    return np.where(codes & 128, -values, values).astype(np.float32)


@lru_cache(maxsize=1)
def e4m3_levels() -> Levels:
    """Return the distinct values of E4M3 codes in their order."""
    return Levels.of(e4m3_values())


def row_grid(codes: U8, scales: F32) -> CodeGrid:
    """Return what codes can stand for; arguments as for `refined`."""
    levels = e4m3_levels()
    return CodeGrid(levels.index[codes], scales, levels.values)


def refined(refine: Refine, first: int, rows: F32, codes: U8, scales: F32) -> U8:
    """Return refined E4M3 codes.

    Args:
        refine: chooses them.
        first: the number of the first row.
        rows: [n, columns] what they are for.
        codes: [n, columns] the nearest ones.
        scales: [n, groups], each for columns / groups neighbours.
    """
    found: U8 = e4m3_levels().stored[refine(first, rows, row_grid(codes, scales))]
    return found


def decode_rows(codes: npt.NDArray[np.uint8], scale: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return ``value * scale`` in float32.

    Args:
        codes: [rows, columns]; the first row starts a tile.
        scale: [ceil(rows / 128), ceil(columns / 128)] float32.
    """
    values = e4m3_values()[codes]
    rows, columns = codes.shape
    wide = np.repeat(scale, BLOCK, axis=1)[:, :columns]
    for block in range(len(scale)):
        values[block * BLOCK : min(rows, (block + 1) * BLOCK)] *= wide[block]
    return values
