"""NVFP4 on arrays: the scale of a whole weight, and rows encoded and decoded."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.codec import Refine
from qwen35.codecs.floats import f32_from
from qwen35.codecs.nvfp4.layout import BLOCK, RANGE
from qwen35.codecs.refining import CodeGrid, Levels

__all__ = ["decode_rows", "e2m1_values", "encode_rows", "refined", "row_grid", "whole_scale"]

_TINY = np.finfo(np.float32).tiny


def whole_scale(largest: float) -> np.float32:
    """Return 2688 times the inverse of the largest magnitude; 1 if there is none to speak of.

    The inverse is rounded before the product, as torch divides a number by a tensor.
    """
    with np.errstate(over="ignore"):
        scale = np.float32(RANGE) * (np.float32(1) / max(np.float32(largest), _TINY))
    return scale if np.isfinite(scale) else np.float32(1)


def encode_rows(
    values: Array, dtype: str, whole: np.float32, weights: F32 | None, *, search: bool
) -> tuple[U8, U8]:
    """Quantize rows.

    Args:
        values: [rows, columns] elements of `dtype` (BF16 as uint16 bits), finite.
        dtype: BF16, F16 or F32.
        whole: as `whole_scale` returns it.
        weights: [columns] error weight of each column; None for equal weights.
        search: whether the scales of blocks are searched; else from their largest magnitudes.

    Returns:
        Codes [rows, columns / 2], two a byte, and the scales' E4M3 codes [rows, columns / 16].
    """
    from qwen35.codecs.nvfp4 import kernels

    rows, columns = values.shape
    words = np.empty((rows, columns // 8), np.int32)
    scales = np.empty((rows, columns // BLOCK), np.uint8)
    flat = np.ascontiguousarray(values if dtype == "BF16" else f32_from(values, dtype)).reshape(-1)
    even = weights is None or not weights.any()
    importance = None if even else weights
    kernels.encode(flat, importance, whole, search, words.reshape(-1), scales.reshape(-1))
    return words.view(np.uint8), scales


def e2m1_values() -> F32:
    """Return the value of each of the 16 E2M1 codes; the fourth bit is the sign."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([magnitudes, -magnitudes])


@lru_cache(maxsize=1)
def e2m1_levels() -> Levels:
    """Return the distinct values of E2M1 codes in their order."""
    return Levels.of(e2m1_values())


def row_grid(codes: U8, units: F32) -> CodeGrid:
    """Return what codes can stand for; arguments as for `refined`."""
    levels = e2m1_levels()
    single = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return CodeGrid(levels.index[single], units, levels.values)


def refined(refine: Refine, first: int, rows: F32, codes: U8, units: F32) -> U8:
    """Return refined codes, two a byte.

    Args:
        refine: chooses them.
        first: the number of the first row.
        rows: [n, columns] what they are for.
        codes: [n, columns / 2] the nearest ones, two a byte, the first in the low bits.
        units: [n, columns / 16].
    """
    chosen = e2m1_levels().stored[refine(first, rows, row_grid(codes, units))]
    pairs: U8 = chosen[:, 0::2] | chosen[:, 1::2] << np.uint8(4)
    return pairs


def decode_rows(codes: U8, units: F32) -> F32:
    """Return ``value * unit`` in float32.

    Args:
        codes: [rows, columns / 2], two a byte, the first in the low bits.
        units: [rows, columns / 16].
    """
    values = e2m1_values()[np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)]
    with np.errstate(over="ignore", invalid="ignore"):  # readers refuse what is not finite
        decoded: F32 = values * np.repeat(units, BLOCK, axis=1)
    return decoded
