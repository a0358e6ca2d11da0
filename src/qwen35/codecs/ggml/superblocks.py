"""Super-blocks of 256 weights: q2_K to q6_K and iq4_xs, with the bytes of ggml.

The algorithms are those of llama.cpp's ``ggml/src/ggml-quants.c`` (MIT) at 0c1e5709, the layouts
those of ``ggml-common.h``. 16 super-blocks are searched side by side (`searches`), then each is
packed by itself, where vectors hold 16 neighbours.

Every function takes ``flat`` [n * 256] float32, ``importance`` [row] float32 or empty, and ``out``
[n * bytes of a block] uint8. Where a stored scale is 0, codes are those that the search found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.ggml.rounding import level, nearest, nearest_one, put_half
from qwen35.codecs.ggml.searches import (
    BASE,
    FITS,
    INVERSE,
    LOW,
    SCALE,
    WEIGHT,
    descend,
    fit_minimum,
    fit_positive,
    fit_symmetric,
    fit_table,
    in_table,
)
from qwen35.codecs.ggml.tiles import (
    weigh,
    weigh_magnitudes,
    weigh_offsets,
    weigh_squares,
)
from qwen35.codecs.lanes import LANES, gather, ints, load, select, splat, store, store_bytes

__all__ = ["encode_iq4_xs", "encode_q2_k", "encode_q3_k", "encode_q6_k", "encode_q45_k"]

_BLOCK = 256
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_EPSILON = np.float32(1e-15)


@inlined
def _round_positive(fits: Any, values: Any, count: Any, top: Any, codes: Any, scales: Any) -> Any:
    """Round the scales, or the minima, of sub-blocks to `top` steps of the largest."""
    most = splat(_ZERO)
    for j in range(count):
        value = load(fits, values + j)
        most = select(value > most, value, most)
    inverse = select(most > _ZERO, np.float32(top) / most, _ZERO)
    for j in range(count):
        store(codes, j, nearest(inverse * load(fits, values + j)) & 255)
    store(scales, 0, most / np.float32(top))


@inlined
def _rounded(flat: Any, start: Any, d: Any, shift: Any, found: Any, low: Any, high: Any) -> Any:
    """Return the codes [16] of neighbours by the stored scale `d`, or else as they were found.

    Args:
        flat: weights.
        start: number of the first.
        d: the scale; 0 leaves the codes of the search.
        shift: what is added before.
        found: the inverse scale and the minimum that the search rounded by.
        low: the lowest code.
        high: the highest.
    """
    x = load(flat, start)
    if d != _ZERO:
        codes = ints(level((x + shift) / d, low, high))
    else:
        codes = ints(level(found[0] * (x - found[1]), low, high))
    return codes


@inlined
def _put_pairs(codes: Any, out: Any, at: Any) -> Any:
    """Store 256 codes of two bits, in `codes` [16 of 16 neighbours], as q2_K and q3_K do."""
    for half in range(2):
        for side in range(2):
            row = 8 * half + side
            pairs = load(codes, row) & 3
            for j in range(1, 4):
                pairs = pairs | ((load(codes, row + 2 * j) & 3) << (2 * j))
            store_bytes(out, at + 32 * half + 16 * side, pairs)


# --- a scale and a minimum for each sub-block: q2_K, q4_K, q5_K


@compiled
def encode_q2_k(flat: Any, importance: Any, out: Any) -> Any:
    """Encode q2_K: sub-blocks of 16, scales and minima of 4 bits."""
    count, period = flat.shape[0] // _BLOCK, importance.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    levels, fits = np.empty((16, LANES), np.float32), np.empty((FITS, LANES), np.float32)
    ls, lm = np.empty((16, LANES), np.int32), np.empty((16, LANES), np.int32)
    ds, ms = np.empty((1, LANES), np.float32), np.empty((1, LANES), np.float32)
    codes, top = np.empty((16, LANES), np.int32), np.float32(3)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if period > 0:
            gather(importance, first, count, period, ws)
            weigh(xs, ws, _ONE)
            start, delta, steps = np.float32(-0.9), np.float32(0.05), 36
        else:
            weigh_magnitudes(xs, ws)
            start, delta, steps = np.float32(-0.5), np.float32(0.1), 15
        for j in range(16):
            fit_minimum(xs, ws, 16 * j, 16, top, start, delta, steps, period == 0, levels, fits, j)
        if period > 0:
            fit_positive(fits, SCALE, 16, np.int32(15), ls, ds)
            fit_positive(fits, LOW, 16, np.int32(15), lm, ms)
        else:
            _round_positive(fits, SCALE, 16, 15, ls, ds)
            _round_positive(fits, LOW, 16, 15, lm, ms)
        for k in range(min(LANES, count - first)):
            _pack_q2_k(flat, first + k, fits, k, ls, lm, ds, ms, codes, out)


@compiled
def _pack_q2_k(
    flat: Any,
    block: Any,
    fits: Any,
    k: Any,
    ls: Any,
    lm: Any,
    ds: Any,
    ms: Any,
    codes: Any,
    out: Any,
) -> Any:
    """Write block `block`, which is lane `k`: scales, codes, scale of scales, of minima."""
    at = 84 * block
    d, m = put_half(out, at + 80, ds[0, k]), put_half(out, at + 82, ms[0, k])
    for j in range(16):
        byte = (ls[j, k] | (lm[j, k] << np.int32(4))) & np.int32(255)
        out[at + j] = np.uint8(byte)
        scale = d * np.float32(byte & np.int32(15))
        shift = m * np.float32(byte >> np.int32(4))
        found = fits[INVERSE + j, k], fits[BASE + j, k]
        start = _BLOCK * block + 16 * j
        store(codes, j, _rounded(flat, start, scale, shift, found, _ZERO, np.float32(3)))
    _put_pairs(codes, out, at + 16)


@compiled
def encode_q45_k(flat: Any, importance: Any, top: Any, out: Any) -> Any:
    """Encode q4_K (`top` 15) or q5_K (31): sub-blocks of 32, scales and minima of 6 bits."""
    count, period = flat.shape[0] // _BLOCK, importance.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    levels, fits = np.empty((32, LANES), np.float32), np.empty((FITS, LANES), np.float32)
    ls, lm = np.empty((8, LANES), np.int32), np.empty((8, LANES), np.int32)
    ds, ms = np.empty((1, LANES), np.float32), np.empty((1, LANES), np.float32)
    codes, highest = np.empty((16, LANES), np.int32), np.float32(top)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if period > 0:
            gather(importance, first, count, period, ws)
            weigh(xs, ws, _TWO)
            start, delta, steps = np.float32(-0.9), np.float32(0.05), 36
        else:
            weigh_offsets(xs, ws, 32)
            start, delta, steps = np.float32(-1.0), np.float32(0.1), 20
            if top > 15:
                start, steps = np.float32(-0.5), 15
        for j in range(8):
            fit_minimum(xs, ws, 32 * j, 32, highest, start, delta, steps, False, levels, fits, j)
        if period > 0:
            fit_positive(fits, SCALE, 8, np.int32(63), ls, ds)
            fit_positive(fits, LOW, 8, np.int32(63), lm, ms)
        else:
            _round_positive(fits, SCALE, 8, 63, ls, ds)
            _round_positive(fits, LOW, 8, 63, lm, ms)
        if period == 0 or top > 15:  # q4_K with importance keeps what wrapped around
            for j in range(8):
                _cap(ls, j)
                _cap(lm, j)
        for k in range(min(LANES, count - first)):
            _pack_q45_k(flat, first + k, fits, k, ls, lm, ds, ms, top, codes, out)


@inlined
def _cap(codes: Any, j: Any) -> Any:
    code = load(codes, j)
    store(codes, j, select(code < 63, code, 63))


@inlined
def _put_sixes(out: Any, at: Any, j: Any, scale: Any, low: Any) -> Any:
    """Store the 6 bits of scale and minimum of sub-block `j`; sub-blocks in their order."""
    four, six = np.int32(4), np.int32(6)
    if j < 4:
        out[at + j] = np.uint8(scale)
        out[at + 4 + j] = np.uint8(low)
    else:
        out[at + 4 + j] = np.uint8((scale & np.int32(15)) | ((low & np.int32(15)) << four))
        out[at + j - 4] |= np.uint8((scale >> four) << six)
        out[at + j] |= np.uint8((low >> four) << six)


@inlined
def _sixes(out: Any, at: Any, j: Any) -> Any:
    """Return scale and minimum of sub-block `j` as a reader finds them (`get_scale_min_k4`)."""
    four, six, low = np.int32(4), np.int32(6), np.int32(15)
    if j < 4:
        return np.int32(out[at + j]) & np.int32(63), np.int32(out[at + 4 + j]) & np.int32(63)
    both = np.int32(out[at + 4 + j])
    return (
        (both & low) | ((np.int32(out[at + j - 4]) >> six) << four),
        (both >> four) | ((np.int32(out[at + j]) >> six) << four),
    )


@compiled
def _pack_q45_k(
    flat: Any,
    block: Any,
    fits: Any,
    k: Any,
    ls: Any,
    lm: Any,
    ds: Any,
    ms: Any,
    top: Any,
    codes: Any,
    out: Any,
) -> Any:
    """Write block `block`, which is lane `k`: both scales, the 6 bits, fifth bits, codes."""
    at = (176 if top > 15 else 144) * block
    d, m = put_half(out, at, ds[0, k]), put_half(out, at + 2, ms[0, k])
    for j in range(8):
        _put_sixes(out, at + 4, j, ls[j, k], lm[j, k])
    for j in range(8):
        scale, low = _sixes(out, at + 4, j)
        found = fits[INVERSE + j, k], fits[BASE + j, k]
        for side in range(2):
            start = _BLOCK * block + 32 * j + 16 * side
            by, shift = d * np.float32(scale), m * np.float32(low)
            rounded = _rounded(flat, start, by, shift, found, _ZERO, np.float32(top))
            store(codes, 2 * j + side, rounded)
    quarters = at + 16
    if top > 15:
        quarters = at + 48
        for side in range(2):
            fifths = load(codes, side) >> 4
            for j in range(1, 8):
                fifths = fifths | ((load(codes, 2 * j + side) >> 4) << j)
            store_bytes(out, at + 16 + 16 * side, fifths)
    for j in range(4):
        for side in range(2):
            a, b = load(codes, 4 * j + side), load(codes, 4 * j + 2 + side)
            store_bytes(out, quarters + 32 * j + 16 * side, (a & 15) | ((b & 15) << 4))


# --- a signed scale for each sub-block: q3_K, q6_K


@compiled
def encode_q6_k(flat: Any, importance: Any, out: Any) -> Any:
    """Encode q6_K: sub-blocks of 16, scales of 8 bits."""
    count, period = flat.shape[0] // _BLOCK, importance.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    products, fits = np.empty((16, LANES), np.float32), np.empty((FITS, LANES), np.float32)
    codes = np.empty((16, LANES), np.int32)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if period > 0:
            gather(importance, first, count, period, ws)
        else:
            weigh_squares(xs, ws)
        for j in range(16):
            fit_symmetric(xs, ws, 16 * j, 16, np.float32(32), products, fits, j)
        for k in range(min(LANES, count - first)):
            _pack_q6_k(flat, first + k, fits, k, codes, out)


@inlined
def _extreme_scale(fits: Any, k: Any, count: Any) -> Any:
    """Return the scale of largest magnitude in lane `k`, the first of several."""
    most, extreme = _ZERO, _ZERO
    for j in range(count):
        scale = fits[SCALE + j, k]
        if abs(scale) > most:
            most, extreme = abs(scale), scale
    return extreme


@compiled
def _pack_q6_k(flat: Any, block: Any, fits: Any, k: Any, codes: Any, out: Any) -> Any:
    """Write block `block`, which is lane `k`: 4 bits, 2 bits, scales, their scale."""
    at = 210 * block
    extreme = _extreme_scale(fits, k, 16)
    if abs(extreme) < _EPSILON:
        out[at : at + 210] = np.uint8(0)
        return
    inverse = np.float32(-128) / extreme
    d = put_half(out, at + 208, _ONE / inverse)
    for j in range(16):
        scale = np.int8(min(np.int32(127), nearest_one(inverse * fits[SCALE + j, k])))
        out[at + 192 + j] = np.uint8(scale)
        by, found = d * np.float32(scale), (fits[INVERSE + j, k], _ZERO)
        start = _BLOCK * block + 16 * j
        rounded = _rounded(flat, start, by, _ZERO, found, np.float32(-32), np.float32(31)) + 32
        if by == _ZERO and found[0] == _ZERO:
            rounded = splat(np.int32(0))  # nothing was searched
        store(codes, j, rounded)
    for half in range(2):
        for side in range(2):
            row, high = 8 * half + side, splat(np.int32(0))
            for j in range(4):
                high = high | ((load(codes, row + 2 * j) >> 4) << (2 * j))
            store_bytes(out, at + 128 + 32 * half + 16 * side, high)
            for j in range(2):
                a, b = load(codes, row + 2 * j), load(codes, row + 2 * j + 4)
                fours = (a & 15) | ((b & 15) << 4)
                store_bytes(out, at + 64 * half + 32 * j + 16 * side, fours)


@compiled
def encode_q3_k(flat: Any, importance: Any, out: Any) -> Any:
    """Encode q3_K: sub-blocks of 16, scales of 6 bits."""
    count, period = flat.shape[0] // _BLOCK, importance.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    products, fits = np.empty((16, LANES), np.float32), np.empty((FITS, LANES), np.float32)
    whole = np.empty((FITS, LANES), np.float32)
    codes, half = np.empty((16, LANES), np.int32), np.float32(4)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if period > 0:
            gather(importance, first, count, period, ws)
            weigh(xs, ws, _TWO)
            for j in range(16):
                fit_symmetric(xs, ws, 16 * j, 16, half, products, fits, j)
            scales, weights = fits[SCALE : SCALE + 16], fits[WEIGHT : WEIGHT + 16]
            fit_symmetric(scales, weights, 0, 16, np.float32(32), products, whole, 0)
        else:
            for j in range(16):
                descend(xs, 16 * j, 16, half, ws, fits, j)
        for k in range(min(LANES, count - first)):
            _pack_q3_k(flat, first + k, fits, k, whole, ws, period > 0, codes, out)


@inlined
def _widest(extreme: Any, code: Any) -> Any:
    """Return the inverse scale that makes `code` of a number, and the scale; 0 for 0."""
    inverse = code / extreme if extreme != _ZERO else _ZERO
    return inverse, (_ONE / inverse if extreme != _ZERO else _ZERO)


@inlined
def _six_bits(value: Any) -> Any:
    return max(np.int32(-32), min(np.int32(31), nearest_one(value)))


@compiled
def _pack_q3_k(
    flat: Any,
    block: Any,
    fits: Any,
    k: Any,
    whole: Any,
    levels: Any,
    weighted: Any,
    codes: Any,
    out: Any,
) -> Any:
    """Write block `block`, which is lane `k`: third bits, 2 bits, 6 bits of scales, their scale.

    Without importance, `levels` has the codes of the search; with it, `whole` the scale of scales.
    """
    at = 110 * block
    inverse, scale = whole[INVERSE, k], whole[SCALE, k]
    if not weighted:
        inverse, scale = _widest(_extreme_scale(fits, k, 16), np.float32(-32))
    d = put_half(out, at + 108, scale)
    out[at + 96 : at + 108] = np.uint8(0)
    for j in range(16):
        code = np.int32(0)  # where nothing was searched
        if inverse != _ZERO:
            code = _six_bits(inverse * fits[SCALE + j, k]) + np.int32(32)
        out[at + 96 + j % 8] |= np.uint8((code & np.int32(15)) << np.int32(j // 8 * 4))
        out[at + 104 + j % 4] |= np.uint8((code >> np.int32(4)) << np.int32(j // 4 * 2))
        by, found = d * np.float32(code - np.int32(32)), (fits[INVERSE + j, k], _ZERO)
        start = _BLOCK * block + 16 * j
        low, high = np.float32(-4), np.float32(3)
        store(codes, j, _rounded(flat, start, by, _ZERO, found, low, high) + 4)
        if by == _ZERO and not weighted:
            for i in range(16):
                codes[j, i] = np.int32(levels[16 * j + i, k])
        elif by == _ZERO and found[0] == _ZERO:
            store(codes, j, splat(np.int32(0)))
    for side in range(2):
        thirds = splat(np.int32(0))
        for j in range(8):
            thirds = thirds | ((load(codes, 2 * j + side) >> 2) << j)
        store_bytes(out, at + 16 * side, thirds)
    _put_pairs(codes, out, at + 32)


# --- levels from a table: iq4_xs


@compiled
def encode_iq4_xs(flat: Any, importance: Any, out: Any) -> Any:
    """Encode iq4_xs: sub-blocks of 32, scales of 6 bits."""
    count, period = flat.shape[0] // _BLOCK, importance.shape[0] // _BLOCK
    xs, ws = np.empty((_BLOCK, LANES), np.float32), np.empty((_BLOCK, LANES), np.float32)
    fits = np.empty((FITS, LANES), np.float32)
    for first in range(0, count, LANES):
        gather(flat, first, count, count, xs)
        if period > 0:
            gather(importance, first, count, period, ws)
            weigh(xs, ws, _TWO)
        else:
            weigh_squares(xs, ws)
        for j in range(8):
            fit_table(xs, ws, 32 * j, 32, fits, j)
        for k in range(min(LANES, count - first)):
            _pack_iq4_xs(flat, first + k, fits, k, out)


@compiled
def _pack_iq4_xs(flat: Any, block: Any, fits: Any, k: Any, out: Any) -> Any:
    """Write block `block`, which is lane `k`: the scale, 2 bits and 4 bits of scales, codes."""
    at = 136 * block
    d = -_extreme_scale(fits, k, 8) / np.float32(32)
    put_half(out, at, d)
    inverse = _ONE / d if d != _ZERO else _ZERO
    high = np.int32(0)
    out[at + 4 : at + 8] = np.uint8(0)
    for j in range(8):
        code = _six_bits(inverse * fits[SCALE + j, k])
        scale = d * np.float32(code)
        by = _ONE / scale if scale != _ZERO else _ZERO
        start = _BLOCK * block + 32 * j
        a, b = in_table(by * load(flat, start)), in_table(by * load(flat, start + 16))
        store_bytes(out, at + 8 + 16 * j, a | (b << 4))
        code += np.int32(32)
        out[at + 4 + j // 2] |= np.uint8((code & np.int32(15)) << np.int32(j % 2 * 4))
        high |= (code >> np.int32(4)) << np.int32(2 * j)
    out[at + 2], out[at + 3] = np.uint8(high & np.int32(255)), np.uint8(high >> np.int32(8))
