"""Random access to the values of weights that are decoded by whole rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from qwen35.codecs.floats import all_finite, from_f32
from qwen35.codecs.pieces import not_finite
from qwen35.tensors import TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, Array

__all__ = ["StoredRows"]


class StoredRows(ABC):
    """The values of a stored matrix.

    Args:
        weight: the stored weight.
        spec: the decoded weight.
    """

    def __init__(self, weight: Weight, spec: TensorSpec) -> None:
        self.weight, self.spec = weight, spec

    @abstractmethod
    def decoded(self, first: int, count: int) -> F32:
        """Return [count, columns] rows, decoded."""

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with decoded elements, starting at index `first`."""
        columns = self.spec.shape[1]
        begin, end = first // columns, -(-(first + out.size) // columns)
        skipped = first - begin * columns
        values = self.decoded(begin, end - begin).reshape(-1)[skipped : skipped + out.size]
        with np.errstate(over="ignore"):  # F16 may overflow: refused below
            out[:] = from_f32(values, self.spec.dtype)
        if not (all_finite(values, "F32") and all_finite(out, self.spec.dtype)):
            raise not_finite(self.weight.name)
