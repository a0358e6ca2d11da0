"""The inner loop of FP8 per channel, compiled by Numba: 16 columns side by side, a lane each."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined  # first: it imports Numba in its own way
from qwen35.codecs.fp8.histogram import EXPONENT, LARGEST, LEAST_EXPONENT, TO_MAGIC
from qwen35.codecs.lanes import LANES, bits, from_bits, load, magnitude, select, store_bytes

__all__ = ["e4m3_codes", "encode"]


@inlined
def e4m3_codes(sizes: Any) -> Any:
    """Return the codes nearest to magnitudes, ties to even; those beyond 448 saturate."""
    size = select(sizes > LARGEST, LARGEST, sizes)
    exponent = bits(size) & EXPONENT
    exponent = select(exponent < LEAST_EXPONENT, LEAST_EXPONENT, exponent)
    magic = exponent + TO_MAGIC
    steps = bits(size + from_bits(magic)) - magic
    return (exponent >> np.int32(20)) - np.int32(121 << 3) + steps


@compiled
def encode(values: Any, scales: Any, codes: Any) -> None:
    """Encode with given scales: the nearest codes, ties to even; values beyond 448 saturate.

    values: [rows * columns] float32 or bits of bfloat16 (uint16), columns a multiple of 16; scales:
    [rows] float32, positive -> codes: [rows * columns] uint8.
    """
    columns = values.shape[0] // scales.shape[0]
    for row in range(scales.shape[0]):
        for at in range(row * columns, (row + 1) * columns, LANES):
            value = load(values, at) / scales[row]
            code = e4m3_codes(magnitude(value))
            store_bytes(codes, at, code | ((bits(value) >> np.int32(24)) & np.int32(128)))
