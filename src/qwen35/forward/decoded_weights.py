"""The decoded weights of a model, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen35.array_types import Array
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Reader
from qwen35.codecs.registry import is_packed
from qwen35.model.model_config import ModelConfig
from qwen35.planning.rows import RowSpan, rows_of
from qwen35.tensors import TensorSpec

__all__ = ["StoredWeights", "tensor_of", "torch_dtype"]

_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def torch_dtype(torch: Any, dtype: str) -> Any:
    """Return torch's dtype of a safetensors name."""
    return getattr(torch, _TORCH[dtype])


class StoredWeights:
    """The weights of a checkpoint in any codec, or of a GGUF model, with its adapters applied.

    Args:
        reader: of the checkpoint.
        config: its geometry.
        items: its weights, from `qwen35.checkpoint.reconciled.take`.
    """

    def __init__(self, reader: Reader, config: ModelConfig, items: Sequence[InventoryItem]) -> None:
        self._reader, self.config, self.items = reader, config, items

    def pieces(
        self, item: InventoryItem, runs: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, Array, str]]:
        """Yield the values of rows as (first row, [rows, row] values, dtype), in order.

        BF16 values are bits in uint16.

        Args:
            item: the weight; all of its dimensions but the last are flattened.
            runs: the first of consecutive rows, and their number.

        Raises:
            TensorError: they cannot be read or decoded.
        """
        if is_packed(item.weight) and not item.changes:  # as engines do: decoded, not rounded
            item = replace(item, spec=TensorSpec(item.spec.name, "F32", item.spec.shape))
        rows = rows_of(item)
        # Non-finite weights are not checked here: what is computed with them is.
        opened = rows.open(self._reader, check=False)
        for first, count in runs:
            for piece in opened.pieces(rows.chunks(span=RowSpan(range(1), first, count))):
                yield piece.first, piece.values, piece.dtype

    def fill(self, torch: Any, item: InventoryItem, target: Any, first: int = 0) -> None:
        """Fill a contiguous tensor with rows of a weight from `first` on, rounded to its dtype.

        Raises:
            TensorError: they cannot be read or decoded.
        """
        row = item.spec.shape[-1] if item.spec.shape else 1
        stored = not is_packed(item.weight) and not item.changes
        if stored and torch_dtype(torch, item.spec.dtype) == target.dtype:  # without a copy
            view = memoryview(target.view(-1).view(torch.uint8).numpy())
            self._reader.read_into(item.weight.main, first * row * item.spec.itemsize, view)
            return
        rows = target.view(-1, row)
        for start, values, dtype in self.pieces(item, [(first, len(rows))]):
            part = rows[start - first : start - first + len(values)]
            part.copy_(tensor_of(torch, values, dtype).view(len(values), row))

    def role(self, name: str) -> InventoryItem:
        """Return the weight of a role that the model has once, such as ``embed_tokens``."""
        return next(item for item in self.items if item.role.name == name)

    @property
    def embedding(self) -> InventoryItem:
        """The token embedding."""
        return self.role("embed_tokens")

    @property
    def head(self) -> InventoryItem:
        """The matrix of the head: the embedding, if that is tied to it."""
        return self.embedding if self.config.tied else self.role("lm_head")


def tensor_of(torch: Any, values: Array, dtype: str) -> Any:
    """Return a tensor sharing memory with an array of `dtype` (BF16 arrays hold the bits)."""
    if dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
