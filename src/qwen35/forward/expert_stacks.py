"""Stacks of experts of which one matrix at a time is read: layers larger than memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.forward.decoded_weights import StoredWeights

__all__ = ["set_apart"]

_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacks of transformers, with the matrices of an expert that lie in them below each other."""


class _ReadStack:
    """A stack that is indexed like a tensor [experts, rows, columns].

    Args:
        torch: the library.
        weights: of the model.
        items: the stack, or its matrices.
        like: a tensor of its shape.
        leaves: names of the matrices of an expert.
        dtype: of the matrices.
        device: to compute on.
    """

    def __init__(
        self,
        torch: Any,
        weights: StoredWeights,
        items: Sequence[InventoryItem],
        like: Any,
        leaves: Sequence[str],
        dtype: Any,
        device: str,
    ) -> None:
        self._torch, self._weights, self._leaves = torch, weights, leaves
        self._dtype, self._device = dtype, device
        self._items = {(_leaf(item), item.role.expert): item for item in items}
        self._fused = items[0].role.expert is None
        self.shape = like.shape

    def __getitem__(self, expert: Any) -> Any:
        """Read the matrices of an expert, [rows, columns]."""
        number, rows = int(expert), self.shape[1]
        out = self._torch.empty(self.shape[1:], dtype=self._dtype)
        if self._fused:
            (item,) = self._items.values()
            self._weights.fill(self._torch, item, out, number * rows)
        else:
            for leaf, part in zip(self._leaves, out.chunk(len(self._leaves)), strict=True):
                self._weights.fill(self._torch, self._items[leaf, number], part)
        return out.to(self._device)

    def product(self, expert: int, x: Any) -> Any:
        """Return inputs [tokens, columns] times the matrices; computing back reads them again."""
        return _read_product(self._torch)(x, self, expert)


@cache
def _read_product(torch: Any) -> Any:
    """Return the product as a function of torch that keeps no matrix for its way back."""

    class ReadProduct(torch.autograd.Function):  # type: ignore[misc]  # torch is Any here
        """The product of inputs that need gradients with a matrix that needs none."""

        @staticmethod
        def forward(context: Any, x: Any, stack: _ReadStack, expert: int) -> Any:
            context.stack, context.expert = stack, expert
            return torch.nn.functional.linear(x, stack[expert])

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            [g] = gradients
            return g @ context.stack[context.expert], None, None

    return ReadProduct.apply


def _leaf(item: InventoryItem) -> str:
    return item.role.name.rpartition(".")[2]


def set_apart(
    torch: Any,
    weights: StoredWeights,
    module: Any,
    items: Sequence[InventoryItem],
    dtype: Any,
    device: str,
) -> list[InventoryItem]:
    """Have a module read its experts one by one; return the other weights.

    Args:
        torch: the library.
        weights: of the model.
        module: a decoder layer, or the MTP part, on the meta device.
        items: its weights.
        dtype: to compute in.
        device: to compute on.
    """
    rest, found = [], defaultdict[tuple[str, str], list[InventoryItem]](list)
    for item in items:
        if item.role.info.kind != "experts":
            rest.append(item)
            continue
        prefix = f"layers.{item.role.layer}." if item.role.scope == "mtp" else ""
        stack = next(n for n, leaves in _STACKS.items() if _leaf(item) in (n, *leaves))
        found[f"{prefix}mlp.experts", stack].append(item)
    for (path, stack), own in found.items():
        experts = module.get_submodule(path)
        like = getattr(experts, stack)
        delattr(experts, stack)
        leaves = _STACKS[stack]
        made = _ReadStack(torch, weights, own, like, leaves, dtype, device)
        setattr(experts, stack, made)
    return rest
