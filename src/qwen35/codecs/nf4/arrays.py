"""NF4 on arrays: encode and decode blocks, quantize and restore their absmax."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.codec import Refine, Search
from qwen35.codecs.floats import f32_from
from qwen35.codecs.nf4.layout import BLOCK, NESTED_BLOCK, state_blob
from qwen35.codecs.nf4.tables import LEVELS, dynamic_lookup, dynamic_map
from qwen35.codecs.refining import CodeGrid
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec

__all__ = [
    "SCALE_REACH",
    "AbsmaxStatistics",
    "decode_absmax",
    "decode_blocks",
    "encode_blocks",
    "error_sums",
    "parse_state",
    "refined",
    "row_grid",
    "searched",
]

SCALE_REACH = 0.25
"""The share of itself that a scale may move by when it is searched; comparisons rely on it."""

_FACTORS = (0.95, 1.05, 0.9, 1.1, 0.85, 1.15, 0.8, 1.2)
"""Where scales are searched: finer steps gain nothing that can be measured."""


def encode_blocks(values: Array, dtype: str, absmax: F32, packed: U8) -> bool:
    """Quantize whole blocks.

    Args:
        values: [n] elements of `dtype` (BF16 as uint16 bits), n a multiple of 64.
        dtype: BF16, F16 or F32.
        absmax: [n / 64], output.
        packed: [n / 2], output.

    Returns:
        True if all values are finite.
    """
    from qwen35.codecs.nf4 import kernels

    if dtype == "BF16":
        bad = kernels.encode_bf16(values.view(np.uint32), packed, absmax)
    else:
        bad = kernels.encode_f32(f32_from(values, dtype), packed, absmax)
    return int(bad) == 0


def error_sums(values: Array, dtype: str, packed: U8, absmax: F32) -> tuple[float, float]:
    """Return the sums of squared differences and of squares of the original.

    Arguments are those of `encode_blocks`, with `absmax` as it is decoded.
    """
    from qwen35.codecs.nf4 import kernels

    sums = np.zeros((2, BLOCK // 2))
    if dtype == "BF16":
        kernels.error_sums_bf16(values.view(np.uint32), packed, absmax, LEVELS, sums)
    else:
        kernels.error_sums_f32(f32_from(values, dtype), packed, absmax, LEVELS, sums)
    squared, norm = sums.sum(axis=1).tolist()
    return squared, norm


@dataclass(frozen=True)
class AbsmaxStatistics:
    """The double-quantized absmax of one weight.

    Args:
        codes: [blocks] indices into the dynamic map.
        nested: [ceil(blocks / 256)] largest magnitude in each run of 256 centred values.
        offset: mean of the absmax values, subtracted before quantization.
    """

    codes: U8
    nested: F32
    offset: float

    @classmethod
    def of(cls, absmax: F32, offset: float | None = None) -> AbsmaxStatistics:
        """Quantize the absmax values of one weight.

        Args:
            absmax: [blocks] float32.
            offset: the mean to subtract; if None, the float64 mean rounded to float32.
        """
        mean = np.float32(absmax.mean(dtype=np.float64) if offset is None else offset)
        centred = absmax - mean
        blocks = -(-len(centred) // NESTED_BLOCK)
        # Zero padding does not change the largest magnitude of the last block.
        padded = np.zeros((blocks, NESTED_BLOCK), np.float32)
        padded.reshape(-1)[: len(centred)] = centred
        nested = np.abs(padded).max(axis=1)
        # The float32 operations and their order are bitsandbytes': other orders change codes.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = (np.float32(1) / nested)[:, None]
            unit = np.clip(padded * inverse, np.float32(-1), np.float32(1))
        # Of the smallest magnitudes, the inverse overflows; 0 * inf then counts as -1.
        unit = np.where(np.isnan(unit), np.float32(-1), unit)
        scaled = (unit + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)
        codes = dynamic_lookup()[scaled.astype(np.int32)]
        return cls(codes.reshape(-1)[: len(centred)].copy(), nested, float(mean))

    @property
    def decoded(self) -> F32:
        """[blocks] the absmax values as they are read."""
        return decode_absmax(self.codes, self.nested, dynamic_map(), self.offset)

    def nearby(self, blocks: slice) -> U8:
        """Return [choices, blocks] codes of scales near those of some blocks, or their own."""
        table, own = dynamic_map(), self.decoded[blocks]
        units = np.repeat(self.nested, NESTED_BLOCK)[: len(self.codes)][blocks]
        middles = (table[:-1] + table[1:]) / 2
        targets = np.multiply.outer(np.array(_FACTORS, np.float32), own) - np.float32(self.offset)
        places = np.searchsorted(middles, targets / np.where(units > 0, units, 1)).astype(np.uint8)
        scales = table[places] * units + np.float32(self.offset)
        near = np.abs(scales - own) <= np.float32(SCALE_REACH) * np.abs(own)
        return np.where(near, places, self.codes[blocks])

    def parts(self, spec: TensorSpec) -> tuple[Any, ...]:
        """Return the companions' data, in the order of `qwen35.codecs.nf4.layout.layout`."""
        return (
            self.codes,
            LEVELS,
            self.nested,
            dynamic_map(),
            np.frombuffer(state_blob(spec, self.offset), np.uint8),
        )


def decode_absmax(codes: U8, nested: F32, nested_map: F32, offset: float) -> F32:
    """Restore the absmax values [blocks] from double-quantized statistics."""
    scale = np.repeat(nested, NESTED_BLOCK)[: len(codes)]
    return nested_map[codes] * scale + np.float32(offset)


def row_grid(packed: U8, absmax: F32, shape: tuple[int, ...]) -> CodeGrid:
    """Return what the codes of whole rows can stand for.

    Args:
        packed: [rows * columns / 2].
        absmax: [rows * columns / 64] as it is decoded.
        shape: rows and columns.
    """
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(shape)
    if shape[1] % BLOCK:  # blocks reach into the next row
        absmax = np.repeat(absmax, BLOCK)
    return CodeGrid(codes, absmax.reshape(shape[0], -1), LEVELS)


def refined(refine: Refine, first: int, rows: F32, packed: U8, absmax: F32) -> U8:
    """Return refined codes, packed.

    Args:
        refine: chooses them.
        first: the number of the first row.
        rows: [n, columns] what they are for.
        packed: [n * columns / 2] the nearest ones.
        absmax: [n * columns / 64] as it is decoded.
    """
    grid = row_grid(packed, absmax, (rows.shape[0], rows.shape[1]))
    return _pairs(refine(first, rows, grid))


def searched(
    search: Search, first: int, rows: F32, packed: U8, statistics: AbsmaxStatistics, blocks: slice
) -> U8:
    """Return refined codes, packed, and put the codes of their scales into the statistics.

    Args:
        search: chooses both.
        first: the number of the first row.
        rows: [n, columns] what they are for, whole blocks each.
        packed: [n * columns / 2] the nearest codes.
        statistics: of the whole weight.
        blocks: those of the rows.
    """
    own, others = statistics.codes[blocks], statistics.nearby(blocks)
    units = np.repeat(statistics.nested, NESTED_BLOCK)[: len(statistics.codes)][blocks]
    scales = dynamic_map()[others] * units + np.float32(statistics.offset)
    grid = row_grid(packed, statistics.decoded[blocks], (rows.shape[0], rows.shape[1]))
    chosen, which = search(first, rows, grid, scales.reshape(len(others), *grid.scales.shape))
    picked = which.reshape(1, -1).astype(np.intp)
    statistics.codes[blocks] = np.take_along_axis(np.stack([own, *others]), picked, 0)[0]
    return _pairs(chosen)


def _pairs(codes: U8) -> U8:
    """Pack codes, two a byte."""
    both = codes.reshape(-1, 2)
    pairs: U8 = both[:, 0] << np.uint8(4) | both[:, 1]
    return pairs


def decode_blocks(packed: U8, absmax: F32, levels: F32) -> F32:
    """Decode to [2 * len(packed)] float32 weights; ``absmax[b]`` scales block b."""
    indices = np.empty(2 * len(packed), np.uint8)
    np.right_shift(packed, 4, out=indices[0::2])
    np.bitwise_and(packed, 15, out=indices[1::2])
    values = levels[indices].reshape(-1, BLOCK)
    values *= absmax[:, None]
    return values.reshape(-1)


@dataclass(frozen=True)
class QuantState:
    """The validated JSON blob of an NF4 weight."""

    shape: tuple[int, ...]
    nested: bool
    offset: float


def parse_state(raw: bytes, name: str) -> QuantState:
    """Parse the JSON blob of the NF4 weight called `name`.

    Raises:
        TensorError: it is malformed or an unsupported variant.
    """
    try:
        parsed = json.loads(raw)
        shape = tuple(int(size) for size in parsed["shape"])
        nested = "nested_offset" in parsed
        offset = float(parsed.get("nested_offset", 0.0))
        if not math.isfinite(offset):
            raise ValueError(offset)
        kind = (parsed["quant_type"], parsed["blocksize"], parsed.get("nested_blocksize", 256))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TensorError(name, "its quant_state is not readable") from error
    if kind != ("nf4", BLOCK, NESTED_BLOCK):
        raise TensorError(
            name,
            f"quant_type {kind[0]!r} with blocks of {kind[1]} and {kind[2]}",
            expected=f"nf4 with blocks of {BLOCK} and {NESTED_BLOCK}",
        )
    return QuantState(shape, nested, offset)
