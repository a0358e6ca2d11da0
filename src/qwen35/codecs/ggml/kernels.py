"""Our compiled quantizers by ggml type; they give ggml's bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen35.array_types import F32, U8
from qwen35.codecs.ggml import small_blocks, superblocks
from qwen35.codecs.ggml.types import GGML_TYPES

__all__ = ["QUANTIZERS", "quantize"]

Encode = Callable[[F32, F32, U8], Any]
"""Encodes flat weights, weighted by the importance of a row's columns (may be empty)."""


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of one type.

    Args:
        encode: the kernel.
        halves: byte offsets of the float16 numbers in a block.
    """

    encode: Encode
    halves: tuple[int, ...] = (0,)


QUANTIZERS: Mapping[str, Quantizer] = {
    "q4_0": Quantizer(
        lambda flat, weights, out: small_blocks.encode_symmetric(flat, weights, 8, out)
    ),
    "q4_1": Quantizer(
        lambda flat, weights, out: small_blocks.encode_minimum(flat, weights, 15, out), (0, 2)
    ),
    "q5_0": Quantizer(
        lambda flat, weights, out: small_blocks.encode_symmetric(flat, weights, 16, out)
    ),
    "q5_1": Quantizer(
        lambda flat, weights, out: small_blocks.encode_minimum(flat, weights, 31, out), (0, 2)
    ),
    "q8_0": Quantizer(lambda flat, _, out: small_blocks.encode_q8_0(flat, out)),
    "q2_K": Quantizer(superblocks.encode_q2_k, (80, 82)),
    "q3_K": Quantizer(superblocks.encode_q3_k, (108,)),
    "q4_K": Quantizer(
        lambda flat, weights, out: superblocks.encode_q45_k(flat, weights, 15, out), (0, 2)
    ),
    "q5_K": Quantizer(
        lambda flat, weights, out: superblocks.encode_q45_k(flat, weights, 31, out), (0, 2)
    ),
    "q6_K": Quantizer(superblocks.encode_q6_k, (208,)),
    "iq4_nl": Quantizer(small_blocks.encode_iq4_nl),
    "iq4_xs": Quantizer(superblocks.encode_iq4_xs),
}
"""Type to quantizer; `qwen35.codecs.ggml.types.COMPILED` lists the names."""

_NOTHING = np.empty(0, np.float32)


def quantize(rows: F32, kind: str, importance: F32 | None) -> U8:
    """Quantize `rows` [count, row] to `kind`, weighted by `importance` [row]; return bytes.

    Raises:
        ValueError: a scale is not finite.
    """
    assert rows.flags.c_contiguous
    own, nbytes = QUANTIZERS[kind], GGML_TYPES[kind].nbytes
    out = np.empty(GGML_TYPES[kind].size(rows.shape), np.uint8)
    weights = _NOTHING if importance is None else np.ascontiguousarray(importance, np.float32)
    own.encode(rows.reshape(-1), weights, out)
    blocks_of_bytes = out.reshape(-1, nbytes)
    for at in own.halves:
        if (blocks_of_bytes[:, at + 1] & 0x7C == 0x7C).any():  # infinity or NaN
            raise ValueError(kind)
    return out
