"""What the codes in blocks of ggml types can stand for, and blocks with other codes.

Only codes are changed: scales, minima and everything else in a block stay as they are. Layouts and
formulas are those of llama.cpp's ``ggml-common.h`` and ``ggml/src/ggml-quants.c`` (MIT) at
0c1e5709.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from qwen35.array_types import F32, U8
from qwen35.codecs.codec import Refine
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.codecs.refining import CodeGrid, Levels

__all__ = ["GRIDS", "grid_of", "refined", "with_codes"]

_Places = npt.NDArray[np.int64]
_Scales = Callable[[U8], tuple[F32, F32 | None]]


@dataclass(frozen=True)
class _Field:
    """A part of each code of a block: `bits` bits at a place of its own.

    Args:
        byte: [block] where.
        shift: [block] the lowest bit.
        bits: how many.
        above: the bits of the code below these.
    """

    byte: _Places
    shift: _Places
    bits: int
    above: int = 0

    def read(self, blocks: U8) -> U8:
        """Return [n, block] this part of the codes."""
        mask = np.uint8((1 << self.bits) - 1)
        low = blocks[:, self.byte] >> self.shift.astype(np.uint8) & mask
        part: U8 = low << np.uint8(self.above)
        return part

    def write(self, codes: U8, blocks: U8) -> None:
        """Replace this part of the codes in blocks."""
        mask = (1 << self.bits) - 1
        part = (codes >> self.above) & np.uint8(mask)
        for shift in np.unique(self.shift).tolist():
            here = self.shift == shift  # each byte once
            kept = blocks[:, self.byte[here]] & np.uint8(~(mask << shift) & 255)
            blocks[:, self.byte[here]] = kept | part[:, here] << np.uint8(shift)


def _at(count: int) -> _Places:
    return np.arange(count)


def _halves(first: int, count: int, run: int) -> _Field:
    """Four bits: runs of codes in the low, then in the high halves of bytes."""
    at = _at(count)
    return _Field(first + at // (2 * run) * run + at % run, at // run % 2 * 4, 4)


def _quarters(first: int, above: int = 0) -> _Field:
    """Two bits of 256 codes: runs of 32 in the quarters of bytes."""
    at = _at(256)
    return _Field(first + at // 128 * 32 + at % 32, at % 128 // 32 * 2, 2, above)


def _singles(first: int, above: int) -> _Field:
    """One bit of 256 codes: runs of 32 in the bits of bytes."""
    at = _at(256)
    return _Field(first + at % 32, at // 32, 1, above)


def _fifths(first: int) -> _Field:
    """The fifth bits of 32 codes, in their order."""
    at = _at(32)
    return _Field(first + at // 8, at % 8, 1, 4)


def _six_low() -> _Field:
    at = _at(256)
    return _Field(at // 128 * 64 + at % 64, at % 128 // 64 * 4, 4)


# --- scales and offsets of the parts of blocks


def _half(blocks: U8, at: int) -> F32:
    """Return [n, 1] the float16 at a place."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _one(at: int) -> _Scales:
    return lambda blocks: (_half(blocks, at), None)


def _with_minimum(blocks: U8) -> tuple[F32, F32 | None]:
    return _half(blocks, 0), _half(blocks, 2)


def _sixes(blocks: U8, at: int) -> tuple[F32, F32]:
    """Return [n, 8] scales and minima of 6 bits (`get_scale_min_k4`)."""
    low, high, rest = (blocks[:, at + 4 * i : at + 4 * i + 4] for i in range(3))
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6) << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _scales_q45_k(blocks: U8) -> tuple[F32, F32 | None]:
    scales, minima = _sixes(blocks, 4)
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _scales_q2_k(blocks: U8) -> tuple[F32, F32 | None]:
    both = blocks[:, :16]
    scales = _half(blocks, 80) * (both & 15).astype(np.float32)
    return scales, -(_half(blocks, 82) * (both >> 4).astype(np.float32))


def _scales_q3_k(blocks: U8) -> tuple[F32, F32 | None]:
    j = np.arange(16)
    low = blocks[:, 96 + j % 8] >> (j // 8 * 4).astype(np.uint8) & 15
    high = blocks[:, 104 + j % 4] >> (j // 4 * 2).astype(np.uint8) & 3
    return _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32), None


def _scales_q6_k(blocks: U8) -> tuple[F32, F32 | None]:
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _scales_iq4_xs(blocks: U8) -> tuple[F32, F32 | None]:
    j = np.arange(8)
    low = blocks[:, 4 + j // 2] >> (j % 2 * 4).astype(np.uint8) & 15
    high = blocks[:, 2 + j // 4] >> (j % 4 * 2).astype(np.uint8) & 3
    return _half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32), None


def _scales_nvfp4(blocks: U8) -> tuple[F32, F32 | None]:
    codes = blocks[:, :4].astype(np.int32)  # E4M3 without a sign
    exponent, mantissa = codes >> 3 & 15, (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / np.float32(8), exponent - 7)
    scales = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) / 2  # levels are doubled
    return np.where(codes & 127 == 127, 0, scales).astype(np.float32), None


# --- types


@dataclass(frozen=True)
class _BlockGrid:
    """The codes of a type.

    Args:
        fields: the parts of a code.
        scales: returns the scales [n, parts] and offsets, or None, of blocks.
        levels: what codes stand for.
    """

    fields: tuple[_Field, ...]
    scales: _Scales
    levels: Levels


def _integers(low: int, high: int) -> Levels:
    """Return the levels of codes from 0 on."""
    return Levels.of(np.arange(low, high + 1, dtype=np.float32))


def _bytes() -> Levels:
    """Return the levels of signed bytes.

    -128 is not one, although it would fit: kernels of ggml take magnitudes as signed bytes.
    """
    codes = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
    return Levels.of(np.where(codes < -127, np.float32(np.nan), codes))


def _small_floats() -> Levels:
    """Return the levels of E2M1 (``kvalues_mxfp4``): twice its numbers, the fourth bit a sign."""
    magnitudes = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
    return Levels.of(np.concatenate([magnitudes, -magnitudes]))


def _table() -> Levels:
    """Return the levels of iq4_nl and iq4_xs (``kvalues_iq4nl``)."""
    return Levels.of(np.array(_IQ4, np.float32))


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@cache
def _block_grid(kind: str) -> _BlockGrid:
    return GRIDS[kind]()


GRIDS: Mapping[str, Callable[[], _BlockGrid]] = {
    "q4_0": lambda: _BlockGrid((_halves(2, 32, 16),), _one(0), _integers(-8, 7)),
    "q4_1": lambda: _BlockGrid((_halves(4, 32, 16),), _with_minimum, _integers(0, 15)),
    "q5_0": lambda: _BlockGrid((_halves(6, 32, 16), _fifths(2)), _one(0), _integers(-16, 15)),
    "q5_1": lambda: _BlockGrid((_halves(8, 32, 16), _fifths(4)), _with_minimum, _integers(0, 31)),
    "q8_0": lambda: _BlockGrid((_Field(2 + _at(32), 0 * _at(32), 8),), _one(0), _bytes()),
    "q2_K": lambda: _BlockGrid((_quarters(16),), _scales_q2_k, _integers(0, 3)),
    "q3_K": lambda: _BlockGrid((_quarters(32), _singles(0, 2)), _scales_q3_k, _integers(-4, 3)),
    "q4_K": lambda: _BlockGrid((_halves(16, 256, 32),), _scales_q45_k, _integers(0, 15)),
    "q5_K": lambda: _BlockGrid(
        (_halves(48, 256, 32), _singles(16, 4)), _scales_q45_k, _integers(0, 31)
    ),
    "q6_K": lambda: _BlockGrid((_six_low(), _quarters(128, 4)), _scales_q6_k, _integers(-32, 31)),
    "iq4_nl": lambda: _BlockGrid((_halves(2, 32, 16),), _one(0), _table()),
    "iq4_xs": lambda: _BlockGrid((_halves(8, 256, 16),), _scales_iq4_xs, _table()),
    "nvfp4": lambda: _BlockGrid((_halves(4, 64, 8),), _scales_nvfp4, _small_floats()),
}
"""Type to its codes, for all types whose codes can be refined."""


def refined(refine: Refine, first: int, rows: F32, data: memoryview, kind: str) -> memoryview:
    """Return the blocks of rows with refined codes.

    Args:
        refine: chooses the codes.
        first: the number of the first row.
        rows: [n, columns].
        data: their blocks, as they are encoded plainly.
        kind: the type, one of `GRIDS`.
    """
    blocks = np.frombuffer(data, np.uint8)
    grid = grid_of(blocks, kind, (rows.shape[0], rows.shape[1]))
    return with_codes(blocks, kind, refine(first, rows, grid)).data


def grid_of(data: U8, kind: str, shape: tuple[int, int]) -> CodeGrid:
    """Return the codes of rows of blocks, and what they can stand for.

    Args:
        data: the blocks.
        kind: their type, one of `GRIDS`.
        shape: rows and columns.
    """
    one = _block_grid(kind)
    blocks = data.reshape(-1, GGML_TYPES[kind].nbytes)
    codes = one.fields[0].read(blocks)
    for field in one.fields[1:]:
        codes |= field.read(blocks)
    codes = one.levels.index[codes]
    scales, offsets = one.scales(blocks)
    rows = shape[0]
    moved = None if offsets is None else offsets.reshape(rows, -1)
    return CodeGrid(codes.reshape(shape), scales.reshape(rows, -1), one.levels.values, moved)


def with_codes(data: U8, kind: str, codes: U8) -> U8:
    """Return blocks with the indices `codes` [rows, columns] in the place of theirs."""
    one, row = _block_grid(kind), GGML_TYPES[kind]
    blocks = data.reshape(-1, row.nbytes).copy()
    stored = one.levels.stored[codes.reshape(-1, row.block)]
    for field in one.fields:
        field.write(stored, blocks)
    return blocks.reshape(-1)
