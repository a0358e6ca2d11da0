"""Read stored tensors in pieces of bounded size, in file order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from qwen35.errors import TensorError
from qwen35.tensors import DTYPE_BITS, FLOAT_DTYPES, StoredTensor

if TYPE_CHECKING:
    from qwen35.array_types import Array

__all__ = ["PIECE", "Readable", "not_finite", "positive", "stored", "whole"]

PIECE = 2**19
"""Elements per piece; a multiple of every codec's block size."""


class Readable(Protocol):
    """Reads bytes of stored tensors (`qwen35.checkpoint.source.Reader`)."""

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `tensor`, starting at `offset`."""

    def read(self, tensor: StoredTensor) -> bytearray:
        """Return all bytes of a (small) tensor."""


def not_finite(name: str) -> TensorError:
    """Return the error for a weight that holds NaN or infinity."""
    return TensorError(
        name,
        "holds NaN or infinity",
        hint="the checkpoint is damaged or its training diverged: repair it first",
    )


def stored(reader: Readable, tensor: StoredTensor, *, check: bool = True) -> Iterator[Array]:
    """Yield the elements of a stored tensor in flat pieces, each valid until the next.

    Raises:
        TensorError: the tensor cannot be read, or (with `check`) holds NaN or infinity.
    """
    import numpy as np

    from qwen35.codecs.floats import CARRIED, all_finite, empty

    spec = tensor.spec
    checked = check and (spec.dtype in FLOAT_DTYPES or spec.dtype == "F8_E4M3")
    # One buffer for all pieces; dtypes without a carrier are copied as bytes.
    buffer = empty(spec.dtype, min(PIECE, spec.numel)) if spec.dtype in CARRIED else None
    blocks = spec.dtype not in DTYPE_BITS  # which have no bytes per element
    size, total = (1, spec.nbytes) if blocks else (spec.itemsize, spec.numel)
    for start in range(0, total, PIECE):
        count = min(PIECE, total - start)
        piece = np.empty(count * size, np.uint8) if buffer is None else buffer[:count]
        reader.read_into(tensor, start * size, piece.data.cast("B"))
        if checked and not all_finite(piece, spec.dtype):
            raise not_finite(spec.name)
        yield piece


def whole(reader: Readable, tensor: StoredTensor) -> Array:
    """Return all elements of a small tensor as a flat array; floats become float32."""
    from qwen35.codecs.floats import empty, f32_from

    array = empty(tensor.spec.dtype, tensor.spec.numel)
    reader.read_into(tensor, 0, array.data.cast("B"))
    return f32_from(array, tensor.spec.dtype) if tensor.spec.dtype in FLOAT_DTYPES else array


def positive(reader: Readable, tensor: StoredTensor) -> float:
    """Return a scale: the one element of a tensor.

    Raises:
        TensorError: it is not a positive number.
    """
    value = whole(reader, tensor)[0]
    if not 0 < value < float("inf"):
        hint = "the checkpoint is damaged: convert it again"
        raise TensorError(tensor.spec.name, f"is {value}", expected="a positive number", hint=hint)
    return float(value)
