"""Inner loops of NVFP4, compiled by Numba: 16 blocks side by side, a lane each."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.lanes import (
    LANES,
    bits,
    from_bits,
    gather,
    ints,
    load,
    magnitude,
    select,
    splat,
    store,
    store_bytes,
)

__all__ = ["encode"]

_BLOCK = 16
_ZERO, _ONE, _TWO, _SIX = np.float32(0), np.float32(1), np.float32(2), np.float32(6)
_EXPONENT = np.int32(0x7F800000)
_ONE_BITS = np.int32(0x3F800000)
_TO_MAGIC = np.int32((22 << 23) + (1 << 22))
"""Turns 2**e into 1.5 * 2**(e + 22), whose last-place unit is the E2M1 step 2**(e - 1)."""

_BELOW, _ABOVE = 3, 5
"""Scales that a search tries: the E4M3 numbers before and after that of the largest magnitude.

Three fewer clip it to 0.77 of itself; five more make it 4, the next E2M1 number below 6."""

_LEAST, _MOST = 1, 126
"""Codes of the E4M3 numbers 2**-9 and 448."""

_OF_ZEROS = 32
"""Code of 0.125, which compressed-tensors gives blocks of zeros."""


@inlined
def _rounded(units: Any) -> Any:
    """Return the nearest E2M1 numbers of magnitudes up to 6, ties to even."""
    exponent = bits(units) & _EXPONENT
    exponent = select(exponent < _ONE_BITS, _ONE_BITS, exponent)
    magic = from_bits(exponent + _TO_MAGIC)
    return (units + magic) - magic


@inlined
def _clipped(units: Any) -> Any:
    return select(units > _SIX, _SIX, units)


@compiled
def _nearest_scale(value: Any, scales: Any) -> Any:
    """Return the code of the nearest E4M3 number, ties to even; at least 2**-9, at most 448."""
    low, high = _LEAST, _MOST
    if value >= scales[high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if scales[middle] <= value:
            low = middle
        else:
            high = middle
    below, above = value - scales[low], scales[high] - value
    if above < below or (above == below and high % 2 == 0):
        return high
    return low


@inlined
def _most(xs: Any) -> Any:
    found = splat(_ZERO)
    for i in range(_BLOCK):
        x = magnitude(load(xs, i))
        found = select(x > found, x, found)
    return found


@inlined
def _loss(xs: Any, ws: Any, units: Any) -> Any:
    """Return the weighted squared error with these sizes of a unit."""
    inverse = _ONE / units
    total = splat(_ZERO)
    for i in range(_BLOCK):
        exact = magnitude(load(xs, i)) * inverse
        error = _rounded(_clipped(exact)) - exact
        total = total + load(ws, i) * (error * error)
    return total * units * units


@compiled
def _search(xs: Any, ws: Any, whole: Any, scales: Any, codes: Any, units: Any) -> None:
    """Replace the codes of 16 scales by those nearby with the least error; the first of equals."""
    best, least = load(codes, 0), splat(np.float32(np.inf))
    first = codes.copy()
    for step in range(-_BELOW, _ABOVE + 1):
        for k in range(LANES):
            code = min(max(first[0, k] + step, _LEAST), _MOST)
            codes[0, k] = code
            units[0, k] = scales[code] / whole
        loss = _loss(xs, ws, load(units, 0))
        better = loss < least
        best, least = select(better, load(codes, 0), best), select(better, loss, least)
    store(codes, 0, best)


@compiled
def _write(flat: Any, block: Any, unit: Any, out: Any) -> None:
    """Write the codes of a block, one a byte."""
    x = load(flat, block * _BLOCK)
    value = _rounded(_clipped(magnitude(x) / unit))
    small = ints(value * _TWO)
    large = (bits(value) >> np.int32(22)) - np.int32(252)
    code = select(value < _ONE, small, large)
    store_bytes(out, block * _BLOCK, code | ((bits(x) >> np.int32(28)) & np.int32(8)))


@compiled
def encode(
    flat: Any, weights: Any, whole: Any, search: Any, scales: Any, codes: Any, chosen: Any
) -> None:
    """Choose the scales of blocks and encode.

    flat: [n * 16] float32, finite; weights: [columns] float32, importance of each column; whole:
    float32, 2688 divided by the largest magnitude; search: whether to search scales; scales: [128]
    float32, the values of E4M3 codes -> codes: [n * 8] uint8, chosen: [n] uint8, codes of scales.
    """
    count, period = flat.shape[0] // _BLOCK, weights.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    own, most = np.empty((1, LANES), np.int32), np.empty((1, LANES), np.float32)
    units = np.empty((1, LANES), np.float32)
    wide = np.empty(count * _BLOCK, np.uint8)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        store(most, 0, _most(xs))
        for k in range(LANES):
            own[0, k] = _nearest_scale(whole * (most[0, k] / _SIX), scales)
        if search:
            gather(weights, first, count, period, ws)
            _search(xs, ws, whole, scales, own, units)
        for k in range(min(LANES, count - first)):
            code = own[0, k] if most[0, k] > _ZERO else np.int32(_OF_ZEROS)
            chosen[first + k] = code
            _write(flat, first + k, np.float32(scales[code] / whole), wide)
    for i in range(codes.shape[0]):
        codes[i] = wide[2 * i] | (wide[2 * i + 1] << 4)
