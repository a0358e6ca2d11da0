"""Error bounds of the ggml types, and the tensors and blocks that exceed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.codecs.codec import Piece, StoredValues
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import bf16_from_f32, f32_from
from qwen35.codecs.ggml.types import FLOATS, GgmlType
from qwen35.codecs.refining import CodeGrid

__all__ = ["BOUNDS", "judge", "tolerance"]


_BLOCK = 256

BOUNDS: dict[str, tuple[float, float]] = {
    "q8_0": (0.017, 0.004),
    "q6_K": (0.055, 0.04),
    "q5_K": (0.085, 0.03),
    "q5_1": (0.085, 0.03),
    "q5_0": (0.12, 0.05),
    "q4_K": (0.17, 0.065),
    "q4_1": (0.18, 0.06),
    "q4_0": (0.21, 0.08),
    "iq4_xs": (0.18, 0.065),
    "iq4_nl": (0.18, 0.065),
    "nvfp4": (0.24, 0.12),
    "mxfp4": (0.24, 0.12),
    "q3_K": (0.31, 0.12),
    "q2_K": (0.57, 0.23),
}
"""Type to the largest plausible error of a tensor and of a block of 256 weights.

The first is relative (root of summed squares), the second the root mean square over the block's
largest weight. Each is 1.5 times the worst that ggml's quantizers produce on normal,
heavy-tailed, sparse and shifted weights, with and without importance matrices.
"""

_REFINED = 2
"""How much greater errors of refined codes may be: they err less in outputs, more in weights."""

LOOSE = (1.1, 0.65)
"""For types of three bits and fewer, where a bound can only tell a weight from noise."""


def judge(
    values: StoredValues,
    kind: GgmlType,
    original: Iterator[Piece],
    result: WeightComparison,
    grid: Callable[[int, tuple[int, int]], CodeGrid] | None = None,
) -> None:
    """Compare a decoded tensor with its original.

    Args:
        values: the decoded tensor.
        kind: its type.
        original: the original, in pieces.
        result: receives sums and findings.
        grid: returns what codes stand for (`qwen35.codecs.ggml.stored.StoredGgml.grid`).

    Raises:
        TensorError: a value or a scale is not finite.
    """
    exact, slack = kind.name in FLOATS, np.float32(_REFINED if result.refined else 1)
    wrong = blocks = 0
    for piece in original:
        expected = f32_from(piece.values, piece.dtype)
        found = np.empty(expected.shape, np.float32)
        values.read_into(piece.first * expected.shape[1], found.reshape(-1))
        result.norm += float(np.square(expected, dtype=np.float64).sum())
        if exact:
            expected = round_as(expected, kind.name)
            wrong += int(np.count_nonzero(expected != found))
        difference = found - expected
        result.squared += float(np.square(difference, dtype=np.float64).sum())
        if result.outputs is not None and grid is not None:
            rows, columns = expected.shape
            result.outputs.add(expected, grid(piece.first, (rows, columns)))
        if not exact:
            blocks += bad_blocks(expected, difference / slack, kind.name)
    if wrong:
        result.found("values", f"{wrong} values differ from the source's")
    elif not exact:
        check_bound(result, kind.name, blocks)
    if result.outputs is not None:
        result.outputs.report(result)


def tolerance(kind: GgmlType) -> str:
    """Return the largest differences that `judge` misses; empty for a type that holds floats."""
    if kind.name in FLOATS:
        return ""
    tensor, block = BOUNDS.get(kind.name, LOOSE)
    # An error in one weight raises the block's root mean square by a sixteenth of that error.
    return (
        f"errors below {tensor:.1%} of a tensor, and below {block:.1%} of the largest weight in a "
        f"block of {_BLOCK} (root mean square), or {_BLOCK**0.5 * block:.1f} times that weight for "
        "a single one; twice that where codes are refined; `qwen35 reproduce` compares every byte"
    )


def round_as(values: F32, kind: str) -> F32:
    """Round values to a float type, as float32."""
    if kind == "f16":
        return values.astype(np.float16).astype(np.float32)
    if kind == "bf16":
        return f32_from(bf16_from_f32(values.reshape(-1)), "BF16").reshape(values.shape)
    return values


def bad_blocks(expected: F32, difference: F32, kind: str) -> int:
    """Count the blocks whose error exceeds the bound of their type."""
    width = _BLOCK if expected.shape[-1] % _BLOCK == 0 else expected.shape[-1]
    _, bound = BOUNDS.get(kind, LOOSE)
    largest = np.abs(expected.reshape(-1, width)).max(axis=1)
    error = np.sqrt(np.square(difference.reshape(-1, width)).mean(axis=1))
    return int(np.count_nonzero(error > bound * largest))


def check_bound(seen: WeightComparison, kind: str, blocks: int) -> None:
    """Report a tensor, or blocks, beyond the bound of the type; of refined codes, twice that."""
    relative: Any = np.sqrt(seen.squared / seen.norm) if seen.norm else np.sqrt(seen.squared)
    bound, _ = BOUNDS.get(kind, LOOSE)
    bound *= _REFINED if seen.refined else 1
    if relative > bound:
        seen.found("bound", f"relative error {relative:.3f}, at most {bound} in {kind}")
    elif blocks:
        seen.found("bound", f"{blocks} blocks are farther from the source than {kind} can be")
