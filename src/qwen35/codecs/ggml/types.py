"""The table of ggml types, and the fallbacks for rows that a type does not fit.

Source: llama.cpp 0c1e5709, ``ggml/include/ggml.h`` and ``src/llama-quant.cpp``
(`tensor_type_fallback`, `tensor_requires_imatrix`), the version in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qwen35.errors import unknown_name

__all__ = [
    "COMPILED",
    "ENCODABLE",
    "FLOATS",
    "GGML_TYPES",
    "NEEDS_IMATRIX",
    "REFINED",
    "GgmlType",
    "fallback",
    "ggml_type",
]


@dataclass(frozen=True)
class GgmlType:
    """One way to store rows of numbers.

    Args:
        name: in ggml's spelling (``q4_K``).
        code: type id in a GGUF file.
        block: elements that share a scale; a row must hold whole blocks.
        nbytes: bytes of a block.
    """

    name: str
    code: int
    block: int
    nbytes: int

    def size(self, shape: Sequence[int]) -> int:
        """Return the size in bytes of a tensor whose rows are whole blocks."""
        return prod(shape) // self.block * self.nbytes


GGML_TYPES: dict[str, GgmlType] = {
    row.name: row
    for row in (
        GgmlType("f32", 0, 1, 4),
        GgmlType("f16", 1, 1, 2),
        GgmlType("q4_0", 2, 32, 18),
        GgmlType("q4_1", 3, 32, 20),
        GgmlType("q5_0", 6, 32, 22),
        GgmlType("q5_1", 7, 32, 24),
        GgmlType("q8_0", 8, 32, 34),
        GgmlType("q8_1", 9, 32, 40),
        GgmlType("q2_K", 10, 256, 84),
        GgmlType("q3_K", 11, 256, 110),
        GgmlType("q4_K", 12, 256, 144),
        GgmlType("q5_K", 13, 256, 176),
        GgmlType("q6_K", 14, 256, 210),
        GgmlType("q8_K", 15, 256, 292),
        GgmlType("iq2_xxs", 16, 256, 66),
        GgmlType("iq2_xs", 17, 256, 74),
        GgmlType("iq3_xxs", 18, 256, 98),
        GgmlType("iq1_s", 19, 256, 50),
        GgmlType("iq4_nl", 20, 32, 18),
        GgmlType("iq3_s", 21, 256, 110),
        GgmlType("iq2_s", 22, 256, 82),
        GgmlType("iq4_xs", 23, 256, 136),
        GgmlType("i8", 24, 1, 1),
        GgmlType("i16", 25, 1, 2),
        GgmlType("i32", 26, 1, 4),
        GgmlType("i64", 27, 1, 8),
        GgmlType("f64", 28, 1, 8),
        GgmlType("iq1_m", 29, 256, 56),
        GgmlType("bf16", 30, 1, 2),
        GgmlType("tq1_0", 34, 256, 54),
        GgmlType("tq2_0", 35, 256, 66),
        GgmlType("mxfp4", 39, 32, 17),
        GgmlType("nvfp4", 40, 64, 36),
        GgmlType("q1_0", 41, 128, 18),
        GgmlType("q2_0", 42, 64, 18),
    )
}
"""Name to type (``ggml.h`` `ggml_type`, ``ggml-common.h``; `gguf` 0.19 ``GGML_QUANT_SIZES``).

`gguf` 0.19 does not know q2_0.
"""

FLOATS = ("f32", "f16", "bf16")
"""Types that are not quantized."""

ENCODABLE: tuple[str, ...] = (
    *FLOATS,
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_K", "q3_K", "q4_K", "q5_K", "q6_K"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"),
    *("q1_0", "q2_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4"),
)
"""Types that ``ggml_quantize_chunk`` writes, and that recipes may assign."""

COMPILED: tuple[str, ...] = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs"),
)
"""Types that our own kernels encode, without ggml (`qwen35.codecs.ggml.kernels`)."""

REFINED: tuple[str, ...] = (*COMPILED, "nvfp4")
"""Types whose codes can be refined (`qwen35.codecs.ggml.grids`)."""

NEEDS_IMATRIX = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s")
"""Types that are useless without an importance matrix; ggml aborts, so we refuse them."""

_SMALLER = {
    **dict.fromkeys(NEEDS_IMATRIX, "iq4_nl"),
    **dict.fromkeys(("iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_K", "q3_K", "tq1_0", "tq2_0"), "q4_0"),
    "q4_K": "q5_0",
    "q5_K": "q5_1",
    "q6_K": "q8_0",
}
"""Type with blocks of 64 or 256 to the one with blocks of 32 for rows that it does not fit."""


def ggml_type(name: str, subject: str) -> GgmlType:
    """Return the encodable type called `name`, ignoring case.

    Raises:
        UsageError: there is none; `subject` begins the message.
    """
    found = next((kind for kind in ENCODABLE if kind.lower() == name.lower()), None)
    if found is None:
        raise unknown_name(subject, name, ENCODABLE, f"type {name!r} is unknown")
    return GGML_TYPES[found]


def fallback(kind: GgmlType, row: int) -> GgmlType:
    """Return `kind`, or its fallback if rows of `row` elements are not whole blocks of it."""
    if row % kind.block == 0:
        return kind
    smaller = GGML_TYPES[_SMALLER.get(kind.name, kind.name)]
    return smaller if row % smaller.block == 0 else GGML_TYPES["f16"]
