"""MLX's quantization on arrays: rows quantized and decoded, codes packed into words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.floats import f32_from, from_f32
from qwen35.codecs.fp8.arrays import e4m3_values
from qwen35.codecs.mlx.layout import MlxFormat

__all__ = [
    "MlxRows",
    "packed",
    "quantize_rows",
    "requantized",
    "rounded",
    "units_of",
    "unpacked",
]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_LARGEST = {4: np.float32(6), 8: np.float32(448)}
"""The largest number of E2M1, and of E4M3, by bits."""


@dataclass(frozen=True)
class MlxRows:
    """Rows as MLX holds them.

    Args:
        kind: the format.
        codes: [rows, columns] uint8.
        scales: [rows, groups] float32.
        biases: [rows, groups] float32; zeros for the formats without.
        stored: [rows, groups] uint8, the codes of scales; None if these are floats.
    """

    kind: MlxFormat
    codes: U8
    scales: F32
    biases: F32
    stored: U8 | None = None

    @property
    def levels(self) -> F32:
        """[rows, columns] the numbers that codes stand for."""
        if self.kind.affine:
            return self.codes.astype(np.float32)
        return (_E2M1 if self.kind.bits == 4 else e4m3_values())[self.codes]

    @property
    def values(self) -> F32:
        """[rows, columns] what they decode to."""
        with np.errstate(over="ignore", invalid="ignore"):  # readers refuse what is not finite
            decoded = self.levels * self.per_column(self.scales)
            if self.kind.affine:
                decoded += self.per_column(self.biases)
        return decoded

    def per_column(self, values: Array) -> Array:
        """Repeat [rows, groups] values for each column."""
        return np.repeat(values, self.kind.group, axis=1)


def quantize_rows(values: Array, dtype: str, kind: MlxFormat) -> MlxRows:
    """Quantize rows as ``mx.quantize`` does; scales and biases are not yet rounded to a dtype.

    Args:
        values: [rows, columns] elements of `dtype` (BF16 as uint16 bits), finite.
        dtype: BF16, F16 or F32.
        kind: the format.
    """
    from qwen35.codecs.mlx import kernels

    flat, shape = _flat(values, dtype), (len(values), values.shape[1] // kind.group)
    if kind.affine:
        scales, biases = np.empty((2, shape[0] * shape[1]), np.float32)
        kernels.affine_scales(flat, kind.group, _levels(kind), scales, biases)
        return _with_codes(flat, kind, scales.reshape(shape), biases.reshape(shape))
    stored = np.empty(shape[0] * shape[1], np.uint8)
    kernels.block_scales(flat, kind.group, _LARGEST[kind.bits], kind.mode != "nvfp4", stored)
    units = units_of(kind, stored).reshape(shape)
    rows = _with_codes(flat, kind, units, np.zeros(shape, np.float32))
    return MlxRows(kind, rows.codes, units, rows.biases, stored.reshape(shape))


def requantized(values: Array, dtype: str, rows: MlxRows) -> MlxRows:
    """Return the nearest codes with given scales and biases; `values` as for `quantize_rows`."""
    return _with_codes(_flat(values, dtype), rows.kind, rows.scales, rows.biases)


def _flat(values: Array, dtype: str) -> Array:
    return np.ascontiguousarray(values if dtype == "BF16" else f32_from(values, dtype)).reshape(-1)


def _levels(kind: MlxFormat) -> np.float32:
    return np.float32(2**kind.bits - 1)


def _with_codes(flat: Array, kind: MlxFormat, scales: F32, biases: F32) -> MlxRows:
    from qwen35.codecs.mlx import kernels

    codes = np.empty(flat.size, np.uint8)
    parts = np.ascontiguousarray(scales).reshape(-1), np.ascontiguousarray(biases).reshape(-1)
    if kind.affine:
        kernels.affine_codes(flat, kind.group, _levels(kind), *parts, codes)
    elif kind.bits == 4:
        kernels.block_codes(flat, kind.group, parts[0], codes)
    else:
        kernels.float_codes(flat, kind.group, parts[0], codes)
    return MlxRows(kind, codes.reshape(len(scales), -1), scales, biases)


def units_of(kind: MlxFormat, stored: U8) -> F32:
    """Return the float32 values of the codes of scales."""
    if kind.mode == "nvfp4":
        values: F32 = e4m3_values()[stored]
        return values
    return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)


def packed(codes: U8, bits: int) -> U8:
    """Pack codes [rows, columns] into bytes, the first in the lowest bits."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))
    spread = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(len(codes), -1), axis=-1, bitorder="little")


def unpacked(words: U8, bits: int) -> U8:
    """Undo `packed`."""
    if bits == 8:
        return words
    if bits == 4:
        return np.stack([words & 15, words >> 4], axis=-1).reshape(len(words), -1)
    spread = np.unpackbits(words, axis=-1, bitorder="little").reshape(len(words), -1, bits)
    return np.packbits(spread, axis=-1, bitorder="little").reshape(len(words), -1)


def rounded(values: F32, dtype: str) -> Array:
    """Round scales or biases to the dtype in which they are stored."""
    with np.errstate(over="ignore"):
        return from_f32(values, dtype)
