"""Error measures of FP8 weights against the original, from float64 sums of one pass over both.

Rounding to E4M3 moves a value v (in units of the scale, |v| <= 448) by at most half a step: v / 17
where steps grow with the value, 2**-10 below the smallest normal value. Rounding the scale to
bfloat16 after encoding, as other tools do, adds at most 2**-8. So a correct code is within v / 15
or 2**-10 * 17 / 15 of its value, unless it saturates at 448; any other code belongs to a different
scale or weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8.kernels import load_tile
from qwen35.codecs.fp8.layout import BLOCK

__all__ = ["RELATIVE", "WORST_ERROR", "ErrorSums"]

WORST_ERROR = 1 / 16
"""Upper bound of the relative error of rounding to a three-bit mantissa."""

RELATIVE = 1 / 15
"""Upper bound of the error of a correct code, relative to its weight."""

_SIDE = BLOCK
_ABSOLUTE = 2.0**-10 * 17 / 15
_TOP = 126  # the code of 448
_SUMS = 6


@dataclass
class ErrorSums:
    """Differences between a weight w and its decoded FP8 values q.

    Args:
        count: weights compared.
        squared: sum of (q - w)^2.
        norm: sum of w^2.
        decoded_norm: sum of q^2.
        product: sum of q w.
        absolute: sum of |q - w|.
        magnitude: sum of |w|.
        worst: largest |q - w|.
        largest: largest |w|.
        clipped: saturated codes with a larger error than rounding explains.
        misplaced: other codes with a larger error than rounding explains.
        refined: 1 if codes are refined: not the nearest, so that errors may double.
    """

    count: int = 0
    squared: float = 0.0
    norm: float = 0.0
    decoded_norm: float = 0.0
    product: float = 0.0
    absolute: float = 0.0
    magnitude: float = 0.0
    worst: float = 0.0
    largest: float = 0.0
    clipped: int = 0
    misplaced: int = 0
    refined: int = 0

    @property
    def allowed(self) -> int:
        """How many times the errors of rounding are allowed."""
        return 2 if self.refined else 1

    def add(self, values: Any, dtype: str, codes: Any, scale: F32) -> None:
        """Add whole tiles.

        Args:
            values: [rows, columns] of the original, elements of `dtype` (BF16 as uint16 bits).
            dtype: BF16, F16 or F32.
            codes: [rows, columns] uint8.
            scale: [rows / 128, columns / 128].
        """
        floats = values if dtype == "BF16" else f32_from(values, dtype)
        sums, peaks, beyond = np.zeros(_SUMS), np.zeros(2), np.zeros(2, np.int64)
        _compare(floats, codes, scale, sums, peaks, beyond)
        names = ("squared", "norm", "decoded_norm", "product", "absolute", "magnitude")
        for name, total in zip(names, sums.tolist(), strict=True):
            setattr(self, name, getattr(self, name) + total)
        self.worst = max(self.worst, float(peaks[0]))
        self.largest = max(self.largest, float(peaks[1]))
        self.clipped += int(beyond[0])
        self.misplaced += int(beyond[1])
        self.count += values.size

    @property
    def relative_rmse(self) -> float:
        """Root mean square error relative to the root mean square of the weights."""
        if not self.norm:
            return math.inf if self.squared else 0.0
        return math.sqrt(self.squared / self.norm)

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 if both are zero."""
        product = math.sqrt(self.norm) * math.sqrt(self.decoded_norm)
        return self.product / product if product else float(self.norm == self.decoded_norm)

    @property
    def mae(self) -> float:
        """Mean absolute error."""
        return self.absolute / max(1, self.count)

    @property
    def mean_magnitude(self) -> float:
        """Mean absolute weight."""
        return self.magnitude / max(1, self.count)


@inlined
def _value(code: Any) -> Any:
    """Return the value of an E4M3 code that is not NaN."""
    low = np.int32(code) & np.int32(127)
    # Shifted into float32 with the bias adjusted, a subnormal gains a hidden one: subtract it.
    normal = np.int32((low << 20) + (120 << 23)).view(np.float32)
    small = np.float32(normal - np.float32(2.0**-7)) * np.float32(2)
    magnitude = np.float32(small if low < 8 else normal)
    return np.float32(-magnitude if np.int32(code) & np.int32(128) else magnitude)


@compiled
def _compare(values: Any, codes: Any, scales: Any, sums: Any, peaks: Any, beyond: Any) -> None:
    """Accumulate one piece: sums in `ErrorSums` order, (worst, largest), (clipped, misplaced)."""
    tile = np.empty(_SIDE * _SIDE, np.float32)
    # Sums per column vectorize along a row without reordering any sum.
    columns = np.zeros((_SUMS, _SIDE))
    worst = np.zeros(_SIDE)
    for row in range(0, values.shape[0], _SIDE):
        for column in range(0, values.shape[1], _SIDE):
            largest = load_tile(values, row, column, tile)
            peaks[1] = max(peaks[1], np.float64(largest))
            scale = scales[row // _SIDE, column // _SIDE]
            tile_codes = codes[row : row + _SIDE, column : column + _SIDE]
            _compare_tile(tile, tile_codes, scale, columns, worst, beyond)
    for c in range(_SIDE):
        for i in range(_SUMS):
            sums[i] += columns[i, c]
        peaks[0] = max(peaks[0], worst[c])


@compiled
def _compare_tile(tile: Any, codes: Any, scale: Any, columns: Any, worst: Any, beyond: Any) -> None:
    least = _ABSOLUTE * np.float64(scale)
    for r in range(_SIDE):
        line = codes[r]
        clipped, misplaced = np.int64(0), np.int64(0)
        for c in range(_SIDE):
            value = np.float64(tile[r * _SIDE + c])
            code = line[c]
            decoded = np.float64(np.float32(_value(code) * scale))
            error = abs(decoded - value)
            columns[0, c] += error * error
            columns[1, c] += value * value
            columns[2, c] += decoded * decoded
            columns[3, c] += decoded * value
            columns[4, c] += error
            columns[5, c] += abs(value)
            worst[c] = max(worst[c], error)
            # `not <=`, so that a NaN error counts as too far.
            far = np.int64(not error <= max(least, abs(value) * RELATIVE))
            top = np.int64((code & 127) == _TOP)
            clipped += far & top
            misplaced += far & (1 - top)
        beyond[0] += clipped
        beyond[1] += misplaced
