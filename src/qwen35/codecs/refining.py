"""Refined codes: chosen by the error that they cause in a layer's outputs.

An error E of a weight W [N, K] changes the outputs of its layer by E x. Over inputs x with the
Hessian H = sum of x x^T, that is trace(E H E^T) in square sum, row by row. The codes of a row
are chosen in two steps:

1. Column by column, in order of descending diagonal of H; each column makes up, as far as its grid
   allows, for the errors of those before (GPTQ, https://arxiv.org/abs/2210.17323; written with the
   factor of H itself, as LDLQ, https://arxiv.org/abs/2307.13304, and so without its inverse).
2. Coordinate descent: single codes change as long as the loss falls.

With a diagonal H both give the nearest codes. Scales may be searched before: of some that
a format can hold, those with the least error of the nearest codes, weighted by the diagonal of H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from qwen35.array_types import F32, I64, U8, Array

__all__ = [
    "DAMPING",
    "LEAST_GAIN",
    "REACH",
    "SWEEPS",
    "CodeGrid",
    "Curvature",
    "HessianPair",
    "Levels",
    "Refining",
    "nearest_codes",
    "refined_codes",
    "row_losses",
    "searched_scales",
]

DAMPING = 0.01
"""Added to the diagonal, in shares of its mean: .01 and .1 do not differ measurably."""

REACH = 1.0
"""How far from its weight a code may aim, in the grid's largest steps: farther gains nothing, and
comparisons with the source can rely on it."""

LEAST_GAIN = 1e-4
"""A step down must gain this share of its curvature: float32 sums decide nothing."""

SWEEPS = 8
"""The most of coordinate descent: few rows need as many."""

_ROWS = 64
"""Rows that go through the factor together: it is read from memory once for them."""


@dataclass(frozen=True)
class Levels:
    """The values of the codes of a format that is not in their order.

    Args:
        values: [L] float32, rising, each once.
        stored: [L] uint8: a code with each value.
        index: uint8: the place in `values` of each code.
    """

    values: F32
    stored: U8
    index: U8

    @classmethod
    def of(cls, values: F32) -> Levels:
        """Return the levels of codes with these values; those of NaN have none.

        Of codes with the same value, such as zeros of both signs, the first is written.
        """
        rising, stored = np.unique(values[np.isfinite(values)], return_index=True)
        first = np.flatnonzero(np.isfinite(values))[stored]
        index = np.searchsorted(rising, values) % len(rising)
        return cls(rising, first.astype(np.uint8), index.astype(np.uint8))


@dataclass(frozen=True)
class CodeGrid:
    """What the codes of some rows can stand for: ``scale * levels[code] + offset``.

    The product and the sum are rounded to float32, as decoders do.

    Args:
        codes: [rows, columns] uint8, indices into `levels`, as the codec chose them.
        scales: [rows, groups] float32, each for columns / groups neighbours; 0 keeps their codes.
        levels: [L] float32, rising.
        offsets: [rows, groups] float32; None for zeros.
    """

    codes: U8
    scales: F32
    levels: F32
    offsets: F32 | None = None

    def arguments(self) -> tuple[Any, ...]:
        """Return scales, offsets and levels for kernels."""
        scales = np.ascontiguousarray(self.scales, np.float32)
        offsets = np.zeros_like(scales) if self.offsets is None else self.offsets
        return scales, np.ascontiguousarray(offsets, np.float32), self.levels

    def spacing(self) -> tuple[Any, ...]:
        """Return the middles between levels, whether they are even, and the largest step."""
        wide = self.levels.astype(np.float64)
        steps = np.diff(wide)
        return (wide[:-1] + wide[1:]) / 2, bool((steps == 1).all()), float(steps.max(initial=0))

    def values(self, codes: U8) -> F32:
        """Return [rows, columns] what codes stand for."""
        group = codes.shape[1] // self.scales.shape[1]
        scales, offsets, levels = self.arguments()
        scaled = np.repeat(scales, group, axis=1) * levels[codes]
        decoded: F32 = scaled + np.repeat(offsets, group, axis=1)
        return decoded


class HessianPair(Protocol):
    """The Hessians of an input; each may be read from a file whenever it is asked for."""

    @property
    def fit(self) -> F32:
        """[K, K] symmetric; codes are fitted to it."""

    @property
    def held_out(self) -> F32:
        """[K, K] symmetric, of other tokens; only these judge."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """Hessians, prepared for refining the weights that read an input.

    Args:
        order: [K] columns by descending diagonal; the first of equals first.
        hessian: [K, K4] float32: damped, rows and columns in `order`.
        feedback: [K, K4] float32: `qwen35.codecs.refining_kernels.unit_columns` of its factor.
        triangle: [K, K4] float32: held-out, for `qwen35.codecs.refining_kernels.losses`.
        useful: whether inputs differ from zero at all, in both parts, and are sums of x x^T: only
            such have a factor.
    """

    order: I64
    hessian: F32 = field(repr=False)
    feedback: F32 = field(repr=False)
    triangle: F32 = field(repr=False)
    useful: bool

    @property
    def fitted(self) -> Curvature:
        """The same, with losses on the tokens that codes are fitted to, damped; computed anew."""
        triangle = np.tril(self.hessian)
        triangle += np.tril(self.hessian, -1)
        return replace(self, triangle=triangle)

    @classmethod
    def of(
        cls, pair: HessianPair, columns: I64 | None = None, damping: float = DAMPING
    ) -> Curvature:
        """Prepare Hessians.

        Args:
            pair: the Hessians.
            columns: [K] the column of the input that each column of the weights reads, if they were
                reordered.
            damping: added to the diagonal, in shares of its mean.
        """
        fit = _reordered(pair.fit, columns)
        diagonal = fit.diagonal().astype(np.float64)
        order = np.argsort(-diagonal, kind="stable")
        size = len(order)
        added = np.float32(min(damping * diagonal.mean(), np.finfo(np.float32).max))
        hessian = _wide(size)
        hessian[:, :size] = _reordered(fit, order)
        del fit  # they take gigabytes
        with np.errstate(over="ignore", invalid="ignore"):  # such are of no use
            hessian[np.arange(size), np.arange(size)] += added
            feedback = _feedback(hessian) if diagonal.any() else _wide(size)
        held_out = _reordered(_reordered(pair.held_out, columns), order)
        finite = bool(np.isfinite(feedback).all() and np.isfinite(hessian).all())
        useful = finite and bool(diagonal.any() and held_out.diagonal().any())
        triangle = _wide(size)
        triangle[:, :size] = np.tril(held_out)
        triangle[:, :size] += np.tril(held_out, -1)
        return cls(order, hessian, feedback, triangle, useful)


@dataclass(frozen=True)
class Refining:
    """What chooses codes on one device: the functions of this module, or the same for a GPU.

    Args:
        refined_codes: chooses codes.
        row_losses: judges them.
        searched_scales: chooses scales.
        pieces: how many pieces of a weight (`qwen35.codecs.pieces.PIECE`) to refine together.
    """

    refined_codes: Callable[[F32, CodeGrid, Curvature], U8]
    row_losses: Callable[[F32, CodeGrid, U8, Curvature], Array]
    searched_scales: Callable[[F32, CodeGrid, F32, Curvature], U8]
    pieces: int = 1


def _reordered(matrix: F32, order: I64 | None) -> F32:
    return matrix if order is None else matrix[np.ix_(order, order)]


def _feedback(hessian: F32) -> F32:
    from qwen35.codecs.refining_kernels import cholesky, unit_columns

    size = len(hessian)
    lower = hessian[::-1, :size][:, ::-1].astype(np.float64)
    cholesky(lower)
    result = _wide(size)
    unit_columns(lower, result)
    return result


def _wide(size: int) -> F32:
    """Return [K, K4] zeros: rows padded to the step of the kernels."""
    return np.zeros((size, -(-size // 4) * 4), np.float32)


def refined_codes(weights: F32, grid: CodeGrid, curvature: Curvature, sweeps: int = SWEEPS) -> U8:
    """Return [rows, columns] refined codes.

    Args:
        weights: [rows, columns] float32, finite.
        grid: what their codes can stand for.
        curvature: of their inputs.
        sweeps: the most of coordinate descent; 0 for none.
    """
    from qwen35.codecs.lanes import LANES
    from qwen35.codecs.refining_kernels import descend, feed_back

    codes = np.ascontiguousarray(grid.codes).copy()
    weights = np.ascontiguousarray(weights)
    scales, offsets, levels = grid.arguments()
    middles, even, step = grid.spacing()
    order, feedback, hessian = curvature.order, curvature.feedback, curvature.hessian
    for first in range(0, len(codes), _ROWS):
        rows = slice(first, first + _ROWS)
        tiles = -(-len(codes[rows]) // LANES)
        errors = np.zeros((tiles, feedback.shape[1], LANES), np.float32)
        kept = (scales[rows], offsets[rows], levels, middles, even, step)
        feed_back(weights[rows], order, feedback, *kept, codes[rows], errors)
        descend(weights[rows], order, hessian, *kept, sweeps, codes[rows], errors)
    return codes


def searched_scales(weights: F32, grid: CodeGrid, others: F32, curvature: Curvature) -> U8:
    """Return [rows, groups] which scales to take: 0 for those of the grid, 1 for ``others[0]``...

    Args:
        weights: [rows, columns] float32, finite.
        grid: without offsets.
        others: [at most 255, rows, groups] float32.
        curvature: of their inputs; only its diagonal counts.
    """
    from qwen35.codecs.refining_kernels import choose_scales

    assert grid.offsets is None
    importance = np.empty(len(curvature.order))
    importance[curvature.order] = curvature.hessian.diagonal()
    scales = np.concatenate([grid.scales[None], others])
    middles, even, _ = grid.spacing()
    chosen = np.zeros(grid.scales.shape, np.uint8)
    given = (scales, grid.levels, middles, even)
    choose_scales(np.ascontiguousarray(weights), importance, *given, chosen)
    return chosen


def nearest_codes(weights: F32, grid: CodeGrid) -> U8:
    """Return [rows, columns] the nearest codes; those of the grid where a scale is zero."""
    middles, _, _ = grid.spacing()
    scales, offsets, _ = grid.arguments()
    group = weights.shape[1] // scales.shape[1]
    scales, offsets = (np.repeat(one, group, axis=1) for one in (scales, offsets))
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = (weights.astype(np.float64) - offsets) / scales
    nearest = np.searchsorted(middles, np.nan_to_num(steps)).astype(np.uint8)
    return np.where(scales == 0, grid.codes, nearest)


def row_losses(weights: F32, grid: CodeGrid, codes: U8, curvature: Curvature) -> Array:
    """Return [rows] float64: the loss of each row on held-out tokens."""
    from qwen35.codecs.refining_kernels import losses

    found = np.empty(len(codes))
    codes = np.ascontiguousarray(codes)
    weights = np.ascontiguousarray(weights)
    losses(weights, curvature.order, curvature.triangle, *grid.arguments(), codes, found)
    return found
