"""Rule out most scales of a tile by a histogram of its magnitudes, before any is tried on the tile.

bfloat16 has 128 values per octave, so the 16,384 weights of a tile have about 1,200 magnitudes. The
error of a scale follows from them and how often each occurs. It differs from the error that
`kernels` sums in float32, column by column, by rounding alone: at most 127 units of 2**-24 there
and 40 here. Scales that are worse than the best by more than that cannot be chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.fp8.layout import BLOCK
from qwen35.codecs.lanes import LANES, bits, from_bits, load, select, splat, store

# isort: split
from numba import types
from numba.extending import overload

__all__ = ["EXPONENT", "LARGEST", "LEAST_EXPONENT", "TO_MAGIC", "rule_out"]

LARGEST = np.float32(448)

EXPONENT = np.int32(0x7F800000)
LEAST_EXPONENT = np.int32(121 << 23)
"""Exponent bits of 2**-6, the smallest normal E4M3 value: below it, steps stay 2**-9."""

TO_MAGIC = np.int32((20 << 23) + (1 << 22))
"""Turns 2**e into 1.5 * 2**(e + 20), whose last-place unit is the E4M3 step 2**(e - 3)."""

_SIDE = BLOCK
_BINS = 2048
"""16 octaves below the largest magnitude."""

_BELOW = 2.0**-20
"""Largest squared error, in units of the scale, of what lies below the bins: half a step of 2**-9.
It is below 2**-6, where steps no longer shrink: no scale is much below half of max / 448."""

_MARGIN = 1 + 2.0**-15
"""More than rounding may add to one sum of errors and take from another."""

_UNDERFLOW = 2.0**-100
"""More than a sum may lose where products underflow; shares are at most 1."""

_ZERO = np.float32(0)
_STRIDE = 4 * LANES


def rule_out(values: Any, row: Any, column: Any, largest: Any, weights: Any, scales: Any) -> Any:
    """Keep, in order, the scales of a tile that may have the least error; return their number.

    values: [rows, columns], the tile begins at row and column; largest: its largest magnitude;
    weights: [columns] float32, not negative; scales: float32, about half of largest / 448 or more.
    """
    raise NotImplementedError  # compiled code only


@overload(rule_out)
def _rule_out_for(
    values: Any, row: Any, column: Any, largest: Any, weights: Any, scales: Any
) -> Any:
    """Return the implementation for the type of `values`."""
    del row, column, largest, weights, scales
    return _rule_out_bf16 if values.dtype == types.uint16 else _rule_out_none


def _rule_out_none(  # float32 has too many magnitudes
    values: Any,  # noqa: ARG001
    row: Any,  # noqa: ARG001
    column: Any,  # noqa: ARG001
    largest: Any,  # noqa: ARG001
    weights: Any,  # noqa: ARG001
    scales: Any,
) -> Any:
    return len(scales)


def _rule_out_bf16(
    values: Any, row: Any, column: Any, largest: Any, weights: Any, scales: Any
) -> Any:
    magnitudes = np.empty(_BINS + _STRIDE, np.float32)
    shares = np.empty(_BINS + _STRIDE, np.float32)
    count, below = _histogram(values, row, column, largest, weights, magnitudes, shares)
    losses = np.empty(len(scales))
    sums = np.empty(LANES, np.float32)
    bound = np.inf
    for i in range(len(scales)):
        square = np.float64(scales[i]) * np.float64(scales[i])
        losses[i] = _loss(magnitudes, shares, count, scales[i], sums) * square
        most = (losses[i] + (below * _BELOW + _UNDERFLOW) * square) * _MARGIN
        bound = min(bound, most)
    kept = 0
    for i in range(len(scales)):
        if not losses[i] > bound:  # also if a weight is infinite: sums are NaN then
            scales[kept] = scales[i]
            kept += 1
    return kept


@compiled
def _histogram(
    values: Any,
    row: Any,
    column: Any,
    largest: Any,
    weights: Any,
    magnitudes: Any,
    shares: Any,
) -> Any:
    """List the magnitudes of a tile and the weight of each, as a share of the heaviest.

    Returns the length of the lists, padded to whole strides, and the share of what is too small.
    Without any weight, the lists are empty.
    """
    top = np.int32(np.float32(largest).view(np.int32) >> np.int32(16))
    first = max(np.int32(0), np.int32(top - np.int32(_BINS - 1)))
    heap = np.zeros(_BINS + 1)  # 0 holds what is too small
    for r in range(_SIDE):
        source = values[row + r, column : column + _SIDE]
        for c in range(_SIDE):
            place = np.int32(source[c] & 0x7FFF) - first
            heap[max(np.int32(place), np.int32(-1)) + 1] += weights[column + c]
    heaviest = heap[1:].max()
    count: Any = 0
    if heaviest > 0:
        for i in range(_BINS):
            magnitude = np.int32(np.int32(first + np.int32(i)) << np.int32(16))
            magnitudes[count] = magnitude.view(np.float32)
            shares[count] = np.float32(heap[i + 1] / heaviest)
            count += np.int64(heap[i + 1] != 0)  # without a branch
        while count % _STRIDE:
            magnitudes[count] = shares[count] = _ZERO
            count += 1
    return count, heap[0] / heaviest


@inlined
def _squared_error(value: Any) -> Any:
    """Return (code - value)**2, as `kernels` computes it, for magnitudes in units of the scale."""
    clipped = select(value < LARGEST, value, LARGEST)
    exponent = bits(clipped) & EXPONENT
    magic = from_bits(select(exponent > LEAST_EXPONENT, exponent, LEAST_EXPONENT) + TO_MAGIC)
    error = (clipped + magic) - magic - value
    return error * error


@compiled
def _loss(magnitudes: Any, shares: Any, count: Any, scale: Any, sums: Any) -> Any:
    """Return the sum of shares times squared errors, in units of the scale."""
    inverse = splat(np.float32(np.float32(1) / scale))
    first = second = third = fourth = splat(_ZERO)  # independent sums hide the latency of additions
    for k in range(0, count, _STRIDE):
        a, b, c, d = k, k + LANES, k + 2 * LANES, k + 3 * LANES
        first = first + _squared_error(load(magnitudes, a) * inverse) * load(shares, a)
        second = second + _squared_error(load(magnitudes, b) * inverse) * load(shares, b)
        third = third + _squared_error(load(magnitudes, c) * inverse) * load(shares, c)
        fourth = fourth + _squared_error(load(magnitudes, d) * inverse) * load(shares, d)
    store(sums, 0, (first + second) + (third + fourth))
    total = 0.0
    for i in range(LANES):
        total += np.float64(sums[i])
    return total
