"""Weights in pieces of bounded size: raw as stored, or decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.source import Reader
from qwen35.checkpoint.storage import FP8_BLOCK, FP8_SCALE, NF4_STATE, StoredTensor, Weight
from qwen35.codecs.floats import all_finite, empty, f32_from, from_f32
from qwen35.codecs.fp8_arrays import decode_rows
from qwen35.codecs.nf4 import BLOCK, NESTED_BLOCK, parts_layout
from qwen35.codecs.nf4_arrays import State, decode_absmax, decode_blocks, parse_state
from qwen35.errors import TensorError
from qwen35.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["STRIP", "decoded", "stored", "tile_rows"]

STRIP = 2**19
"""Elements of a piece; a multiple of every block size."""

Array = npt.NDArray[Any]


def stored(
    reader: Reader, tensor: StoredTensor, *, check: bool = True, strip: int | None = None
) -> Iterator[Array]:
    """Yield the elements of a stored tensor in flat pieces, each valid until the next.

    A piece has `strip` elements, or `STRIP`; the last one maybe fewer.

    Raises:
        TensorError: it cannot be read, or (with `check`) holds a NaN or an infinity.
    """
    spec, strip = tensor.spec, strip or STRIP
    checked = check and (spec.dtype in FLOAT_DTYPES or spec.dtype == "F8_E4M3")
    buffer = empty(spec.dtype, min(strip, spec.numel)) if spec.dtype in _CARRIED else None
    for start in range(0, spec.numel, strip):
        count = min(strip, spec.numel - start)
        piece = np.empty(count * spec.itemsize, np.uint8) if buffer is None else buffer[:count]
        reader.read_into(tensor, start * spec.itemsize, piece.data.cast("B"))
        if checked and not all_finite(piece, spec.dtype):
            raise not_finite(spec.name)
        yield piece


_CARRIED = (*FLOAT_DTYPES, "U8", "F8_E4M3")


def not_finite(name: str) -> TensorError:
    """The refusal of a weight that holds NaN or infinity."""
    return TensorError(
        name,
        "holds NaN or infinity",
        hint="the checkpoint is damaged or its training diverged: repair it first",
    )


def decoded(
    reader: Reader, weight: Weight, spec: TensorSpec, *, strip: int | None = None
) -> Iterator[Array]:
    """Yield the elements of a weight in flat pieces of the dtype of `spec`.

    A piece has `strip` elements, or `STRIP`; the last one maybe fewer. It is valid until the next.

    Raises:
        TensorError: it cannot be read or decoded, or holds a NaN or an infinity.
    """
    if weight.storage == "plain":
        yield from stored(reader, weight.main, check=False, strip=strip)
        return
    pieces = _nf4 if weight.storage == "nf4" else _fp8
    for piece in _even(pieces(reader, weight, spec), spec.numel, strip or STRIP):
        with np.errstate(over="ignore"):
            values = from_f32(piece, spec.dtype)
        if not (all_finite(piece, "F32") and all_finite(values, spec.dtype)):
            raise not_finite(weight.name)
        yield values


def tile_rows(spec: TensorSpec) -> int:
    """Return the elements of a piece that holds whole rows of FP8 tiles, about `STRIP` of them."""
    row = FP8_BLOCK * spec.shape[1]
    return max(1, STRIP // row) * row


def _even(pieces: Iterator[Array], numel: int, strip: int) -> Iterator[Array]:
    """Yield the same elements in pieces of `strip`, so that two sources can be compared."""
    rest = next(pieces)
    for start in range(0, numel, strip):
        count = min(strip, numel - start)
        while len(rest) < count:
            rest = np.concatenate([rest, next(pieces)])
        yield rest[:count]
        rest = rest[count:]


def _whole(reader: Reader, tensor: StoredTensor) -> Array:
    """Return all elements of a small tensor, floats as float32."""
    array = empty(tensor.spec.dtype, tensor.spec.numel)
    reader.read_into(tensor, 0, array.data.cast("B"))
    return f32_from(array, tensor.spec.dtype) if tensor.spec.dtype in FLOAT_DTYPES else array


def _fp8(reader: Reader, weight: Weight, spec: TensorSpec) -> Iterator[Array]:
    rows, columns = spec.shape
    scale = fp8_scales(reader, weight)
    step = tile_rows(spec) // columns
    buffer = np.empty((min(step, rows), columns), np.uint8)
    for start in range(0, rows, step):
        codes = buffer[: min(step, rows - start)]
        reader.read_into(weight.main, start * columns, codes.data.cast("B"))
        first = start // FP8_BLOCK
        blocks = scale[first : first - (-len(codes) // FP8_BLOCK)]
        yield decode_rows(codes, blocks).reshape(-1)


def fp8_scales(reader: Reader, weight: Weight) -> npt.NDArray[np.float32]:
    """Return the scales of an FP8 weight, [ceil(rows / 128), ceil(columns / 128)].

    Raises:
        TensorError: one is not finite or not positive.
    """
    stored_scale = weight.part(FP8_SCALE)
    assert stored_scale is not None  # grouped by it
    scales = _whole(reader, stored_scale)
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise TensorError(
            stored_scale.spec.name,
            "holds a scale that is not finite or not positive",
            hint="the checkpoint is damaged: convert it again",
        )
    return scales.reshape(stored_scale.spec.shape)


def nf4_state(reader: Reader, weight: Weight, spec: TensorSpec) -> State:
    """Read and check the JSON blob and the companions' shapes of an NF4 weight.

    Raises:
        TensorError: they do not fit `spec`.
    """
    blob = weight.part(f".{NF4_STATE}")
    assert blob is not None  # grouped by it
    state = parse_state(bytes(reader.read(blob)), weight.name)
    if state.shape != spec.shape:
        raise TensorError(
            blob.spec.name, f"shape {list(state.shape)}", expected=f"{list(spec.shape)}"
        )
    for suffix, (dtype, shape) in parts_layout(spec, nested=state.nested).items():
        part = weight.part(suffix)
        if part is None or (part.spec.dtype, part.spec.shape) != (dtype, shape):
            found = f"{part.spec.dtype} {list(part.spec.shape)}" if part else "missing"
            raise TensorError(f"{weight.name}{suffix}", found, expected=f"{dtype} {list(shape)}")
    return state


def nf4_absmax(reader: Reader, weight: Weight, state: State) -> Array:
    """Return the float32 absmax values of an NF4 weight, decoded if doubly quantized."""
    absmax = _whole(reader, _need(weight, ".absmax"))
    if not state.nested:
        return absmax
    return decode_absmax(
        absmax,
        _whole(reader, _need(weight, ".nested_absmax")),
        _whole(reader, _need(weight, ".nested_quant_map")),
        state.offset,
    )


def _need(weight: Weight, suffix: str) -> StoredTensor:
    part = weight.part(suffix)
    assert part is not None  # checked by nf4_state
    return part


def _nf4(reader: Reader, weight: Weight, spec: TensorSpec) -> Iterator[Array]:
    if spec.numel % BLOCK:
        raise TensorError(weight.name, f"{spec.numel} weights", expected=f"a multiple of {BLOCK}")
    absmax = nf4_absmax(reader, weight, nf4_state(reader, weight, spec))
    levels = _whole(reader, _need(weight, ".quant_map"))
    assert STRIP % (BLOCK * NESTED_BLOCK) == 0
    packed = np.empty(min(STRIP, spec.numel) // 2, np.uint8)
    for start in range(0, spec.numel, STRIP):
        count = min(STRIP, spec.numel - start)
        codes = packed[: count // 2]
        reader.read_into(weight.main, start // 2, codes.data)
        first = start // BLOCK
        yield decode_blocks(codes, absmax[first : first + count // BLOCK], levels)
