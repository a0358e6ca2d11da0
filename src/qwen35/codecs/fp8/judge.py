"""Find FP8 codes that are further from the source than rounding explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from qwen35.codecs.codec import Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import all_finite, f32_from
from qwen35.codecs.fp8.arrays import row_grid
from qwen35.codecs.fp8.error_sums import RELATIVE, WORST_ERROR, ErrorSums
from qwen35.codecs.fp8.layout import BLOCK, fits
from qwen35.codecs.fp8.stored import StoredFp8, read_scales
from qwen35.codecs.pieces import Readable, not_finite
from qwen35.codecs.plain.codec import judge_values
from qwen35.codecs.refined_bounds import RefinedErrors
from qwen35.tensors import TensorSpec, Weight

__all__ = ["TOLERANCE", "judge", "too_far"]

TOLERANCE = (
    f"errors below {RELATIVE:.1%} of a weight (more if it saturates or is almost zero), and below "
    "1% of a tile's scale; `qwen35 reproduce` compares every byte"
)
"""The largest differences that `judge` misses: a scale that is off moves some weight too far."""


def judge(
    reader: Readable,
    weight: Weight,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
) -> None:
    """Compare every code with the best one its scale allows.

    Weights with partial tiles, which other tools write, are compared by value. Arguments and errors
    are those of `qwen35.codecs.codec.Codec.judge`.
    """
    if not fits(spec.shape):
        judge_values(StoredFp8(reader, weight, spec), spec, original, result)
        return
    scales = read_scales(reader, weight)
    errors, refined = ErrorSums(refined=int(result.refined)), RefinedErrors(outputs=result.outputs)
    result.errors = asdict(errors)  # updated per piece: a read error keeps the partial sums
    for piece in original:
        codes = np.empty(piece.values.shape, np.uint8)
        reader.read_into(weight.main, piece.first * spec.shape[1], codes.data.cast("B"))
        if not all_finite(codes, "F8_E4M3"):
            raise not_finite(weight.name)
        tile = piece.first // BLOCK
        rows = scales[tile : tile + len(codes) // BLOCK]
        errors.add(piece.values, piece.dtype, codes, rows)
        if result.refined:
            exact = f32_from(piece.values, piece.dtype)
            refined.add(exact, row_grid(codes, np.repeat(rows, BLOCK, axis=0)))
            errors.misplaced = refined.far
        result.errors = asdict(errors)
    result.squared, result.norm = errors.squared, errors.norm
    if result.refined:
        refined.report(result)
    elif errors.misplaced:
        message = (
            f"{errors.misplaced} of {spec.numel} values are further from the source than "
            "rounding to E4M3 with these scales explains"
        )
        result.found("codes", message)


def too_far(sums: Mapping[str, Any]) -> str:
    """Return why a weight without misplaced codes has too large an error: saturation.

    Args:
        sums: its `ErrorSums`, as plain values.
    """
    errors = ErrorSums(**sums)
    most = WORST_ERROR * errors.allowed
    if errors.misplaced or errors.relative_rmse <= most:
        return ""
    return (
        f"relative error {errors.relative_rmse:.4f}, expected at most {most} "
        f"({errors.clipped} weights saturate)"
    )
