"""What can be decided: the units that get one type each, and what each choice takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Allocation", "Unit", "names_of"]

Allocation = Mapping[str, str]
"""Unit to the choice it gets."""


@dataclass(frozen=True)
class Unit:
    """Weights that must be stored alike.

    Args:
        name: ``role`` or ``role@layer``.
        roles: the roles in it: one, or those that engines join into one matrix.
        layer: of all its weights; None for what is in no layer.
        numel: its weights.
        sizes: choice to the bytes it takes, in the order of the choices.
    """

    name: str
    roles: tuple[str, ...]
    layer: int | None
    numel: int
    sizes: Mapping[str, int]

    @property
    def kind(self) -> str:
        """What it is, whatever its layer."""
        return self.name.partition("@")[0]


def names_of(units: Sequence[Unit]) -> Iterator[str]:
    """Yield the kinds of units, each once, in order."""
    yield from dict.fromkeys(unit.kind for unit in units)
