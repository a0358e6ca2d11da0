"""Searches for the scale that loses least, over 16 blocks side by side.

Each is one of llama.cpp's ``ggml/src/ggml-quants.c`` (MIT) at 0c1e5709, by its formulas and in its
order of operations: what it sums one after the other, it sums so in each lane. Tiles are
[elements, 16] float32, a block in each column. What a search finds goes to the rows of `fits`
[`FITS`, 16] that belong to its sub-block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined
from qwen35.codecs.ggml.rounding import level, nearest
from qwen35.codecs.lanes import floats, load, magnitude, select, some, splat, store

__all__ = [
    "BASE",
    "FITS",
    "INVERSE",
    "LEVELS",
    "LOW",
    "SCALE",
    "WEIGHT",
    "descend",
    "extreme_of",
    "fit_minimum",
    "fit_positive",
    "fit_symmetric",
    "fit_table",
    "in_table",
]

SCALE, LOW, INVERSE, BASE, WEIGHT = 0, 16, 32, 48, 64
"""First row of each quantity in fits: 16 sub-blocks of a super-block have a row each.

The scale; the minimum, negated as ggml stores it; the inverse scale and the minimum by which the
best codes were rounded, which are needed where the stored scale is 0; the sum of weights.
"""

FITS = 80
"""Rows of fits."""

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of iq4_nl and iq4_xs (``kvalues_iq4nl`` of ``ggml-common.h``)."""

_EPSILON = np.float32(1e-15)
"""``GROUP_MAX_EPS``: a block whose largest weight is smaller counts as zero."""

_ZERO, _ONE, _TENTH = np.float32(0), np.float32(1), np.float32(0.1)


@compiled
def fit_minimum(
    xs: Any,
    ws: Any,
    at: Any,
    count: Any,
    top: Any,
    start: Any,
    delta: Any,
    steps: Any,
    absolute: Any,
    levels: Any,
    fits: Any,
    j: Any,
) -> Any:
    """Fit ``scale * level + minimum`` (`make_qkx2_quants`, `make_qkx3_quants`).

    A candidate begins where the best one before it left the minimum, so that candidates are tried
    one after the other.

    Args:
        xs: values, of which rows `at` to `at + count` are the sub-block.
        ws: weights of their errors, likewise.
        at: first row.
        count: rows.
        top: the largest level, float32.
        start: of what is added to `top` for a candidate's inverse scale, float32.
        delta: its steps, float32.
        steps: how many there are, beside the first.
        absolute: sum absolute errors, not their squares.
        levels: [count, 16] scratch.
        fits: takes scale, minimum, what the codes were rounded by, and the sum of weights.
        j: number of the sub-block.
    """
    x, w = load(xs, at), load(ws, at)
    low, high, sum_w, sum_x = x, x, w, w * x
    for i in range(at + 1, at + count):
        x, w = load(xs, i), load(ws, i)
        low = select(x < low, x, low)
        high = select(x > high, x, high)
        sum_w = sum_w + w
        sum_x = sum_x + w * x
    low = select(low > _ZERO, _ZERO, low)
    flat = high <= low
    inverse = top / (high - low)
    scale = _ONE / inverse
    least = splat(_ZERO)
    for i in range(at, at + count):
        x = load(xs, i)
        off = scale * level(inverse * (x - low), _ZERO, top) + low - x
        least = least + load(ws, i) * (magnitude(off) if absolute else off * off)
    least = select(flat, -_ONE, least)  # which no candidate is below
    scale = select(flat, _ZERO, scale)
    best, base = select(flat, _ZERO, inverse), low
    for step in range(steps + 1):
        inverse = splat((start + delta * np.float32(step)) + top) / (high - low)
        sum_l, sum_l2, sum_xl = splat(_ZERO), splat(_ZERO), splat(_ZERO)
        for i in range(count):
            x, w = load(xs, at + i), load(ws, at + i)
            l = level(inverse * (x - low), _ZERO, top)  # noqa: E741 - the formulas' name
            store(levels, i, l)
            sum_l = sum_l + w * l
            sum_l2 = sum_l2 + w * l * l
            sum_xl = sum_xl + w * l * x
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = this_low > _ZERO
        this_scale = select(above, sum_xl / sum_l2, this_scale)
        this_low = select(above, _ZERO, this_low)
        error = splat(_ZERO)
        for i in range(count):
            off = this_scale * load(levels, i) + this_low - load(xs, at + i)
            error = error + load(ws, at + i) * (magnitude(off) if absolute else off * off)
        better = (determinant > _ZERO) & (error < least)
        best, base = select(better, inverse, best), select(better, low, base)
        least, scale = select(better, error, least), select(better, this_scale, scale)
        low = select(better, this_low, low)
    store(fits, SCALE + j, scale)
    store(fits, LOW + j, low * -_ONE)  # whose zero has the other sign too
    store(fits, INVERSE + j, best)
    store(fits, BASE + j, base)
    store(fits, WEIGHT + j, sum_w)


@inlined
def extreme_of(xs: Any, at: Any, count: Any) -> Any:
    """Return the value of largest magnitude, the first of several, and its magnitude."""
    most, extreme = splat(_ZERO), splat(_ZERO)
    for i in range(at, at + count):
        x = load(xs, i)
        size = magnitude(x)
        more = size > most
        most, extreme = select(more, size, most), select(more, x, extreme)
    return extreme, most


@compiled
def fit_symmetric(
    xs: Any, ws: Any, at: Any, count: Any, half: Any, products: Any, fits: Any, j: Any
) -> Any:
    """Fit ``scale * level`` with levels from `-half` to `half - 1` (`make_qx_quants`).

    Args:
        xs: values, of which rows `at` to `at + count` are the sub-block.
        ws: weights of their errors, likewise.
        at: first row.
        count: rows.
        half: half the number of levels, float32.
        products: [count, 16] scratch.
        fits: takes the scale, the inverse that codes were rounded by (0 where all is zero) and the
            sum of weights.
        j: number of the sub-block.
    """
    extreme, most = extreme_of(xs, at, count)
    sum_w = splat(_ZERO)
    for i in range(count):
        w = load(ws, at + i)
        sum_w = sum_w + w
        store(products, i, w * load(xs, at + i))
    scale, best, inverse_best = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for candidate in range(19):
        step = 0 if candidate == 0 else candidate - 10 if candidate < 10 else candidate - 9
        inverse = splat(-(half + _TENTH * np.float32(step))) / extreme
        sum_lx, sum_l2 = splat(_ZERO), splat(_ZERO)
        for i in range(count):
            l = level(inverse * load(xs, at + i), -half, half - _ONE)  # noqa: E741
            sum_lx = sum_lx + load(products, i) * l
            sum_l2 = sum_l2 + load(ws, at + i) * l * l
        fitted = sum_lx / sum_l2
        if candidate == 0:
            better = sum_l2 != _ZERO
            inverse_best = inverse
        else:
            better = (sum_l2 > _ZERO) & (sum_lx * sum_lx > best * sum_l2)
            inverse_best = select(better, inverse, inverse_best)
        scale = select(better, fitted, scale)
        best = select(better, fitted * sum_lx, best)
    nothing = most < _EPSILON
    store(fits, SCALE + j, select(nothing, _ZERO, scale))
    store(fits, INVERSE + j, select(nothing, _ZERO, inverse_best))
    store(fits, WEIGHT + j, sum_w)


@compiled
def fit_positive(fits: Any, values: Any, count: Any, top: Any, codes: Any, scales: Any) -> Any:
    """Fit a scale to the scales, or the minima, of sub-blocks (`make_qp_quants`).

    Args:
        fits: their rows from `values` on; weights from `WEIGHT` on.
        values: `SCALE` or `LOW`.
        count: sub-blocks.
        top: the largest code, int32.
        codes: [count, 16] int32, takes the codes, as the low byte that ggml keeps.
        scales: [1, 16], takes the scale.
    """
    most = splat(_ZERO)
    for i in range(count):
        x = load(fits, values + i)
        most = select(most > x, most, x)
    inverse = np.float32(top) / most
    scale = _ONE / inverse
    least = splat(_ZERO)
    for i in range(count):
        x = load(fits, values + i)
        off = x - scale * floats(nearest(inverse * x) & 255)
        least = least + load(fits, WEIGHT + i) * off * off
    for candidate in range(8):
        step = candidate - 4 if candidate < 4 else candidate - 3
        tried = splat(_TENTH * np.float32(step) + np.float32(top)) / most
        scale = _ONE / tried
        error = splat(_ZERO)
        for i in range(count):
            x = load(fits, values + i)
            off = x - scale * floats(_at_most(nearest(tried * x), top))
            error = error + load(fits, WEIGHT + i) * off * off
        better = error < least
        least, inverse = select(better, error, least), select(better, tried, inverse)
    sum_lx, sum_l2 = splat(_ZERO), splat(_ZERO)
    for i in range(count):
        x, w = load(fits, values + i), load(fits, WEIGHT + i)
        code = _at_most(nearest(inverse * x), top)
        store(codes, i, code & 255)
        l = floats(code)  # noqa: E741
        sum_lx = sum_lx + w * x * l
        sum_l2 = sum_l2 + w * l * l
    _move_positive(fits, values, count, top, codes, sum_lx, sum_l2, scales)
    nothing = most < _EPSILON
    store(scales, 0, select(nothing, _ZERO, load(scales, 0)))
    for i in range(count):
        store(codes, i, select(nothing, 0, load(codes, i)))


@inlined
def _at_most(value: Any, top: Any) -> Any:
    return select(value < top, value, top)


@inlined
def _move_positive(
    fits: Any,
    values: Any,
    count: Any,
    top: Any,
    codes: Any,
    sum_lx: Any,
    sum_l2: Any,
    scales: Any,
) -> Any:
    """Move one code at a time to where the others want it, while that helps; at most 5 rounds."""
    for _ in range(5):
        moved = splat(_ZERO) < _ZERO
        for i in range(count):
            x, w, code = load(fits, values + i), load(fits, WEIGHT + i), load(codes, i)
            l = floats(code)  # noqa: E741
            other_lx, other_l2 = sum_lx - w * x * l, sum_l2 - w * l * l
            wanted = _at_most(nearest(x * other_l2 / other_lx), top)
            n = floats(wanted)
            new_lx, new_l2 = other_lx + w * x * n, other_l2 + w * n * n
            better = (
                (other_lx > _ZERO)
                & (other_l2 > _ZERO)
                & (wanted != code)
                & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            )
            store(codes, i, select(better, wanted & 255, code))
            sum_lx, sum_l2 = select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)
            moved = moved | better
        if not some(moved):
            break
    store(scales, 0, select(sum_l2 > _ZERO, sum_lx / sum_l2, _ZERO))


@compiled
def descend(xs: Any, at: Any, count: Any, half: Any, levels: Any, fits: Any, j: Any) -> Any:
    """Fit ``scale * level``, a level at a time (`make_q3_quants`).

    Args:
        xs: values, of which rows `at` to `at + count` are the sub-block.
        at: first row.
        count: rows.
        half: half the number of levels, float32.
        levels: takes the codes, in the same rows: levels plus `half`, 0 where all is zero.
        fits: takes the scale.
        j: number of the sub-block.
    """
    extreme, most = extreme_of(xs, at, count)
    inverse = -half / extreme
    sum_lx, sum_l2 = splat(_ZERO), splat(_ZERO)
    for i in range(at, at + count):
        x = load(xs, i)
        l = level(inverse * x, -half, half - _ONE)  # noqa: E741
        store(levels, i, l)
        sum_lx = sum_lx + x * x * x * l
        sum_l2 = sum_l2 + x * x * l * l
    for _ in range(5):
        moved = splat(_ZERO) < _ZERO
        for i in range(at, at + count):
            x, l = load(xs, i), load(levels, i)  # noqa: E741
            w = x * x
            other_lx, other_l2 = sum_lx - w * x * l, sum_l2 - w * l * l
            n = level(x * other_l2 / other_lx, -half, half - _ONE)
            new_lx, new_l2 = other_lx + w * x * n, other_l2 + w * n * n
            better = (
                (other_lx > _ZERO)
                & (n != l)
                & (new_l2 > _ZERO)
                & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            )
            store(levels, i, select(better, n, l))
            sum_lx, sum_l2 = select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)
            moved = moved | better
        if not some(moved):
            break
    nothing = most < _EPSILON
    for i in range(at, at + count):
        store(levels, i, select(nothing, _ZERO, load(levels, i) + half))
    scale = select(sum_l2 > _ZERO, sum_lx / sum_l2, _ZERO)
    store(fits, SCALE + j, select(nothing, _ZERO, scale))


_VALUES = tuple(np.float32(value) for value in LEVELS)
_BOUNDS = tuple(np.float32((a + b) / 2) for a, b in pairwise(LEVELS))
"""What is below a bound is nearer to the level before it; differences there are exact."""

_V0 = _VALUES[0]
_NUMBERS = tuple(np.int32(number) for number in range(16))
_B0, _B1, _B2, _B3, _B4, _B5, _B6, _B7, _B8, _B9, _B10, _B11, _B12, _B13, _B14 = _BOUNDS


@inlined
def _nearest(x: Any, choices: Any) -> Any:
    """Return that of 16 `choices` whose level is nearest to `x` [16], the last for NaN."""
    found = select(x < _B0, splat(choices[0]), choices[1])
    found = select(x < _B1, found, choices[2])
    found = select(x < _B2, found, choices[3])
    found = select(x < _B3, found, choices[4])
    found = select(x < _B4, found, choices[5])
    found = select(x < _B5, found, choices[6])
    found = select(x < _B6, found, choices[7])
    found = select(x < _B7, found, choices[8])
    found = select(x < _B8, found, choices[9])
    found = select(x < _B9, found, choices[10])
    found = select(x < _B10, found, choices[11])
    found = select(x < _B11, found, choices[12])
    found = select(x < _B12, found, choices[13])
    found = select(x < _B13, found, choices[14])
    return select(x < _B14, found, choices[15])


@inlined
def in_table(x: Any) -> Any:
    """Return the number of the level that is nearest to `x` [16], as int32 (`best_index_int8`)."""
    return _nearest(x, _NUMBERS)


@compiled
def fit_table(xs: Any, ws: Any, at: Any, count: Any, fits: Any, j: Any) -> Any:
    """Fit ``scale * level`` with the levels of the table (`quantize_row_iq4_nl_impl`).

    Args:
        xs: values, of which rows `at` to `at + count` are the sub-block.
        ws: weights of their errors, likewise.
        at: first row.
        count: rows.
        fits: takes the scale.
        j: number of the sub-block.
    """
    extreme, most = extreme_of(xs, at, count)
    scale, best = splat(_ZERO), splat(_ZERO)
    for candidate in range(16):
        if candidate == 0:
            inverse = _ONE / ((_ZERO - extreme) / _V0)
        else:
            inverse = splat(np.float32(candidate - 8) + _V0) / extreme
        sum_qx, sum_q2 = splat(_ZERO), splat(_ZERO)
        for i in range(at, at + count):
            x, w = load(xs, i), load(ws, i)
            q = _nearest(inverse * x, _VALUES)
            sum_qx = sum_qx + w * q * x
            sum_q2 = sum_q2 + w * q * q
        fitted = sum_qx / sum_q2
        better = sum_q2 > _ZERO
        if candidate > 0:
            better = better & (sum_qx * sum_qx > best * sum_q2)
        scale, best = select(better, fitted, scale), select(better, fitted * sum_qx, best)
    store(fits, SCALE + j, select(most < _EPSILON, _ZERO, scale))
