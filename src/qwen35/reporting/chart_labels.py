"""Names beside the points of a chart, placed so that nothing is printed over anything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, hypot, pi, sin

__all__ = ["Box", "Label", "place_labels"]

_Point = tuple[float, float]

_EIGHTHS = (4, 12, 0, 8, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11)
_DIRECTIONS = tuple(i * pi / 8 for i in _EIGHTHS)
"""Above, below, right, left, and between them."""

_DISTANCES = (8.0, 14.0, 20.0, 28.0, 38.0, 50.0)
_NEAR = 8.0
"""Distances between a mark's centre and its name; a line joins them beyond the first."""

_STEPS = 40


@dataclass(frozen=True)
class Box:
    """A rectangle; y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Return whether the two have points in common."""
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.top <= other.bottom or other.top <= self.bottom)

    def has(self, point: _Point) -> bool:
        """Return whether a point is inside."""
        return self.left < point[0] < self.right and self.bottom < point[1] < self.top

    def away(self, point: _Point) -> float:
        """Return the distance to a point; 0 inside."""
        x = max(self.left - point[0], 0.0, point[0] - self.right)
        y = max(self.bottom - point[1], 0.0, point[1] - self.top)
        return hypot(x, y)

    def holds(self, other: Box) -> bool:
        """Return whether the other is inside."""
        wide = self.left <= other.left and other.right <= self.right
        return wide and self.bottom <= other.bottom and other.top <= self.top


@dataclass(frozen=True)
class Label:
    """A placed text.

    Args:
        text: the name, or the shorter text where that has no room.
        centre: of the text.
        leader: whether it is so far from its point that a line should join them.
    """

    text: str
    centre: _Point
    leader: bool


def place_labels(
    points: Sequence[_Point],
    texts: Sequence[Sequence[tuple[str, float]]],
    height: float,
    area: Box,
    mark: float,
) -> list[Label | None]:
    """Place the texts of points; the first points choose first.

    Args:
        points: centres of marks.
        texts: for each point, what may stand beside it with its width, the preferred one first.
        height: of a line of text.
        area: where labels may be.
        mark: half the width of a mark.

    Returns:
        A label for each point; None where nothing has room.
    """
    marks = [Box(x - mark, y - mark, x + mark, y + mark) for x, y in points]
    names: list[Box] = []
    lines: list[Sequence[_Point]] = []
    labels: list[Label | None] = []
    for i, choices in enumerate(texts):
        label = None
        for label, box in _options(points[i], choices, height):
            line = _line(points[i], label.centre, mark) if label.leader else ()
            others = [*marks[:i], *marks[i + 1 :], *names]
            free = area.holds(box) and not any(map(box.meets, [*others, marks[i]]))
            crossed = any(box.has(point) for other in lines for point in other)
            crossing = any(other.has(point) for other in others for point in line)
            if free and not crossed and not crossing and _is_clear(i, box, points, label):
                names.append(box)
                lines.append(line)
                break
        else:
            label = None
        labels.append(label)
    return labels


def _options(
    point: _Point, choices: Sequence[tuple[str, float]], height: float
) -> Iterator[tuple[Label, Box]]:
    for text, width in choices:
        for distance in _DISTANCES:
            for angle in _DIRECTIONS:
                # the nearest edge of the text, not its centre, is at this distance
                x = point[0] + cos(angle) * (distance + width / 2)
                y = point[1] + sin(angle) * (distance + height / 2)
                box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                yield Label(text, (x, y), distance > _NEAR), box


def _line(one: _Point, other: _Point, start: float) -> list[_Point]:
    """Return points along a line, from `start` beside `one`, closer than anything is wide."""
    x, y = other[0] - one[0], other[1] - one[1]
    first = min(1.0, start / (hypot(x, y) or 1.0))
    parts = [first + (1 - first) * i / _STEPS for i in range(_STEPS + 1)]
    return [(one[0] + part * x, one[1] + part * y) for part in parts]


def _is_clear(i: int, box: Box, points: Sequence[_Point], label: Label) -> bool:
    """Return whether a reader sees whose name it is: by a line, or as no other point is nearer."""
    own = box.away(points[i])
    return label.leader or all(box.away(p) > own for j, p in enumerate(points) if j != i)
