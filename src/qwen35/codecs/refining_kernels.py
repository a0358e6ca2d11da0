"""Inner loops of refined codes, compiled by Numba.

Rows are refined 16 side by side, a lane each. Every sum has one order, whatever rows are beside
each other, and nothing is fused or reordered: the bytes depend on no processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.lanes import LANES, load, splat, store
from qwen35.codecs.refining import LEAST_GAIN, REACH

__all__ = ["cholesky", "choose_scales", "descend", "feed_back", "losses", "unit_columns"]

_ZERO = np.float32(0)
_PANEL = 64
"""Columns that are factored before what is right of them is updated."""


# --- the factor of a Hessian


@compiled
def cholesky(a: Any) -> None:
    """Replace the lower triangle of a positive definite matrix a [K, K] float64 by its factor L.

    a = L L^T. The upper triangle keeps what it holds.
    """
    size = a.shape[0]
    rows = np.empty((_PANEL, size))
    for first in range(0, size, _PANEL):
        end = min(first + _PANEL, size)
        for j in range(first, end):
            for k in range(first, j):
                x = a[j, k]
                for i in range(j, size):
                    a[i, j] -= a[i, k] * x
            root = np.sqrt(a[j, j])
            for i in range(j, size):
                a[i, j] /= root
        for k in range(first, end):
            for i in range(end, size):
                rows[k - first, i] = a[i, k]
        for i in range(end, size):
            _subtract(a[i], rows, end - first, end, i + 1)


@compiled
def _subtract(row: Any, rows: Any, count: Any, begin: Any, end: Any) -> None:
    """Subtract from a row its products with `count` columns, at positions `begin` to `end`."""
    at = row[begin - count : begin]
    k = 0
    while k + 4 <= count:
        a, b, c, d = at[k], at[k + 1], at[k + 2], at[k + 3]
        one, two, three, four = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for j in range(begin, end):
            row[j] = row[j] - a * one[j] - b * two[j] - c * three[j] - d * four[j]
        k += 4
    while k < count:
        for j in range(begin, end):
            row[j] -= at[k] * rows[k, j]
        k += 1


@compiled
def unit_columns(lower: Any, feedback: Any) -> None:
    """Turn a factor around and scale it.

    lower: [K, K] float64, L of the Hessian with its columns in ascending order -> feedback:
    [K, K4] float32: row j holds, for each column i before j in descending order, the share of i's
    error that j takes over; zero from j on.
    """
    size = lower.shape[0]
    for j in range(size):
        b = size - 1 - j
        for i in range(j):
            feedback[j, i] = np.float32(lower[size - 1 - i, b] / lower[b, b])


# --- codes


@inlined
def _value(index: Any, scale: Any, offset: Any, levels: Any) -> Any:
    """Return what a code stands for; rounded as decoders round."""
    return np.float32(np.float32(scale * levels[index]) + offset)


@inlined
def _nearest(
    target: Any, scale: Any, offset: Any, levels: Any, middles: Any, even: Any, guess: Any
) -> Any:
    """Return the code nearest to a number; the scale is not zero.

    The same for every guess, and sooner for a good one.
    """
    x = (np.float64(target) - np.float64(offset)) / np.float64(scale)
    top = levels.shape[0] - 1
    if even:
        step = np.rint(x - np.float64(levels[0]))
        inside = step > 0  # false for NaN
        if not inside:
            return 0
        return top if step > top else int(step)
    low, high = 0, top
    if guess < top and x > middles[guess]:
        low = guess + 1
    elif guess > 0 and x > middles[guess - 1]:
        return guess
    else:
        high = guess
    while low < high:
        middle = (low + high) >> 1
        if x > middles[middle]:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _aimed(target: Any, weight: Any, reach: Any) -> Any:
    return min(max(target, weight - reach), weight + reach)


@compiled
def feed_back(
    weights: Any,
    order: Any,
    feedback: Any,
    scales: Any,
    offsets: Any,
    levels: Any,
    middles: Any,
    even: Any,
    step: Any,
    codes: Any,
    errors: Any,
) -> None:
    """Choose codes column by column; later columns make up for the errors of earlier ones.

    weights: [R, K] float32; order: [K] the columns, as `feedback` has them; feedback: as
    `unit_columns` makes it; scales, offsets: [R, K / group] float32; levels: [L] float32, rising;
    middles: [L - 1] float64; even: whether levels are consecutive integers; step: the largest
    between two -> codes: [R, K] uint8, whose values stay where a scale is zero; errors:
    [tiles, K4, 16] float32, zeros: weights minus values in `order`, by tiles of 16 rows.
    """
    count, size = weights.shape
    group = size // scales.shape[1]
    sums = np.empty((1, LANES), np.float32)
    for j in range(size):
        column = order[j]
        part = column // group
        for tile in range(errors.shape[0]):
            store(sums, 0, _product(errors[tile], feedback[j], j))
            for lane in range(min(LANES, count - LANES * tile)):
                row = LANES * tile + lane
                weight, scale, offset = weights[row, column], scales[row, part], offsets[row, part]
                index = np.int64(codes[row, column])
                if scale != _ZERO:
                    reach = np.float32(REACH * step) * abs(scale)
                    target = _aimed(weight + sums[0, lane], weight, reach)
                    index = _nearest(target, scale, offset, levels, middles, even, index)
                    codes[row, column] = index
                errors[tile, j, lane] = weight - _value(index, scale, offset, levels)


@inlined
def _product(tile: Any, row: Any, end: Any) -> Any:
    """Return the sum of a tile's rows [K4, 16] times the numbers of `row`, up to `end`."""
    a, b, c, d = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for i in range(0, end, 4):
        a = a + load(tile, i) * row[i]
        b = b + load(tile, i + 1) * row[i + 1]
        c = c + load(tile, i + 2) * row[i + 2]
        d = d + load(tile, i + 3) * row[i + 3]
    return (a + b) + (c + d)


@compiled
def descend(
    weights: Any,
    order: Any,
    hessian: Any,
    scales: Any,
    offsets: Any,
    levels: Any,
    middles: Any,
    even: Any,
    step: Any,
    sweeps: Any,
    codes: Any,
    errors: Any,
) -> None:
    """Change single codes as long as the loss falls: coordinate descent.

    hessian: [K, K4] float32, damped, in `order`; sweeps: the most; the rest as in `feed_back`.
    """
    count, size = weights.shape
    tile_slopes = np.empty((size, LANES), np.float32)
    slopes = np.empty(size)
    for tile in range(errors.shape[0]):
        for j in range(size):
            store(tile_slopes, j, _product(errors[tile], hessian[j], size))
        for lane in range(min(LANES, count - LANES * tile)):
            row = LANES * tile + lane
            for j in range(size):
                slopes[j] = tile_slopes[j, lane]
            grid = scales[row], offsets[row], levels, middles, even, step
            own = codes[row], errors[tile, :, lane]
            for _ in range(sweeps):
                if not _sweep(weights[row], order, hessian, grid, slopes, own):
                    break


@compiled
def _sweep(weights: Any, order: Any, hessian: Any, grid: Any, slopes: Any, own: Any) -> Any:
    """Go through the columns of a row once; return whether a code has changed."""
    scales, offsets, levels, middles, even, step = grid
    codes, errors = own
    group = weights.shape[0] // scales.shape[0]
    changed = False
    for j in range(weights.shape[0]):
        column = order[j]
        scale, offset = scales[column // group], offsets[column // group]
        curvature = np.float64(hessian[j, j])
        if scale == _ZERO or curvature <= 0:
            continue
        weight, error = weights[column], errors[j]
        target = np.float32(weight - error + slopes[j] / curvature)
        target = _aimed(target, weight, np.float32(REACH * step) * abs(scale))
        old = np.int64(codes[column])
        index = _nearest(target, scale, offset, levels, middles, even, old)
        if index == old:
            continue
        new = weight - _value(index, scale, offset, levels)
        change = np.float64(new) - np.float64(error)
        if change * (change * curvature * (1 - LEAST_GAIN) + 2 * slopes[j]) < 0:
            codes[column], errors[j], changed = index, new, True
            _add(slopes, hessian[j], change)
    return changed


@compiled
def _add(slopes: Any, row: Any, factor: Any) -> None:
    for k in range(slopes.shape[0]):
        slopes[k] += factor * row[k]


# --- scales


@compiled
def choose_scales(
    weights: Any, importance: Any, scales: Any, levels: Any, middles: Any, even: Any, chosen: Any
) -> None:
    """Choose the scales with which the nearest codes err least; the first of equals.

    weights: [R, K] float32; importance: [K] float64, error weight of each column; scales: [C, R,
    K / group] float32; the rest as in `feed_back` -> chosen: [R, K / group] uint8. A scale of zero
    stays.
    """
    group = weights.shape[1] // scales.shape[2]
    half = levels.shape[0] >> 1
    for row in range(weights.shape[0]):
        for part in range(scales.shape[2]):
            if scales[0, row, part] == _ZERO:
                continue
            least = np.inf
            for one in range(scales.shape[0]):
                scale, loss = scales[one, row, part], 0.0
                for column in range(part * group, (part + 1) * group):
                    weight = weights[row, column]
                    index = _nearest(weight, scale, _ZERO, levels, middles, even, half)
                    error = np.float64(weight) - np.float64(_value(index, scale, _ZERO, levels))
                    loss += importance[column] * error * error
                if loss < least:
                    least = loss
                    chosen[row, part] = one


# --- losses


@compiled
def losses(
    weights: Any, order: Any, triangle: Any, scales: Any, offsets: Any, levels: Any, codes: Any,
    found: Any,
) -> None:  # fmt: skip
    """Compute the loss of each row: e H e^T, with the errors e of its codes.

    triangle: [K, K4] float32: row j holds, in `order`, twice H before the diagonal, H on it, and
    zeros behind; the rest as in `feed_back` -> found: [R] float64.
    """
    count, size = weights.shape
    group = size // scales.shape[1]
    errors = np.zeros((triangle.shape[1], LANES), np.float32)
    sums = np.empty((1, LANES), np.float32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        for lane in range(lanes):
            row = first + lane
            found[row] = 0
            for j in range(size):
                column = order[j]
                scale, offset = scales[row, column // group], offsets[row, column // group]
                value = _value(codes[row, column], scale, offset, levels)
                errors[j, lane] = weights[row, column] - value
        for j in range(size):
            store(sums, 0, _product(errors, triangle[j], j + 1))
            for lane in range(lanes):
                found[first + lane] += np.float64(errors[j, lane]) * np.float64(sums[0, lane])
