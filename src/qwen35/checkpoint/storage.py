"""Stored tensors grouped into the weights they stand for.

A plain weight is one stored tensor. An NF4 weight is a packed tensor with up to five companions, a
block-wise FP8 weight has a scale beside it. Everything after this module sees weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec

__all__ = [
    "FP8_BLOCK",
    "FP8_SCALE",
    "NF4_PARTS",
    "NF4_STATE",
    "Storage",
    "StoredTensor",
    "Weight",
    "group",
]

Storage = Literal["plain", "nf4", "fp8"]

FP8_BLOCK = 128
"""Rows and columns of an FP8 weight that share a scale (``weight_block_size``)."""

NF4_STATE = "quant_state.bitsandbytes__nf4"
NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE)
"""What follows an NF4 weight's name, after a dot (bitsandbytes 0.50 `QuantState.as_dict`)."""

FP8_SCALE = "_scale_inv"
"""What follows an FP8 weight's name; a multiplier: W = q * scale."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file holds it.

    Args:
        spec: its description.
        file: name of the file, relative to the checkpoint.
        begin: offset of its first byte in the file.
    """

    spec: TensorSpec
    file: str
    begin: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight and the stored tensors that hold it.

    Args:
        name: the tensor's name in an unquantized checkpoint.
        storage: how it is held.
        parts: stored tensors, the one called `name` first.
    """

    name: str
    storage: Storage
    parts: tuple[StoredTensor, ...]

    @property
    def main(self) -> StoredTensor:
        """The stored tensor that has the weight's own name."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        """Bytes to read for all parts."""
        return sum(part.spec.nbytes for part in self.parts)

    def part(self, suffix: str) -> StoredTensor | None:
        """Return the companion called ``{name}{suffix}``, if there is one."""
        wanted = self.name + suffix
        return next((part for part in self.parts if part.spec.name == wanted), None)


def _companions(tensors: Mapping[str, StoredTensor], name: str) -> tuple[Storage, list[str]]:
    if f"{name}.{NF4_STATE}" in tensors or f"{name}.absmax" in tensors:
        return "nf4", [f"{name}.{part}" for part in NF4_PARTS if f"{name}.{part}" in tensors]
    if name + FP8_SCALE in tensors:
        return "fp8", [name + FP8_SCALE]
    return "plain", []


def group(tensors: Mapping[str, StoredTensor]) -> tuple[tuple[Weight, ...], list[TensorError]]:
    """Group the stored tensors of a checkpoint, in their order.

    Returns:
        The weights, and what is wrong: a companion without its weight, packed data without its
        companions. Such tensors are in the weights all the same, as plain ones.
    """
    weights: list[Weight] = []
    problems: list[TensorError] = []
    claimed: set[str] = set()
    for name in tensors:
        storage, companions = _companions(tensors, name)
        if storage == "plain":
            continue
        claimed.update(companions, (name,))
        problem = _packing_problem(tensors, name, storage)
        if problem is not None:
            problems.append(problem)
            storage, companions = "plain", []
        parts = tuple(tensors[part] for part in (name, *companions))
        weights.append(Weight(name, storage, parts))
    for name, stored in tensors.items():
        if name in claimed:
            continue
        if _is_companion(name):
            problems.append(_orphan(name, "the weight it belongs to is missing"))
            continue
        if stored.spec.dtype in ("U8", "F8_E4M3"):
            found = f"{stored.spec.dtype} data without the tensors that give it meaning"
            problems.append(_orphan(name, found))
        weights.append(Weight(name, "plain", (stored,)))
    return tuple(weights), problems


def _orphan(name: str, found: str) -> TensorError:
    hint = "the checkpoint was saved incompletely: start from the original"
    return TensorError(name, found, hint=hint)


def _is_companion(name: str) -> bool:
    return name.endswith((*(f".{part}" for part in NF4_PARTS), FP8_SCALE))


def _packing_problem(
    tensors: Mapping[str, StoredTensor], name: str, storage: Storage
) -> TensorError | None:
    dtype = tensors[name].spec.dtype
    expected = {"nf4": "U8", "fp8": "F8_E4M3"}[storage]
    if dtype != expected:
        return TensorError(name, f"{dtype} beside {storage} companions", expected=expected)
    if storage != "nf4":
        return None
    required = ["absmax", "quant_map", NF4_STATE]
    if any(f"{name}.{part}" in tensors for part in ("nested_absmax", "nested_quant_map")):
        required += ["nested_absmax", "nested_quant_map"]
    missing = [part for part in required if f"{name}.{part}" not in tensors]
    if not missing:
        return None
    return TensorError(
        name,
        f"packed, but {name}.{missing[0]} is missing",
        hint="it cannot be decoded: start from the original checkpoint",
    )
