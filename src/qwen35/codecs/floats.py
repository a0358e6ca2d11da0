"""Conversions between the float formats of checkpoints, on flat arrays.

NumPy has no bfloat16; it is represented by uint16 arrays of its bits.
"""

from __future__ import annotations

import numpy as np

from qwen35.array_types import F32, U16, Array

__all__ = [
    "CARRIED",
    "all_finite",
    "bf16_from_f32",
    "empty",
    "f32_from",
    "from_f32",
    "largest",
    "rounded_scales",
]


_CARRIER: dict[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
}
CARRIED = tuple(_CARRIER)
"""The dtypes supported by `empty`."""

_INFINITY = {
    "BF16": (np.int16, 0x7F80),
    "F16": (np.int16, 0x7C00),
    "F32": (np.int32, 0x7F800000),
    "F8_E4M3": (np.int8, 0x7F),
}
"""Bits of infinity, below those of NaN; F8_E4M3 has no infinity, only one NaN of each sign."""


def empty(dtype: str, size: int) -> Array:
    """Return an uninitialized flat array for `size` elements of `dtype`."""
    return np.empty(size, _CARRIER[dtype])


def f32_from(values: Array, dtype: str) -> F32:
    """Convert `values` of `dtype` to float32; exact for BF16, F16 and F32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def bf16_from_f32(values: F32) -> U16:
    """Round finite float32 values to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    # Adding 0x7FFF rounds up everything above a tie; the last kept bit rounds ties to even.
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def from_f32(values: F32, dtype: str) -> Array:
    """Round finite float32 values to `dtype`."""
    return bf16_from_f32(values) if dtype == "BF16" else values.astype(_CARRIER[dtype])


def rounded_scales(scales: F32, dtype: str) -> F32:
    """Round scales to the dtype they are stored in; those of subnormal size count as zeros.

    Raises:
        ValueError: the dtype cannot hold one: it is too large, or moves by more than a sixteenth.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = f32_from(from_f32(scales, dtype), dtype)
        close = np.abs(rounded - scales) <= scales / np.float32(16)  # false where both are infinite
    lost = ~close & (scales >= np.finfo(np.float32).tiny)
    if lost.any():
        raise ValueError(f"a scale of {scales[lost][0]:.3g}, which {dtype} cannot hold")
    return rounded


def largest(values: Array, dtype: str) -> float:
    """Return the largest magnitude of finite values; zero if there are none."""
    if not values.size:
        return 0.0
    if dtype == "BF16":  # bits of magnitudes are ordered as they are
        most = (values.reshape(-1) & np.uint16(0x7FFF)).max(keepdims=True)
        return float(f32_from(most, dtype)[0])
    return float(np.abs(values).max())


def all_finite(values: Array, dtype: str) -> bool:
    """Return whether `values` of `dtype` contain no NaN and no infinity."""
    signed, infinity = _INFINITY[dtype]
    if not values.size:
        return True
    # Without a copy: the largest signed integer is positive, the largest unsigned one negative.
    bits = values.view(signed)
    sign = 1 << 8 * bits.itemsize - 1
    unsigned = bits.view(f"u{bits.itemsize}")
    return bool(bits.max() < infinity and unsigned.max() < sign + infinity)
