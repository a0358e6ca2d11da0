"""Constants of NF4: 16 levels, the 15 bounds between them and the dynamic 8-bit map."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qwen35.array_types import F32, U8

__all__ = ["BOUNDS", "LEVELS", "TINY", "dynamic_lookup", "dynamic_map"]


LEVELS: F32 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
"""Quantiles of a normal distribution (QLoRA, appendix E; bitsandbytes ``get_4bit_type('nf4')``)."""

BOUNDS: F32 = ((LEVELS[:-1].astype(np.float64) + LEVELS[1:]) / 2).astype(np.float32)
"""Values above ``BOUNDS[k]`` have an index above k; a value on a bound gets the lower index."""

TINY = np.float32(1e-38)
"""Smallest divisor of a block, as bitsandbytes on a CPU: a block of zeros gets the level 0."""

_LOOKUP_SIZE = 65536


@lru_cache(maxsize=1)
def dynamic_map() -> F32:
    """Return the 256 sorted values of bitsandbytes' signed dynamic map.

    For each of seven decades 10**-6 ... 1, the interval [0.1, 1] is divided into 1, 2, 4 ... 64
    equal pieces; the values are the midpoints with both signs, plus 0 and 1.
    Source: bitsandbytes 0.50 ``create_dynamic_map()``. The cuts replicate ``torch.linspace`` in
    float32, which steps from the nearer end and rounds once.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        pieces = 2**exponent
        first, last = np.float32(0.1), np.float32(1)
        step = np.float64(np.float32((last - first) / np.float32(pieces)))
        ahead = np.arange(pieces + 1)
        cuts = np.where(
            ahead < (pieces + 1) // 2, first + step * ahead, last - step * (pieces - ahead)
        ).astype(np.float32)
        middles = (cuts[:-1] + cuts[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.array(sorted(values), dtype=np.float32)


@lru_cache(maxsize=1)
def dynamic_lookup() -> U8:
    """Return the index into `dynamic_map` for each of 65,536 equal steps over [-1, 1].

    On a CPU, bitsandbytes 0.50 quantizes through such a table: it takes the value nearest to the
    step's centre instead of to the number itself, so about one code in 500 is off by one. Writing
    the same bytes takes the same table.
    """
    codes = dynamic_map()
    bounds = np.float32(0.5) * (codes[:-1] + codes[1:])
    steps = np.arange(_LOOKUP_SIZE, dtype=np.float32)
    centres = np.float32(-1) + (np.float32(2) * steps) / np.float32(_LOOKUP_SIZE - 1)
    return np.searchsorted(bounds, centres, side="left").astype(np.uint8)
