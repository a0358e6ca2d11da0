"""Compare MLX's codes and scales with those that the source gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qwen35.array_types import F32
from qwen35.codecs.codec import Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import f32_from
from qwen35.codecs.mlx.arrays import MlxRows, quantize_rows, requantized, rounded
from qwen35.codecs.mlx.stored import StoredMlx
from qwen35.tensors import TensorSpec

__all__ = ["TOLERANCE", "judge"]

Bools = npt.NDArray[np.bool_]

_SLACK = 0.02
"""Tolerance around the bounds between codes, in steps: other backends of MLX round otherwise."""

_NARROW, _WIDE = 0.5, 2.0
"""A scale may be this many times that of ``mx.quantize``: tools that train scales move it."""

_NOTHING = np.float32(1e-7)
"""The scale of groups of one value."""

TOLERANCE = (
    f"scales from {_NARROW} to {_WIDE} times those of mx.quantize, where every code is the nearest "
    f"with its scale, to {_SLACK} steps; `qwen35 reproduce` compares every byte"
)
"""The largest differences that `judge` misses."""


def judge(
    values: StoredMlx, spec: TensorSpec, original: Iterator[Piece], result: WeightComparison
) -> None:
    """Compare every code with the nearest, and scales with those of ``mx.quantize``.

    Args:
        values: the stored weight.
        spec: the decoded weight.
        original: as `qwen35.codecs.codec.Codec.judge` takes it.
        result: likewise.
    """
    wrong_codes = wrong_scales = groups = 0
    for piece in original:
        rows = values.rows(piece.first, len(piece.values))
        exact = f32_from(piece.values.reshape(-1), piece.dtype).reshape(rows.codes.shape)
        ours = quantize_rows(piece.values, piece.dtype, rows.kind)
        own = _as_ours(rows, ours, spec.dtype)
        # codes are made with scales that are not rounded yet
        scales, biases = (
            np.where(own, a, b) for a, b in ((ours.scales, rows.scales), (ours.biases, rows.biases))
        )
        used = MlxRows(rows.kind, rows.codes, scales, biases)
        nearest = requantized(piece.values, piece.dtype, used)
        wrong_codes += _further(used, nearest, exact)
        wrong_scales += int(np.count_nonzero(~own & _unlike(rows.scales, ours.scales)))
        groups += rows.scales.size
        result.add(rows.values.reshape(-1), exact.reshape(-1))
    if wrong_codes:
        result.found("codes", f"{wrong_codes} of {spec.numel} codes are not the nearest")
    if wrong_scales:
        result.found("scales", f"{wrong_scales} of {groups} scales do not fit their groups")


def _as_ours(rows: MlxRows, ours: MlxRows, dtype: str) -> Bools:
    """Return [rows, groups] whether a group has the scale and bias of ``mx.quantize``."""
    scales, biases = ours.scales, ours.biases
    if rows.kind.affine:
        scales, biases = (f32_from(rounded(v, dtype), dtype) for v in (scales, biases))
    same: Bools = (rows.scales == scales) & (rows.biases == biases)
    return same


def _further(rows: MlxRows, nearest: MlxRows, exact: F32) -> int:
    """Count codes that are further from their values than the nearest."""
    step = np.abs(rows.per_column(rows.scales)).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        found, best = (np.abs(one.values.astype(np.float64) - exact) for one in (rows, nearest))
    return int(np.count_nonzero(~(found <= best + _SLACK * step)))


def _unlike(found: F32, expected: F32) -> Bools:
    size, wanted = np.abs(found), np.abs(expected)
    near = (size >= _NARROW * wanted) & (size <= _WIDE * wanted)
    unlike: Bools = (wanted > _NOTHING) & ~near
    return unlike
