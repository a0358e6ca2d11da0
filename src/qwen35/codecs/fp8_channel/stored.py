"""Decoding, encoding and judging of FP8 weights with a scale for each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.codec import Encoding, EncodingRequest, Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.floats import all_finite, f32_from, from_f32, rounded_scales
from qwen35.codecs.fp8.arrays import e4m3_values, refined, row_grid
from qwen35.codecs.pieces import Readable, not_finite, whole
from qwen35.codecs.refined_bounds import RefinedErrors
from qwen35.codecs.stored_rows import StoredRows
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8

__all__ = ["TOLERANCE", "EncodingChannels", "EncodingTensor", "StoredChannels", "judge"]

_LARGEST = np.float32(448)
_SMALLEST = np.float32(2.0**-126)
"""The smallest scale, of rows of zeros too: the inverse of a subnormal one may be infinite."""

_ROUNDING = 2.0**-4 * 1.01
"""Half a step of E4M3 relative to a value, with room for the rounding of quotients."""

_SMALL = 2.0**-10 * 1.01
"""Half a step of subnormal E4M3 numbers, in units of the scale."""

_NARROW, _WIDE = 0.99, 2.0
"""A scale may be this many times that of the largest magnitude of its row."""

TOLERANCE = (
    f"scales from {_NARROW} to {_WIDE:g} times those of the largest magnitudes, where no code is "
    "further from its value than rounding to E4M3 explains; `qwen35 reproduce` compares every byte"
)
"""The largest differences that `judge` misses."""


class StoredChannels(StoredRows):
    """The values of a stored weight; its scales stay in memory.

    Raises:
        TensorError: a scale is not finite or not positive.
    """

    def __init__(self, reader: Readable, weight: Weight, spec: TensorSpec) -> None:
        super().__init__(weight, spec)
        self._reader = reader
        part = weight.need("_scale")
        self.scales = np.broadcast_to(whole(reader, part), spec.shape[0])
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            raise TensorError(
                part.spec.name,
                "holds a scale that is not finite or not positive",
                hint="the checkpoint is damaged: convert it again",
            )

    def decoded(self, first: int, count: int) -> F32:
        """Return rows, decoded."""
        values: F32 = e4m3_values()[self.codes(first, count)]
        scaled: F32 = values * self.scales[first : first + count, None]
        return scaled

    def codes(self, first: int, count: int) -> U8:
        """Return the codes of rows.

        Raises:
            TensorError: one is NaN.
        """
        columns = self.spec.shape[1]
        codes = np.empty((count, columns), np.uint8)
        self._reader.read_into(self.weight.main, first * columns, codes.data.cast("B"))
        if not all_finite(codes, "F8_E4M3"):
            raise not_finite(self.weight.name)
        return codes


class EncodingChannels(Encoding):
    """Encodes rows, each with the scale that takes its largest magnitude to 448."""

    def __init__(self, request: EncodingRequest) -> None:
        self._request = request

    def add(self, piece: Piece) -> None:
        """Encode and write rows."""
        from qwen35.codecs.fp8_channel import kernels

        request, columns = self._request, piece.values.shape[1]
        codes_out = request.outputs[0]
        values = piece.values
        if piece.dtype == "BF16":  # bits of magnitudes are ordered as they are
            largest = f32_from((values & np.uint16(0x7FFF)).max(axis=1), "BF16")
        else:
            values = f32_from(values, piece.dtype)
            largest = np.abs(values).max(axis=1)
        scales = self.scales(largest)
        codes = np.empty(values.size, np.uint8)
        kernels.encode(np.ascontiguousarray(values).reshape(-1), scales, codes)
        if request.refine is not None:
            rows = f32_from(piece.values, piece.dtype)
            nearest = codes.reshape(rows.shape)
            codes = refined(request.refine, piece.first, rows, nearest, scales[:, None]).reshape(-1)
        request.write(codes_out.name, piece.first * columns, codes.data)
        self.store(piece.first, scales)

    def scales(self, largest: F32) -> F32:
        """Return the scales of rows with these largest magnitudes, rounded as they are stored.

        Raises:
            TensorError: the dtype cannot hold one.
        """
        dtype = self._request.spec.dtype
        try:
            scales = rounded_scales(largest / _LARGEST, dtype)
        except ValueError as error:
            hint = "leave it unpacked, by --keep"
            raise TensorError(self._request.source, str(error), hint=hint) from error
        least = np.finfo(np.float16).smallest_subnormal if dtype == "F16" else _SMALLEST
        return np.maximum(scales, least)

    def store(self, first: int, scales: F32) -> None:
        """Write the scales of rows from `first` on."""
        out = self._request.outputs[1]
        data = from_f32(scales, out.dtype).data.cast("B")
        self._request.write(out.name, first * out.itemsize, data)


class EncodingTensor(EncodingChannels):
    """Encodes rows with the scale that takes the largest magnitude of all to 448."""

    def scales(self, largest: F32) -> F32:
        """Return the one scale for each row."""
        assert self._request.largest is not None  # the codec surveys
        return np.full(len(largest), _scale_of(float(self._request.largest[0])))

    def store(self, first: int, scales: F32) -> None:
        """Write both scales, with the first rows."""
        if first:
            return
        assert self._request.input_largest is not None  # planning refuses to go without
        both = (scales[0], _scale_of(self._request.input_largest))
        for out, scale in zip(self._request.outputs[1:], both, strict=True):
            self._request.write(out.name, 0, np.array(scale, np.float32).data.cast("B"))


def _scale_of(largest: float) -> np.float32:
    return max(np.float32(largest) / _LARGEST, _SMALLEST)


def judge(
    values: StoredChannels,
    spec: TensorSpec,
    original: Iterator[Piece],
    result: WeightComparison,
    *,
    per_row: bool,
) -> None:
    """Compare every code with its value, and scales with the largest magnitudes of their rows.

    Args:
        values: the stored weight.
        spec: the decoded weight.
        original: as `qwen35.codecs.codec.Codec.judge` takes it.
        result: likewise.
        per_row: whether each row has a scale of its own.
    """
    misplaced = wrong_scales = 0
    refined_errors = RefinedErrors(outputs=result.outputs)
    halves = values.weight.need("_scale").spec.dtype == "F16"
    slack = float(np.finfo(np.float16).smallest_subnormal) / 2 if halves else 0.0
    for piece in original:
        decoded = values.decoded(piece.first, len(piece.values))
        exact = f32_from(piece.values.reshape(-1), piece.dtype).reshape(decoded.shape)
        scales = values.scales[piece.first : piece.first + len(decoded)].astype(np.float64)
        allowed = np.maximum(np.abs(exact) * _ROUNDING, _SMALL * scales[:, None])
        if result.refined:
            codes = values.codes(piece.first, len(exact))
            refined_errors.add(exact, row_grid(codes, scales.astype(np.float32)[:, None]))
        else:
            misplaced += int(np.count_nonzero(~(np.abs(decoded - exact) <= allowed)))
        wanted = np.abs(exact).max(axis=1).astype(np.float64) / _LARGEST
        near = (scales >= _NARROW * wanted - slack) & (scales <= _WIDE * wanted)
        wrong_scales += int(np.count_nonzero(~near & (wanted > _SMALLEST))) if per_row else 0
        result.add(decoded.reshape(-1), exact.reshape(-1))
    if misplaced:
        message = f"{misplaced} of {spec.numel} values are further from the source than rounding"
        result.found("codes", f"{message} to E4M3 with these scales explains")
    refined_errors.report(result)
    if wrong_scales:
        result.found("scales", f"{wrong_scales} of {spec.shape[0]} scales do not fit their rows")
