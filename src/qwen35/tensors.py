"""Tensor descriptions: names, dtypes, shapes and sizes, never values."""

from __future__ import annotations

import math
from dataclasses import field
from functools import lru_cache

from qwen35.errors import HeaderError
from qwen35.record_class import record

__all__ = [
    "DTYPE_BITS",
    "DTYPE_NAMES",
    "FLOAT_DTYPES",
    "HUB_DTYPES",
    "StoredTensor",
    "TensorSpec",
    "Weight",
]

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits per element, by dtype name in a safetensors header (safetensors 0.8 `Dtype`)."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""Dtypes of unquantized weights."""

HUB_DTYPES: dict[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Dtype names in config.json, mapped to those in safetensors headers."""

DTYPE_NAMES: dict[str, str] = {short: name for name, short in HUB_DTYPES.items()}
"""The inverse of `HUB_DTYPES`."""


@record
class TensorSpec:
    """The description of a tensor: everything but its data.

    Args:
        name: full name in the checkpoint.
        dtype: a key of `DTYPE_BITS`.
        shape: dimensions, outermost first; ``()`` is a scalar.
        nbytes: size of the data in bytes, which follows from the others.

    >>> TensorSpec("w", "BF16", (3, 4)).nbytes
    24
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            nbytes = _nbytes(self.dtype, self.shape)
        except KeyError:
            raise HeaderError(
                self.name, f"dtype {self.dtype!r}", expected=f"one of {', '.join(DTYPE_BITS)}"
            ) from None
        if nbytes < 0:
            raise HeaderError(self.name, f"negative size in shape {list(self.shape)}")
        object.__setattr__(self, "nbytes", nbytes)  # frozen, to type checkers

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BITS[self.dtype] // 8


# A checkpoint of 200,000 tensors has a dozen shapes: each size is computed once, and stored once.
@lru_cache(maxsize=4096)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor; negative if one of its dimensions is."""
    bits = DTYPE_BITS[dtype]
    return -1 if any(size < 0 for size in shape) else math.prod(shape) * bits // 8


@record
class StoredTensor:
    """A tensor in a file.

    Args:
        spec: its description.
        file: file name, relative to the checkpoint.
        begin: file offset of its first byte.
    """

    spec: TensorSpec
    file: str
    begin: int


@record
class Weight:
    """A weight and the stored tensors that hold it.

    Args:
        name: the tensor's name in an unquantized checkpoint.
        storage: the codec: a key of `qwen35.codecs.registry.CODECS`.
        parts: the stored tensors, that of the values first.
    """

    name: str
    storage: str
    parts: tuple[StoredTensor, ...]

    @property
    def main(self) -> StoredTensor:
        """The stored tensor of the values."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        """Total size of all parts in bytes."""
        return sum(part.spec.nbytes for part in self.parts)

    def part(self, suffix: str) -> StoredTensor | None:
        """Return the companion called ``{name}{suffix}``, or None."""
        name = self.name + suffix
        return next((part for part in self.parts if part.spec.name == name), None)

    def need(self, suffix: str) -> StoredTensor:
        """Return a companion that must exist: grouping the weight required it."""
        part = self.part(suffix)
        assert part is not None, suffix
        return part
