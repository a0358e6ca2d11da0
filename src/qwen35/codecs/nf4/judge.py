"""Compare NF4 codes and scales with those computed from the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from qwen35.array_types import F32, Array
from qwen35.codecs.codec import Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import f32_from
from qwen35.codecs.nf4.arrays import (
    SCALE_REACH,
    AbsmaxStatistics,
    QuantState,
    encode_blocks,
    error_sums,
    row_grid,
)
from qwen35.codecs.nf4.layout import BLOCK, NESTED_BLOCK
from qwen35.codecs.nf4.stored import read_absmax, read_state
from qwen35.codecs.nf4.tables import BOUNDS, LEVELS, dynamic_map
from qwen35.codecs.pieces import Readable
from qwen35.codecs.refined_bounds import RefinedErrors
from qwen35.tensors import TensorSpec, Weight

__all__ = ["TOLERANCE", "judge", "same_mean", "wrong_codes", "wrong_scales"]


ABSMAX_SLACK = 1e-6
"""Tolerance of a scale around the bounds between 8-bit codes: rounding of the division."""

CODE_SLACK = 1e-5
"""Tolerance of a quotient around the bounds between levels: rounding of the division."""

CONSTANT_SLACK = 1e-5
"""Tolerance of the float32 constants of scales: devices round sums and divisions differently."""

TOLERANCE = (
    f"errors below {CONSTANT_SLACK:g} (relative) in the float32 constants that scales are computed "
    "from, and below that share of the largest scale in their offset; `qwen35 reproduce` compares "
    "every byte"
)
"""The largest differences that `judge` misses."""


def wrong_codes(packed: Array, expected: Array, values: F32, absmax: F32) -> int:
    """Count codes whose level is not the nearest, allowing either one for quotients on a bound.

    A block of zeros may hold any code: its scale is zero, and bitsandbytes on CUDA writes code 0.
    """
    bad = np.flatnonzero(packed != expected)
    index = (2 * bad[:, None] + np.arange(2)).reshape(-1)
    pairs = packed[bad]
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1).astype(np.int64)
    scale = absmax[index // BLOCK]
    quotient = np.divide(
        values[index], scale, out=np.zeros(len(index), np.float32), where=scale > 0
    )
    lower = np.concatenate([[-np.inf], BOUNDS])[codes]
    upper = np.concatenate([BOUNDS, [np.inf]])[codes]
    near = (quotient >= lower - CODE_SLACK) & (quotient <= upper + CODE_SLACK)
    return int(np.count_nonzero(~near & (scale > 0)))


def wrong_scales(
    codes: Array, nested: F32, offset: float, true: F32, *, searched: bool = False
) -> int:
    """Count 8-bit codes that match neither bitsandbytes' CPU table nor the nearest value.

    bitsandbytes on CUDA takes the nearest value of the dynamic map; its CPU lookup table is
    occasionally off by one code. Scales that were searched may be some way off.
    """
    expected = AbsmaxStatistics.of(true, offset)
    # Other devices may round the last bits differently.
    if not np.allclose(nested, expected.nested, rtol=CONSTANT_SLACK, atol=0):
        return len(true)
    scale = np.repeat(expected.nested, NESTED_BLOCK)[: len(true)].astype(np.float64)
    values = (true - np.float32(offset)) / np.where(scale > 0, scale, 1)
    table = dynamic_map().astype(np.float64)
    bounds = (table[:-1] + table[1:]) / 2
    lowest = np.searchsorted(bounds, values - ABSMAX_SLACK)
    highest = np.searchsorted(bounds, values + ABSMAX_SLACK)
    near = (codes >= lowest) & (codes <= highest)
    if searched:
        own, found = expected.decoded, replace(expected, codes=codes).decoded
        near |= np.abs(found - own) <= SCALE_REACH * (1 + CONSTANT_SLACK) * np.abs(own)
    return int(np.count_nonzero(~near & (codes != expected.codes) & (scale > 0)))


def same_mean(offset: float, true: F32) -> bool:
    """Return whether an offset is the mean of the scales, up to rounding of the sum."""
    # bitsandbytes sums in float32; its result varies with the number of threads.
    mean = float(true.mean(dtype=np.float64))
    return abs(offset - mean) <= CONSTANT_SLACK * float(np.abs(true).max())


def judge(
    reader: Readable,
    weight: Weight,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
) -> None:
    """Compare packed codes and scales with those computed from the original.

    Arguments and errors are those of `qwen35.codecs.codec.Codec.judge`.
    """
    state = read_state(reader, weight, spec)
    absmax = read_absmax(reader, weight, state)
    _constants(reader, weight, result)
    true = np.empty_like(absmax)
    wrong, refined = 0, RefinedErrors(outputs=result.outputs)
    for piece in original:
        values = piece.values.reshape(-1)
        done = piece.first * piece.values.shape[1]
        packed = np.empty(values.size // 2, np.uint8)
        reader.read_into(weight.main, done // 2, packed.data)
        blocks = slice(done // BLOCK, (done + values.size) // BLOCK)
        expected = np.empty_like(packed)
        encode_blocks(values, piece.dtype, true[blocks], expected)
        if result.refined:
            floats = f32_from(piece.values, piece.dtype)
            refined.add(floats, row_grid(packed, absmax[blocks], piece.values.shape))
        elif not np.array_equal(packed, expected):  # the exact comparison is cheaper
            floats = f32_from(values, piece.dtype)
            wrong += wrong_codes(packed, expected, floats, true[blocks])
        squared, norm = error_sums(values, piece.dtype, packed, absmax[blocks])
        result.squared += squared
        result.norm += norm
    if wrong:
        result.found("codes", f"{wrong} of {spec.numel} codes are not the nearest level")
    refined.report(result)
    _scales(reader, weight, state, true, result)


def _scales(
    reader: Readable, weight: Weight, state: QuantState, true: F32, result: WeightComparison
) -> None:
    """Compare the stored scales with the largest magnitudes of the original's blocks."""
    absmax = _bytes(reader, weight, ".absmax")
    if not state.nested:
        off = int(np.count_nonzero(absmax.view(np.float32) != true))
    elif not same_mean(state.offset, true):
        off = len(true)
    else:
        nested = _bytes(reader, weight, ".nested_absmax").view(np.float32)
        off = wrong_scales(absmax, nested, state.offset, true, searched=result.searched)
    if off:
        result.found("absmax", f"{off} of {len(true)} scales are not those of the source")


def _bytes(reader: Readable, weight: Weight, suffix: str) -> Array:
    return np.frombuffer(reader.read(weight.need(suffix)), np.uint8)


def _constants(reader: Readable, weight: Weight, result: WeightComparison) -> None:
    for suffix, expected in ((".quant_map", LEVELS), (".nested_quant_map", dynamic_map())):
        part = weight.part(suffix)
        if part is not None and bytes(reader.read(part)) != expected.tobytes():
            result.found("constants", f"{part.spec.name} is not bitsandbytes' table")
