"""Marks of candidates: a colour and a shape each, so that neither is needed to tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

__all__ = ["COLOURS", "Mark", "mark"]

COLOURS = 8
"""Number of colours in style.css, as ``--series-0`` and so on."""

_Point = tuple[float, float]


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> list[_Point]:
    """Return a regular polygon, or a star whose other corners are at `inner` of the radius."""
    step = 2 if inner != 1.0 else 1
    count = corners * step
    radii = (inner if i % step else 1.0 for i in range(count))
    angles = (pi / 2 + turn + 2 * pi * i / count for i in range(count))
    return [(r * cos(a), r * sin(a)) for r, a in zip(radii, angles, strict=True)]


def _cross(turn: float, half: float = 0.32) -> list[_Point]:
    """Return a cross with arms of width 2 `half`."""
    corner = [(-half, 1.0), (half, 1.0), (half, half)]
    points = []
    for quarter in range(4):
        a = turn - quarter * pi / 2
        points += [(x * cos(a) - y * sin(a), x * sin(a) + y * cos(a)) for x, y in corner]
    return points


_SHAPES = (
    _polygon(24),
    _polygon(4, pi / 4),
    _polygon(3),
    _cross(0.0),
    _polygon(4),
    _polygon(3, pi),
    _polygon(5, inner=0.42),
    _cross(pi / 4),
)


@dataclass(frozen=True)
class Mark:
    """A candidate's mark.

    Args:
        colour: a number below `COLOURS`.
        shape: corners within the unit circle, y upwards.
    """

    colour: int
    shape: tuple[_Point, ...]

    @property
    def path(self) -> str:
        """The shape as data of an SVG path, y downwards."""
        return "M" + "L".join(f"{x:.2f} {-y:.2f}" for x, y in self.shape) + "Z"


def mark(place: int) -> Mark:
    """Return the mark of the candidate at a place, from 0; the first 64 are all different."""
    return Mark(place % COLOURS, tuple(_SHAPES[(place + place // COLOURS) % len(_SHAPES)]))
