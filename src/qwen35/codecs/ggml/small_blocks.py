"""Blocks of 32 weights: q4_0 to q8_0 and iq4_nl, with the bytes of ggml.

The algorithms are those of llama.cpp's ``ggml/src/ggml-quants.c`` (MIT) at 0c1e5709, the layouts
those of ``ggml-common.h``. 16 blocks are searched side by side (`qwen35.codecs.ggml.searches`),
then each is packed by itself, where vectors hold 16 neighbours.

Every function takes ``flat`` [n * 32] float32, ``importance`` [row] float32 or empty, and ``out``
[n * bytes of a block] uint8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.ggml.rounding import level, put_half, truncated
from qwen35.codecs.ggml.searches import (
    BASE,
    FITS,
    INVERSE,
    LOW,
    SCALE,
    extreme_of,
    fit_minimum,
    fit_symmetric,
    fit_table,
    in_table,
)
from qwen35.codecs.ggml.tiles import weigh, weigh_by, weigh_squares
from qwen35.codecs.lanes import (
    LANES,
    bits,
    from_bits,
    gather,
    ints,
    largest,
    load,
    magnitude,
    packed,
    select,
    splat,
    store,
    store_bytes,
)

__all__ = ["encode_iq4_nl", "encode_minimum", "encode_q8_0", "encode_symmetric"]

_BLOCK = 32
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_BELOW_HALF = np.float32(0.49999997)
"""The float32 before 0.5: added, with the value's sign, it makes truncation round like C's
``roundf``, halves away from zero."""


@compiled
def encode_q8_0(flat: Any, out: Any) -> Any:
    """Encode q8_0: the largest magnitude is 127; no importance."""
    for block in range(flat.shape[0] // _BLOCK):
        a, b = load(flat, _BLOCK * block), load(flat, _BLOCK * block + 16)
        # magnitudes are ordered as their bits are
        most = max(largest(bits(magnitude(a))), largest(bits(magnitude(b))))
        d = np.int32(most).view(np.float32) / np.float32(127)
        inverse = _ONE / d if d != _ZERO else _ZERO
        at = 34 * block
        put_half(out, at, d)
        store_bytes(out, at + 2, _round_away(a * inverse))
        store_bytes(out, at + 18, _round_away(b * inverse))


@inlined
def _round_away(value: Any) -> Any:
    value = truncated(value)
    half = from_bits((bits(value) & np.int32(-0x80000000)) | bits(splat(_BELOW_HALF)))
    return ints(value + half)


# --- q4_0 and q5_0, q4_1 and q5_1


@compiled
def _mean_squares(flat: Any, row: Any, means: Any) -> Any:
    """Fill `means` [rows] with the mean square of each row, summed in its order."""
    for i in range(means.shape[0]):
        total = _ZERO
        for x in flat[row * i : row * (i + 1)]:
            total += x * x
        means[i] = total / np.float32(row)


@compiled
def _weigh_rows(xs: Any, ws: Any, means: Any, first: Any, count: Any, period: Any) -> Any:
    """Compute error weights: importance times ``sqrt(mean of the row + x^2)``."""
    variances = np.empty((1, LANES), np.float32)
    for k in range(LANES):
        variances[0, k] = means[min(first + k, count - 1) // period]
    weigh_by(xs, ws, load(variances, 0))


@compiled
def encode_symmetric(flat: Any, importance: Any, half: Any, out: Any) -> Any:
    """Encode q4_0 (`half` 8) or q5_0 (16): a signed scale."""
    count, row = flat.shape[0] // _BLOCK, importance.shape[0]
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    products, fits = np.empty((_BLOCK, LANES), np.float32), np.empty((FITS, LANES), np.float32)
    means = np.empty(flat.shape[0] // max(row, 1) if row > 0 else 0, np.float32)
    _mean_squares(flat, row, means)
    nearby = np.float32(half)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if row > 0:
            gather(importance, first, count, row // _BLOCK, ws)
            _weigh_rows(xs, ws, means, first, count, row // _BLOCK)
            fit_symmetric(xs, ws, 0, _BLOCK, nearby, products, fits, 0)
        else:
            d = extreme_of(xs, 0, _BLOCK)[0] / -nearby
            store(fits, SCALE, d)
            store(fits, INVERSE, select(d != _ZERO, _ONE / d, _ZERO))
        for k in range(min(LANES, count - first)):
            _pack_symmetric(flat, first + k, fits, k, half, row > 0, out)


@compiled
def _pack_symmetric(
    flat: Any, block: Any, fits: Any, k: Any, half: Any, weighted: Any, out: Any
) -> Any:
    """Write block `block`, which is lane `k`: the scale, fifth bits, codes."""
    at = (22 if half > 8 else 18) * block
    put_half(out, at, fits[SCALE, k])
    inverse, nearby = fits[INVERSE, k], np.float32(half)
    a, b = load(flat, _BLOCK * block), load(flat, _BLOCK * block + 16)
    if weighted and inverse == _ZERO:  # nothing was searched
        low, high = splat(np.int32(0)), splat(np.int32(0))
    elif weighted:
        low = ints(level(inverse * a, -nearby, nearby - _ONE) + nearby)
        high = ints(level(inverse * b, -nearby, nearby - _ONE) + nearby)
    else:
        low = _cut(a * inverse + (nearby + _HALF), 2 * half - 1)
        high = _cut(b * inverse + (nearby + _HALF), 2 * half - 1)
    _put_codes(low, high, half > 8, out, at + 2)


@inlined
def _cut(value: Any, top: Any) -> Any:
    """Return a float without its fraction, at most `top`, as ggml's casts do."""
    code = ints(truncated(value))
    return select(code < top, code, top)


@inlined
def _put_codes(low: Any, high: Any, five: Any, out: Any, at: Any) -> Any:
    """Store 32 codes: the fifth bits of all, if there are any, then their 4 bits in pairs."""
    if five:
        fifths = packed((low & 16) != 0) | (packed((high & 16) != 0) << np.int32(16))
        for byte in range(4):
            out[at + byte] = np.uint8((fifths >> np.int32(8 * byte)) & np.int32(255))
        at += 4
    store_bytes(out, at, (low & 15) | ((high & 15) << 4))


@compiled
def encode_minimum(flat: Any, importance: Any, top: Any, out: Any) -> Any:
    """Encode q4_1 (`top` 15) or q5_1 (31): a scale and a minimum."""
    count, row = flat.shape[0] // _BLOCK, importance.shape[0]
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    levels, fits = np.empty((_BLOCK, LANES), np.float32), np.empty((FITS, LANES), np.float32)
    means = np.empty(flat.shape[0] // max(row, 1) if row > 0 else 0, np.float32)
    _mean_squares(flat, row, means)
    highest, start, delta = np.float32(top), np.float32(-0.9), np.float32(0.05)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if row > 0:
            gather(importance, first, count, row // _BLOCK, ws)
            _weigh_rows(xs, ws, means, first, count, row // _BLOCK)
            fit_minimum(xs, ws, 0, _BLOCK, highest, start, delta, 36, False, levels, fits, 0)
        else:
            _span(xs, highest, fits)
        for k in range(min(LANES, count - first)):
            _pack_minimum(flat, first + k, fits, k, top, row > 0, out)


@inlined
def _span(xs: Any, top: Any, fits: Any) -> Any:
    """Let levels reach from the smallest value to the largest."""
    low, high = load(xs, 0), load(xs, 0)
    for i in range(1, xs.shape[0]):
        x = load(xs, i)
        low, high = select(x < low, x, low), select(x > high, x, high)
    d = (high - low) / top
    store(fits, SCALE, d)
    store(fits, LOW, low * -_ONE)
    store(fits, INVERSE, select(d != _ZERO, _ONE / d, _ZERO))
    store(fits, BASE, low)


@compiled
def _pack_minimum(
    flat: Any, block: Any, fits: Any, k: Any, top: Any, weighted: Any, out: Any
) -> Any:
    """Write block `block`, which is lane `k`: scale, minimum, fifth bits, codes."""
    at = (24 if top > 15 else 20) * block
    put_half(out, at, fits[SCALE, k])
    put_half(out, at + 2, -fits[LOW, k])
    inverse, base, highest = fits[INVERSE, k], fits[BASE, k], np.float32(top)
    a, b = load(flat, _BLOCK * block) - base, load(flat, _BLOCK * block + 16) - base
    if weighted:
        low = ints(level(inverse * a, _ZERO, highest))
        high = ints(level(inverse * b, _ZERO, highest))
    else:
        low, high = _cut(a * inverse + _HALF, top), _cut(b * inverse + _HALF, top)
    _put_codes(low, high, top > 15, out, at + 4)


# --- levels from a table: iq4_nl


@compiled
def encode_iq4_nl(flat: Any, importance: Any, out: Any) -> Any:
    """Encode iq4_nl: a signed scale, levels of a table."""
    count, period = flat.shape[0] // _BLOCK, importance.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    fits = np.empty((FITS, LANES), np.float32)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if period > 0:
            gather(importance, first, count, period, ws)
            weigh(xs, ws, np.float32(2))
        else:
            weigh_squares(xs, ws)
        fit_table(xs, ws, 0, _BLOCK, fits, 0)
        for k in range(min(LANES, count - first)):
            block, scale = first + k, fits[SCALE, k]
            put_half(out, 18 * block, scale)
            by = _ONE / scale if scale != _ZERO else _ZERO
            a, b = load(flat, _BLOCK * block), load(flat, _BLOCK * block + 16)
            store_bytes(out, 18 * block + 2, in_table(by * a) | (in_table(by * b) << 4))
