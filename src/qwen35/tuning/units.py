"""Units of allocation: weights that get one type together, and the bytes of each choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Allocation", "Unit", "names_of"]

Allocation = Mapping[str, str]
"""Unit to its choice."""


@dataclass(frozen=True)
class Unit:
    """Weights that must be stored in the same type.

    Args:
        name: ``role`` or ``role@layer``.
        roles: one role, or those that engines join into one matrix.
        layer: of all its weights; None outside the layers.
        numel: number of weights.
        sizes: choice to bytes, in the order of the choices.
    """

    name: str
    roles: tuple[str, ...]
    layer: int | None
    numel: int
    sizes: Mapping[str, int]

    @property
    def kind(self) -> str:
        """The name without the layer."""
        return self.name.partition("@")[0]


def names_of(units: Sequence[Unit]) -> Iterator[str]:
    """Yield the distinct kinds of units, in order."""
    yield from dict.fromkeys(unit.kind for unit in units)
