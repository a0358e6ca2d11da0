"""Refined codes in torch, on any device; the same codes and losses as the CPU kernels, to the bit.

The operations are those of `qwen35.codecs.refining_kernels`, each rounded by itself and every sum
in the same order: no product of matrices, nothing that multiplies and adds at once, and no division
by a number that is not on the device, which torch turns into a product on GPUs. All rows of a chunk
go through the columns together. Columns are in the order of the curvature, but for scales; arrays
are [columns, rows] while errors are fed back, and [rows, columns] in coordinate descent.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.pieces import PIECE
from qwen35.codecs.refining import LEAST_GAIN, REACH, SWEEPS, CodeGrid, Curvature

__all__ = ["PIECES", "TorchRefining"]

PIECES = 8
"""Pieces of a weight that are refined together: a GPU needs many rows, since each column takes as
long for few."""

_CHUNK = PIECES * PIECE
"""Weights that are refined together: at up to 64 bytes each, 0.3 GB of the device's memory."""

_CURVATURES = 2
"""Those that stay on the device, at 12 bytes for each pair of columns."""

_BLOCK = 64
"""Columns that coordinate descent tries at a time."""


class TorchRefining:
    """The functions of `qwen35.codecs.refining` on a torch device.

    Threads take turns, so that the device's memory does not depend on their number.

    Args:
        device: such as ``cuda:1``.
        chunk: how many weights to refine together.
    """

    def __init__(self, device: str, chunk: int = _CHUNK) -> None:
        self._device, self._chunk = device, chunk
        self._lock = Lock()
        self._held: list[tuple[weakref.ref[Curvature], _Curvature]] = []

    def refined_codes(
        self, weights: F32, grid: CodeGrid, curvature: Curvature, sweeps: int = SWEEPS
    ) -> U8:
        """Return what `qwen35.codecs.refining.refined_codes` does."""
        found = np.empty(weights.shape, np.uint8)
        with self._lock:
            held = self._on_device(curvature)
            for rows in self._chunks(weights):
                levels, scales = _sent_grid(grid, rows, self._device)
                given, codes = self._ordered(held, weights[rows], grid.codes[rows])
                errors = _feed_back(given, levels, scales, held, codes)
                descent = _Descent(given, levels, scales, held, codes, errors)
                for _ in range(sweeps):
                    if not descent.sweep():
                        break
                found[rows] = _received(descent.codes[:, held.places])
        return found

    def row_losses(self, weights: F32, grid: CodeGrid, codes: U8, curvature: Curvature) -> Array:
        """Return what `qwen35.codecs.refining.row_losses` does."""
        found = np.empty(len(codes))
        with self._lock:
            held = self._on_device(curvature)
            for rows in self._chunks(weights):
                levels, scales = _sent_grid(grid, rows, self._device)
                given, index = self._ordered(held, weights[rows], codes[rows])
                errors = held.no_errors(given)
                own = errors[: len(given)]
                wide = scales.at(held.order // (len(given) // len(scales)))
                torch.sub(given, levels.values(index.long(), wide), out=own)
                sums = _products(errors, held.triangle, triangular=True)
                found[rows] = _received(_total(own.double() * sums))
        return found

    def searched_scales(
        self, weights: F32, grid: CodeGrid, others: F32, curvature: Curvature
    ) -> U8:
        """Return what `qwen35.codecs.refining.searched_scales` does."""
        chosen = np.empty(grid.scales.shape, np.uint8)
        parts = grid.scales.shape[1], -1
        with self._lock:
            importance = self._on_device(curvature).importance.unflatten(0, parts)[..., None]
            for rows in self._chunks(weights):
                groups = _sent(weights[rows], self._device).T.unflatten(0, parts)
                stays = _sent(grid.scales[rows] == 0, self._device).T
                least = torch.full_like(stays, torch.inf, dtype=torch.float64)
                best = torch.zeros_like(stays, dtype=torch.uint8)
                for number, each in enumerate((grid.scales, *others)):
                    tried = CodeGrid(grid.codes, each, grid.levels)
                    levels, scales = _sent_grid(tried, rows, self._device)
                    wide = scales.at((slice(None), None))
                    errors = groups.double() - levels.values(levels.nearest(groups, wide), wide)
                    losses = _total((importance * errors * errors).transpose(0, 1))
                    less = losses < least
                    least = torch.where(less, losses, least)
                    best.masked_fill_(less & ~stays, number)
                chosen[rows] = _received(best.T)
        return chosen

    def _chunks(self, weights: F32) -> Iterator[slice]:
        count, columns = weights.shape
        size = max(1, self._chunk // columns)
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def _ordered(self, held: _Curvature, *arrays: Array) -> list[Any]:
        """Send [rows, columns] to the device; return [columns, rows] in the curvature's order."""
        return [_sent(one, self._device).T[held.order] for one in arrays]

    def _on_device(self, curvature: Curvature) -> _Curvature:
        """Return a curvature on the device; sent, unless it is one of the last that were used."""
        found = [one for one in self._held if one[0]() is curvature]
        others = [one for one in self._held if one[0]() not in (None, curvature)]
        self._held = others[1 - _CURVATURES :]  # before another takes memory
        one = (
            found[0] if found else (weakref.ref(curvature), _Curvature.of(curvature, self._device))
        )
        self._held.append(one)
        return one[1]


def _sent(array: Array, device: str) -> Any:
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def _received(tensor: Any) -> Array:
    found: Array = tensor.cpu().numpy()
    return found


@dataclass(frozen=True)
class _Curvature:
    """A curvature on a device.

    Args:
        columns: its order, as a list.
        order: the same, [K] int64.
        places: [K] int64: where each column is in that order.
        hessian, feedback, triangle: [K, K4] float32.
        diagonal: [K] float64, of the Hessian.
    """

    columns: list[int]
    order: Any
    places: Any
    hessian: Any
    feedback: Any
    triangle: Any
    diagonal: Any

    @classmethod
    def of(cls, curvature: Curvature, device: str) -> _Curvature:
        """Send one to a device."""
        hessian = _sent(curvature.hessian, device)
        order = _sent(curvature.order, device)
        return cls(
            curvature.order.tolist(),
            order,
            order.argsort(),
            hessian,
            _sent(curvature.feedback, device),
            _sent(curvature.triangle, device),
            hessian.diagonal().double(),
        )

    @property
    def importance(self) -> Any:
        """[K] float64: the diagonal, in the order of weights."""
        return self.diagonal[self.places]

    def no_errors(self, given: Any) -> Any:
        """Return [K4, rows] float32 zeros for weights [K, rows]."""
        return given.new_zeros(self.feedback.shape[1], given.shape[1])


@dataclass(frozen=True)
class _Scales:
    """Scales and offsets of some codes, float32: [groups, rows], or as those codes.

    Args:
        scale: the scales.
        offset: the offsets; None for zeros.
    """

    scale: Any
    offset: Any

    def __len__(self) -> int:
        return len(self.scale)

    def at(self, index: Any) -> _Scales:
        """Return those at an index."""
        return _Scales(self.scale[index], None if self.offset is None else self.offset[index])

    @property
    def turned(self) -> _Scales:
        """The same with rows first."""
        return _Scales(self.scale.T, None if self.offset is None else self.offset.T)


@dataclass(frozen=True)
class _Levels:
    """The levels of a grid.

    Args:
        values_of: [L] float32, rising.
        middles: [L - 1] float64, between them.
        first: the first of consecutive integers; None if they are not.
        step: the largest between two.
        least: float64: below all numbers.
    """

    values_of: Any
    middles: Any
    first: float | None
    step: float
    least: Any

    def values(self, index: Any, scales: _Scales) -> Any:
        """Return what codes stand for; rounded as decoders round."""
        scaled = self.values_of[index] * scales.scale
        return scaled if scales.offset is None else scaled + scales.offset

    def nearest(self, target: Any, scales: _Scales) -> Any:
        """Return the codes nearest to numbers, int64; any where a scale is zero."""
        wide = target.double()
        if scales.offset is not None:
            wide = wide - scales.offset
        wide = torch.fmax(wide / scales.scale, self.least)  # not NaN: the first level then
        if self.first is None:
            return torch.bucketize(wide.contiguous(), self.middles)
        return (wide - self.first).round_().clamp_(0, len(self.middles)).long()

    def bounds(self, weights: Any, scales: _Scales) -> tuple[Any, Any]:
        """Return how far codes may aim below and above weights."""
        reach = scales.scale.abs() * float(np.float32(REACH * self.step))
        return weights - reach, weights + reach


def _sent_grid(grid: CodeGrid, rows: slice, device: str) -> tuple[_Levels, _Scales]:
    middles, even, step = grid.spacing()
    scales, offsets, levels = grid.arguments()
    first = float(levels[0]) if even else None
    least = torch.tensor(-torch.inf, dtype=torch.float64, device=device)
    offset = None if grid.offsets is None else _sent(offsets[rows].T, device)
    return (
        _Levels(_sent(levels, device), _sent(middles, device), first, step, least),
        _Scales(_sent(scales[rows].T, device), offset),
    )


# --- sums in the order of the kernels: of every fourth column, then of these four


def _feed_back(given: Any, levels: _Levels, scales: _Scales, held: _Curvature, codes: Any) -> Any:
    """Choose codes column by column; later columns make up for the errors of earlier ones.

    given: [K, R] float32 -> codes: [K, R] uint8, whose values stay where a scale is zero; returns
    the errors [K4, R] float32.
    """
    size, count = given.shape
    errors, sums = held.no_errors(given), given.new_zeros(size, 4, count)
    products = torch.empty_like(sums)
    group = size // len(scales)
    low, high = levels.bounds(given, scales.at(held.order // group))
    fixed = scales.scale == 0
    keeps = bool(fixed.any())
    for first in range(0, size, 4):
        end = min(first + 4, size)
        four = errors[first : first + 4]
        for j in range(first, end):
            own, done, part = sums[j], j - first, held.columns[j] // group
            if done:
                own[:done] += four[:done] * held.feedback[j, first:j, None]
            pairs = own[0::2] + own[1::2]
            target = (given[j] + (pairs[0] + pairs[1])).clamp_(low[j], high[j])
            index = levels.nearest(target, scales.at(part))
            if keeps:
                index = torch.where(fixed[part], codes[j], index)
            codes[j] = index
            torch.sub(given[j], levels.values(index, scales.at(part)), out=errors[j])
        if end < size:
            row = held.feedback[end:, first:end, None]
            sums[end:] += torch.mul(four, row, out=products[end:])
    return errors


def _products(errors: Any, matrix: Any, *, triangular: bool = False) -> Any:
    """Return the product of a matrix [K, K4] and errors [K4, R]: [K, R] float32.

    A triangular one has zeros above its diagonal.
    """
    sums = errors.new_zeros(len(matrix), 4, errors.shape[1])
    products = torch.empty_like(sums)
    for first in range(0, len(errors), 4):
        begin = first if triangular else 0
        row = matrix[begin:, first : first + 4, None]
        sums[begin:] += torch.mul(errors[first : first + 4], row, out=products[begin:])
    return (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])


def _total(terms: Any) -> Any:
    """Return the sum over the first dimension, one after the other."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


# --- coordinate descent


class _Descent:
    """Rows whose single codes change as long as the loss falls.

    A block of columns is tried at once. In each row the first code to change is what one column
    after the other would find, since none before it changes the slopes; then the row is tried again
    behind it. So slopes are updated only where a code has changed, the device is asked for that as
    often as a row changes in a block, and not for every column.

    Args:
        given: [K, R] float32 weights.
        levels: of their codes.
        scales: [groups, R].
        held: the curvature.
        codes: [K, R] uint8.
        errors: [K4, R] float32.
    """

    def __init__(
        self,
        given: Any,
        levels: _Levels,
        scales: _Scales,
        held: _Curvature,
        codes: Any,
        errors: Any,
    ) -> None:
        self.codes = codes.T.contiguous()
        self._slopes = _products(errors, held.hessian).T.double().contiguous()
        self._errors = errors[: len(given)].T.contiguous()
        self._weights = given.T.contiguous()
        self._levels, self._scales, self._held = levels, scales.turned, held
        self._parts = held.order // (len(given) // len(scales))
        self._rows = torch.arange(given.shape[1], device=given.device)

    def sweep(self) -> bool:
        """Go through the columns once; return whether a code has changed.

        Rows that did not change in the last sweep would not in this one.
        """
        changed = torch.zeros(len(self.codes), dtype=torch.bool, device=self.codes.device)
        for first in range(0, self.codes.shape[1], _BLOCK):
            changed[self._block(slice(first, min(first + _BLOCK, self.codes.shape[1])))] = True
        self._rows = changed.nonzero()[:, 0]
        return len(self._rows) > 0

    def _block(self, columns: slice) -> Any:
        """Go through a block of columns; return the rows that have changed."""
        rows, diagonal = self._rows, self._held.diagonal[columns]
        weights, scales = self._weights[rows, columns], self._scales.at(rows)
        scales = scales.at((slice(None), self._parts[columns]))
        places = torch.arange(len(diagonal), device=rows.device)
        none = len(diagonal)
        free = (scales.scale != 0) & (diagonal > 0)
        changed = None
        while len(rows):
            slopes, errors = self._slopes[rows, columns], self._errors[rows, columns]
            index, new = self._tried(weights, scales, errors, slopes / diagonal)
            change = new.double() - errors
            gains = change * ((change * diagonal * (1 - LEAST_GAIN)).add_(slopes, alpha=2)) < 0
            gains &= free & (index != self.codes[rows, columns])
            place = torch.where(gains, places, none).amin(1)
            at = (place < none).nonzero()[:, 0]
            rows, place = rows[at], place[at]
            changed = rows if changed is None else changed
            column = columns.start + place
            self.codes[rows, column] = index[at, place].byte()
            self._errors[rows, column] = new[at, place]
            added = change[at, place, None] * self._held.hessian[column, : self.codes.shape[1]]
            self._slopes.index_add_(0, rows, added)
            weights, scales = weights[at], scales.at(at)
            free = free[at] & (places > place[:, None])
        return changed

    def _tried(self, weights: Any, scales: _Scales, errors: Any, steps: Any) -> tuple[Any, Any]:
        """Return the codes to which steps lead, and their errors."""
        target = (weights - errors + steps).float()
        target = target.clamp_(*self._levels.bounds(weights, scales))
        index = self._levels.nearest(target, scales)
        return index, weights - self._levels.values(index, scales)
