"""Compare INT4 codes and scales with those that the source allows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qwen35.array_types import F32
from qwen35.codecs.codec import Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import f32_from
from qwen35.codecs.int4.arrays import QuantizedRows
from qwen35.codecs.int4.stored import StoredInt4
from qwen35.codecs.refined_bounds import RefinedErrors
from qwen35.tensors import TensorSpec

__all__ = ["TOLERANCE", "judge"]

_SLACK = 0.02
"""Tolerance around the bounds between codes, in steps: compressed-tensors divides in bfloat16."""

_NARROW, _WIDE = 0.5, 1.5
"""A scale may be this many times that of the extremes of its group: searches move it."""

TOLERANCE = (
    f"scales from {_NARROW} to {_WIDE} times those of a group's extremes, where every code is the "
    f"nearest with its scale, to {_SLACK} steps; `qwen35 reproduce` compares every byte"
)
"""The largest differences that `judge` misses."""


def judge(
    values: StoredInt4, spec: TensorSpec, original: Iterator[Piece], result: WeightComparison
) -> None:
    """Compare every code with the nearest, and scales with the extremes of their groups.

    Args:
        values: the stored weight.
        spec: the decoded weight.
        original: as `qwen35.codecs.codec.Codec.judge` takes it.
        result: likewise.
    """
    wrong_codes = wrong_scales = groups = 0
    refined = RefinedErrors(outputs=result.outputs)
    for piece in original:
        rows = values.rows(piece.first, len(piece.values))
        exact = f32_from(piece.values.reshape(-1), piece.dtype).reshape(rows.codes.shape)
        if result.refined:
            refined.add(exact, rows.grid)
        else:
            wrong_codes += _wrong_codes(rows, exact)
        wrong_scales += _wrong_scales(rows, exact)
        groups += rows.scales.size
        result.add(rows.values.reshape(-1), exact.reshape(-1))
    if wrong_codes:
        result.found("codes", f"{wrong_codes} of {spec.numel} codes are not the nearest")
    refined.report(result)
    if wrong_scales:
        result.found("scales", f"{wrong_scales} of {groups} scales do not fit their groups")


def _wrong_codes(rows: QuantizedRows, exact: F32) -> int:
    group = exact.shape[1] // rows.scales.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = exact.astype(np.float64) / np.repeat(rows.scales, group, axis=1)
    steps += np.repeat(rows.zeros, group, axis=1)
    distance = rows.codes.astype(np.float64) - np.clip(steps, 0, 15)
    return int(np.count_nonzero(~(np.abs(distance) <= 0.5 + _SLACK)))


def _wrong_scales(rows: QuantizedRows, exact: F32) -> int:
    grouped = exact.reshape(len(exact), rows.scales.shape[1], -1).astype(np.float64)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    symmetric = (rows.zeros == 8).all()
    expected = np.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    near = (rows.scales >= _NARROW * expected) & (rows.scales <= _WIDE * expected)
    return int(np.count_nonzero(~near & (expected > np.finfo(np.float32).tiny)))
