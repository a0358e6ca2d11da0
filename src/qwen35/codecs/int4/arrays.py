"""INT4 on arrays: rows quantized, and codes packed into words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.floats import f32_from, rounded_scales
from qwen35.codecs.int4.layout import PER_WORD
from qwen35.codecs.refining import CodeGrid

__all__ = ["QuantizedRows", "packed", "quantize_rows", "unpacked"]

I32 = npt.NDArray[np.int32]

_SIXTEEN = np.arange(16, dtype=np.float32)

_OF_ZEROS = np.float32(2.0**-7)
"""The scale of a group of zeros: any would do; compressed-tensors has bfloat16's epsilon."""


@dataclass(frozen=True)
class QuantizedRows:
    """Rows as INT4.

    Args:
        codes: [rows, columns] uint8, q + 8.
        scales: [rows, columns / group] float32, values of the dtype they are stored in.
        zeros: [rows, columns / group] uint8, z + 8.
    """

    codes: U8
    scales: F32
    zeros: U8

    @property
    def values(self) -> F32:
        """[rows, columns] what they decode to."""
        group = self.codes.shape[1] // self.scales.shape[1]
        steps = self.codes.astype(np.float32) - np.repeat(self.zeros, group, axis=1)
        with np.errstate(over="ignore", invalid="ignore"):  # readers refuse what is not finite
            decoded: F32 = steps * np.repeat(self.scales, group, axis=1)
        return decoded

    @property
    def grid(self) -> CodeGrid:
        """What the codes can stand for."""
        zeros = self.zeros.astype(np.float32)
        if (zeros == zeros[:1, :1]).all():
            first = zeros.reshape(-1)[:1]
            return CodeGrid(self.codes, self.scales, _SIXTEEN - first)
        return CodeGrid(self.codes, self.scales, _SIXTEEN, -(zeros * self.scales))


def quantize_rows(
    values: Array,
    dtype: str,
    group: int,
    stored: str,
    weights: F32 | None,
    *,
    symmetric: bool,
    search: bool,
) -> QuantizedRows:
    """Quantize rows.

    Args:
        values: [rows, columns] elements of `dtype` (BF16 as uint16 bits), finite.
        dtype: BF16, F16 or F32.
        group: columns that share a scale.
        stored: dtype of the scales.
        weights: [columns] error weight of each column; None for equal weights.
        symmetric: whether zero points are 0.
        search: whether scales are searched; else from the extremes.

    Raises:
        ValueError: `stored` cannot hold a scale.
    """
    from qwen35.codecs.int4 import kernels

    rows, columns = values.shape
    flat = np.ascontiguousarray(values if dtype == "BF16" else f32_from(values, dtype)).reshape(-1)
    even = weights is None or not weights.any()
    scales, zeros = np.empty((2, flat.size // group), np.float32)
    kernels.choose(flat, None if even else weights, group, symmetric, search, scales, zeros)
    scales = rounded_scales(scales, stored)
    scales[scales == 0] = _OF_ZEROS
    codes = np.empty(flat.size, np.uint8)
    kernels.encode(flat, group, scales, zeros, codes)
    shape = (rows, columns // group)
    whole = (zeros + np.float32(8)).astype(np.uint8)
    return QuantizedRows(codes.reshape(values.shape), scales.reshape(shape), whole.reshape(shape))


def packed(codes: U8) -> I32:
    """Pack codes [..., 8 n] into words [..., n], the first code in the lowest bits."""
    pairs = np.ascontiguousarray(codes).view("<u2")  # the first code in the low byte
    words: I32 = (pairs | (pairs >> np.uint16(4))).astype(np.uint8).view("<i4")
    return words


def unpacked(words: I32) -> U8:
    """Undo `packed`."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    shape = (*words.shape[:-1], PER_WORD * words.shape[-1])
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(shape)
