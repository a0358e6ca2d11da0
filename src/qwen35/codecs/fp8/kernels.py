"""Inner loops of FP8, compiled by Numba. Each tile is processed entirely while it is in cache.

Sums run down the columns of a tile: rows become vector operations without reordering any sum, so
the bytes are the same on every processor, and column weights are applied once per tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.fp8.histogram import EXPONENT, LARGEST, LEAST_EXPONENT, TO_MAGIC, rule_out
from qwen35.codecs.fp8.layout import BLOCK

# isort: split
from numba import types
from numba.extending import overload

__all__ = ["CANDIDATES", "MODES", "encode", "encode_with", "load_tile"]

MODES = ("max", "rms", "percentile", "mse", "search")
"""Scale modes; kernels take the index."""

_MAX, _RMS, _PERCENTILE, _MSE, _SEARCH = range(5)
_SIDE = BLOCK
_SMALLEST_SCALE = np.float32(2.0**-126)  # the inverse of a subnormal scale may be infinite
CANDIDATES = 32
"""Number of scales that `search` tries."""

_STEP = 128 // CANDIDATES
"""bfloat16 has 128 values per octave; `search` tries every fourth."""


@inlined
def _exponent(magnitude: Any) -> Any:
    """Return the exponent bits of a magnitude, at least those of 2**-6."""
    bits = np.float32(magnitude).view(np.int32)
    return max(np.int32(bits & EXPONENT), LEAST_EXPONENT)


@inlined
def _code(value: Any) -> Any:
    """Return the nearest E4M3 code, ties to even; values beyond 448 saturate.

    Adding the magic number leaves the number of steps in the last bits of the sum.
    """
    bits = np.float32(value).view(np.int32)
    magnitude = min(abs(value), LARGEST)
    exponent = _exponent(magnitude)
    magic = np.int32(exponent + TO_MAGIC)
    total = np.float32(magnitude + magic.view(np.float32))
    steps = np.int32(total.view(np.int32) - magic)
    code = np.int32(np.int32(np.int32(exponent >> 20) - np.int32(121 << 3)) + steps)
    return np.uint8(code | ((bits >> 24) & 128))


def load_tile(values: Any, row: Any, column: Any, tile: Any) -> Any:
    """Copy a tile of bfloat16 bits or float32; return the largest magnitude, or NaN."""
    raise NotImplementedError  # compiled code only


@overload(load_tile)
def _load_for(values: Any, row: Any, column: Any, tile: Any) -> Any:
    """Return the implementation for the type of `values`."""
    del row, column, tile
    return _load_bf16 if values.dtype == types.uint16 else _load_f32


def _load_bf16(values: Any, row: Any, column: Any, tile: Any) -> Any:
    # Magnitude bits compare like magnitudes, and NaN compares above infinity instead of vanishing.
    largest = np.int32(0)
    for r in range(_SIDE):
        source = values[row + r, column : column + _SIDE]
        for c in range(_SIDE):
            tile[r * _SIDE + c] = np.int32(np.int32(source[c]) << np.int32(16)).view(np.float32)
            largest = max(largest, np.int32(source[c] & 0x7FFF))
    return np.int32(largest << np.int32(16)).view(np.float32)


def _load_f32(values: Any, row: Any, column: Any, tile: Any) -> Any:
    largest = np.int32(0)
    for r in range(_SIDE):
        source = values[row + r, column : column + _SIDE]
        for c in range(_SIDE):
            tile[r * _SIDE + c] = source[c]
            bits = np.float32(source[c]).view(np.int32)
            largest = max(largest, np.int32(bits & np.int32(0x7FFFFFFF)))
    return np.int32(largest).view(np.float32)


@compiled
def _stored(scale: Any) -> Any:
    """Round a scale to the nearest bfloat16, ties to even; at least the smallest normal one."""
    bits = np.int64(np.float32(max(scale, _SMALLEST_SCALE)).view(np.int32))
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.int32(rounded).view(np.float32)


@compiled
def _column_errors(tile: Any, scale: Any, sums: Any) -> None:
    """Sum (code - value / scale)**2 down each column of the tile."""
    inverse = np.float32(np.float32(1) / scale)
    for c in range(_SIDE):
        sums[c] = np.float32(0)
    for r in range(_SIDE):
        for c in range(_SIDE):
            value = np.float32(abs(tile[r * _SIDE + c]) * inverse)
            clipped = min(value, LARGEST)
            magic = np.int32(_exponent(clipped) + TO_MAGIC).view(np.float32)
            error = np.float32(np.float32(clipped + magic) - magic) - value
            sums[c] += np.float32(error * error)


@compiled
def _column_squares(tile: Any, largest: Any, sums: Any) -> None:
    """Sum (value / largest)**2 down each column; dividing first avoids overflow of the squares."""
    for c in range(_SIDE):
        sums[c] = np.float32(0)
    for r in range(_SIDE):
        for c in range(_SIDE):
            value = np.float32(tile[r * _SIDE + c] / largest)
            sums[c] += np.float32(value * value)


@compiled
def _weigh(sums: Any, weights: Any, column: Any) -> Any:
    """Return the weighted mean of the column sums; unweighted if all weights are zero."""
    total = weight = even = 0.0  # float64: float32 sums would blur close candidates
    for c in range(_SIDE):
        even += np.float64(sums[c])
        total += np.float64(sums[c]) * weights[column + c]
        weight += weights[column + c]
    return total / weight if weight > 0 else even / _SIDE


@compiled
def _percentile(tile: Any, percent: Any) -> Any:
    """Return a percentile of the magnitudes, with linear interpolation."""
    magnitudes = np.abs(tile)
    place = percent / 100.0 * (len(magnitudes) - 1)
    lower = int(np.floor(place))
    upper = min(lower + 1, len(magnitudes) - 1)
    # Linear time; the upper neighbour is the smallest value of the upper part.
    parted = np.partition(magnitudes, lower)
    low = parted[lower]
    high = parted[upper:].min()
    return np.float32(low + (high - low) * (place - lower))


@compiled
def _best(tile: Any, scales: Any, weights: Any, column: Any, sums: Any) -> Any:
    """Return the first scale with the least weighted squared error."""
    best, least = scales[0], np.inf
    if len(scales) == 1:  # there is nothing to compare
        return best
    for scale in scales:
        _column_errors(tile, scale, sums)
        loss = _weigh(sums, weights, column) * np.float64(scale) * np.float64(scale)
        if loss < least:  # strict: ties go to the first candidate
            best, least = scale, loss
    return best


@compiled
def _scale(
    values: Any,
    row: Any,
    column: Any,
    tile: Any,
    largest: Any,
    mode: Any,
    parameter: Any,
    weights: Any,
    sums: Any,
    scales: Any,
) -> Any:
    """Choose the scale of a tile, already rounded to bfloat16; 1 for a tile of zeros."""
    if largest == 0:
        return np.float32(1)
    # If the rms or percentile is zero (or underflows), `max` below applies.
    if mode == _RMS:
        _column_squares(tile, largest, sums)
        rms = largest * np.sqrt(_weigh(sums, weights, column) / _SIDE)
        if rms > 0:
            return _stored(np.float32(rms * parameter / LARGEST))
    if mode == _PERCENTILE:
        level = _percentile(tile, parameter)
        if level > 0:
            return _stored(np.float32(level / LARGEST))
    base = np.float32(largest / LARGEST)
    # Candidates are rounded as they will be stored: the codes then fit the stored scale exactly.
    if mode not in (_MSE, _SEARCH):
        return _stored(base)
    first = np.float32(_stored(base)).view(np.int32)
    for i in range(len(scales)):
        if mode == _MSE:
            alpha = 1.0 - 0.5 * i / max(1, len(scales) - 1)
            scales[i] = _stored(np.float32(base * np.float32(alpha)))
        else:
            scales[i] = np.int32(first + np.int32((i * _STEP) << 16)).view(np.float32)
    count = rule_out(values, row, column, largest, weights, scales)
    return _best(tile, scales[:count], weights, column, sums)


@compiled
def _write(tile: Any, scale: Any, codes: Any, row: Any, column: Any) -> None:
    """Encode a tile with the given scale."""
    for r in range(_SIDE):
        target = codes[row + r, column : column + _SIDE]
        for c in range(_SIDE):
            target[c] = _code(np.float32(tile[r * _SIDE + c] / scale))


@compiled
def encode(values: Any, mode: Any, parameter: Any, weights: Any, codes: Any, stored: Any) -> Any:
    """Choose scales and encode.

    values: [rows, columns] uint16 (bfloat16 bits) or float32, whole tiles; mode: an index into
    `MODES`; parameter: factor, percentile or grid size; weights: [columns] float32 error weights
    -> codes: [rows, columns] uint8, stored: [rows / 128, columns / 128] uint16 (bfloat16 bits).
    Returns the number of tiles that hold NaN or infinity.
    """
    tile = np.empty(_SIDE * _SIDE, np.float32)
    sums = np.empty(_SIDE, np.float32)
    scales = np.empty(np.int64(parameter) if mode == _MSE else CANDIDATES, np.float32)
    bad = 0
    for row in range(0, values.shape[0], _SIDE):
        for column in range(0, values.shape[1], _SIDE):
            largest = load_tile(values, row, column, tile)
            if not largest < np.inf:  # also true for NaN
                bad += 1
                continue
            scale = _scale(
                values, row, column, tile, largest, mode, parameter, weights, sums, scales
            )
            _write(tile, scale, codes, row, column)
            bits = np.float32(scale).view(np.int32)
            stored[row // _SIDE, column // _SIDE] = np.uint16(bits >> 16)
    return bad


@compiled
def encode_with(values: Any, scales: Any, codes: Any) -> None:
    """Encode with the given scales.

    values: [rows, columns] float32; scales: [rows / 128, columns / 128] float32 -> codes.
    """
    tile = np.empty(_SIDE * _SIDE, np.float32)
    for row in range(0, values.shape[0], _SIDE):
        for column in range(0, values.shape[1], _SIDE):
            load_tile(values, row, column, tile)
            _write(tile, scales[row // _SIDE, column // _SIDE], codes, row, column)
