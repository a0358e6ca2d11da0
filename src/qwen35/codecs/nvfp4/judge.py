"""Compare NVFP4 codes and scales with those that the source allows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qwen35.array_types import F32, U8
from qwen35.codecs.codec import Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import f32_from, largest
from qwen35.codecs.fp8.arrays import e4m3_values
from qwen35.codecs.nvfp4.arrays import decode_rows, e2m1_values, row_grid, whole_scale
from qwen35.codecs.nvfp4.layout import BLOCK
from qwen35.codecs.nvfp4.stored import StoredNvfp4
from qwen35.codecs.refined_bounds import RefinedErrors
from qwen35.tensors import TensorSpec

__all__ = ["TOLERANCE", "judge"]

_SLACK = 1e-5
"""Tolerance around the bounds between codes, and of the scale of a whole: float32 rounding."""

_OCTAVE = 8
"""E4M3 numbers between a number and twice that number: as far a searched scale may go."""

TOLERANCE = (
    "scales of blocks from half to twice those of the largest magnitudes, where every code is the "
    "nearest with its scale; `qwen35 reproduce` compares every byte"
)
"""The largest differences that `judge` misses."""

_MAGNITUDES = e2m1_values()[:8].astype(np.float64)
_MIDDLES = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / 2


def judge(
    values: StoredNvfp4,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
    *,
    alone: bool,
) -> None:
    """Compare every code with the nearest, and scales with the largest magnitudes.

    Args:
        values: the stored weight.
        spec: the decoded weight.
        original: as `qwen35.codecs.codec.Codec.judge` takes it.
        result: likewise.
        alone: whether no other weight shares the scale of the whole.
    """
    wrong_codes = wrong_scales = 0
    peak, refined = 0.0, RefinedErrors(outputs=result.outputs)
    for piece in original:
        codes, scales = values.read_rows(piece.first, len(piece.values))
        units = values.units(scales)
        exact = f32_from(piece.values.reshape(-1), piece.dtype).reshape(len(codes), -1)
        peak = max(peak, largest(piece.values, piece.dtype))
        if result.refined:
            refined.add(exact, row_grid(codes, units))
        else:
            wrong_codes += _wrong_codes(codes, exact, units)
        wrong_scales += _wrong_scales(scales, exact, values)
        result.add(decode_rows(codes, units).reshape(-1), exact.reshape(-1))
    if wrong_codes:
        result.found("codes", f"{wrong_codes} of {spec.numel} codes are not the nearest")
    refined.report(result)
    if wrong_scales:
        message = f"{wrong_scales} of {spec.numel // BLOCK} scales do not fit their blocks"
        result.found("scales", message)
    made_for = values.largest
    if values.whole == 1 and whole_scale(peak) == 1:  # too small for its inverse
        return
    if peak and (made_for < peak * (1 - _SLACK) or (alone and made_for > peak * (1 + _SLACK))):
        message = f"the scale of the whole is for weights up to {made_for:g}, found {peak:g}"
        result.found("scales", message)


def _wrong_codes(codes: U8, exact: F32, units: F32) -> int:
    """Count codes that are not the nearest; on a bound between two, either may be right."""
    stored = np.stack([codes & 15, codes >> 4], axis=-1).reshape(exact.shape).astype(np.int64)
    quotient = exact.astype(np.float64) / np.repeat(units, BLOCK, axis=1)
    magnitude = stored & 7
    lower = np.concatenate([[-np.inf], _MIDDLES])[magnitude] - _SLACK * 6
    upper = np.concatenate([_MIDDLES, [np.inf]])[magnitude] + _SLACK * 6
    size = np.where(stored & 8, -quotient, quotient)
    near = (size >= lower) & (size <= upper)
    return int(np.count_nonzero(~(near | (magnitude == 0) & (np.abs(quotient) <= upper))))


def _wrong_scales(scales: U8, exact: F32, values: StoredNvfp4) -> int:
    """Count scales that are far from those of their blocks' largest magnitudes."""
    peaks = np.abs(exact).reshape(len(exact), -1, BLOCK).max(axis=-1).astype(np.float64)
    wanted = peaks / 6 * 2688 / values.largest
    codes = np.searchsorted(e4m3_values()[:127], wanted)
    far = np.abs(scales.astype(np.int64) - codes) > _OCTAVE
    return int(np.count_nonzero(far & (peaks > 0)))
