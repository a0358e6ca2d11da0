"""Charts of an evaluation: loss over size, its spread over tokens, and along the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from qwen35.display import cut, printable, size
from qwen35.reporting.chart_labels import Box, Label, place_labels
from qwen35.reporting.marks import Mark, mark
from qwen35.reporting.ranking import RankedModel, Ranking, error_of, nats
from qwen35.reporting.svg_figure import (
    INK,
    PAPER,
    RULE,
    SERIES,
    matplotlib_figure,
    settle,
    style,
    svg,
)

__all__ = ["EvaluationChart", "evaluation_charts"]

_WIDTH = 4.6
_LEAST = 1e-9
"""Zero, on a logarithmic axis."""

_LONGEST = 22
"""Characters of a name in a chart; the table has it whole."""

_NARROW = 5.0
"""Losses closer to each other than this have a linear axis: a logarithmic one had no numbers."""

_HALF_MARK = 6.0
"""Half the width of a mark and its edge, in points."""

_QUANTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True)
class EvaluationChart:
    """A chart.

    Args:
        name: its id in the page.
        svg: an SVG element.
        caption: how to read it.
        hover: what the page's script shows under the pointer; places are shares of width and height
            from the upper left corner.
    """

    name: str
    svg: str
    caption: str
    hover: dict[str, Any]


def evaluation_charts(ranking: Ranking) -> list[EvaluationChart]:
    """Draw what the figures allow."""
    charts = []
    sized = [row for row in ranking.models if row.model.nbytes is not None]
    if len(sized) > 1:
        charts.append(_size_chart(sized))
    spread = [row for row in ranking.models if row.model.percentiles]
    if spread:
        charts.append(_spread_chart(spread))
    traced = [row for row in ranking.models if row.model.along]
    if traced:
        charts.append(_text_chart(traced))
    return charts


def _kld(row: RankedModel) -> float:
    return max(row.model.kld.value, _LEAST)


def _name(row: RankedModel) -> str:
    return cut(printable(row.label), _LONGEST)


def _drawn(one: Mark, *, filled: bool = True) -> dict[str, Any]:
    """Return Matplotlib's options for a mark."""
    from matplotlib.path import Path

    corners = np.array([*one.shape, one.shape[0]])
    colour = SERIES[one.colour]
    return {
        "marker": Path(corners, closed=True),
        "color": colour,
        "markerfacecolor": colour if filled else PAPER,
        "markeredgecolor": colour,
        "markeredgewidth": 1.3,
        "linestyle": "none",
    }


def _plain_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _share(figure: Any, x: float, y: float) -> list[float]:
    """Return a place in pixels as shares of width and height, y downwards."""
    width, height = figure.bbox.width, figure.bbox.height
    return [round(x / width, 4), round(1 - y / height, 4)]


# --- loss over size


def _size_chart(rows: Sequence[RankedModel]) -> EvaluationChart:
    largest = max(row.model.nbytes or 0 for row in rows)
    unit, factor = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    places = [((row.model.nbytes or 0) / factor, _kld(row)) for row in rows]
    with style("size"):
        figure = matplotlib_figure()(figsize=(_WIDTH, 3.7))
        axes = figure.subplots()
        losses = [kld for _, kld in places]
        if max(losses) > _NARROW * min(losses):
            axes.set_yscale("log")
        joined = sorted(place for place, row in zip(places, rows, strict=True) if row.front)
        axes.plot(*zip(*joined, strict=True), color=RULE, linewidth=2, zorder=1)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            look = _drawn(mark(row.place - 1), filled=row.front)
            axes.plot(
                *([value] for value in place), markersize=8, zorder=3, gid=f"point-{i}", **look
            )
        axes.margins(x=0.14, y=0.16)
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        _plain_axis(axes.yaxis)
        axes.set_xlabel(f"size, {unit}")
        axes.set_ylabel("mean KLD, nats per token")
        settle(figure)
        pixels = [tuple(axes.transData.transform(place)) for place in places]
        short = _write_names(figure, axes, rows, pixels)
        text = svg(figure, f"Mean KL divergence over file size: {_points(rows)}")
        spots = [[*_share(figure, *xy), _said(row)] for xy, row in zip(pixels, rows, strict=True)]
    for i, row in enumerate(rows):  # what browsers show without the page's script
        here = f'<g id="point-{i}">'
        text = text.replace(here, f"{here}<title>{escape(_said(row))}</title>")
    caption = (
        "Loss over size: lower left is better. Filled marks, joined by the line, are the front: no "
        f"other candidate is both smaller and closer.{' Numbers: places above.' if short else ''}"
    )
    return EvaluationChart("size", text, caption, {"spots": spots})


def _points(rows: Sequence[RankedModel]) -> str:
    return ", ".join(
        f"{row.label} {size(row.model.nbytes or 0)} {nats(row.model.kld.value)} nats"
        for row in rows
    )


def _said(row: RankedModel) -> str:
    model = row.model
    lines = [row.label, f"{nats(model.kld.value)} ± {error_of(model.kld.value, model.error)} nats"]
    if model.nbytes is not None:
        lines.append(size(model.nbytes))
    if model.same_top is not None:
        lines.append(f"same top token {100 * model.same_top:.2f} %")
    return "\n".join(lines)


def _write_names(
    figure: Any, axes: Any, rows: Sequence[RankedModel], pixels: Sequence[tuple[float, float]]
) -> bool:
    """Write each name beside its point, or its place in the table, or nothing, as there is room.

    Returns whether some are places.
    """
    probe = axes.text(0, 0, "Xg")
    height = probe.get_window_extent().height * 1.15
    order = sorted(range(len(rows)), key=lambda i: (not rows[i].front, rows[i].place))
    texts = []
    for i in order:
        choices = []
        for text in (_name(rows[i]), str(rows[i].place)):
            probe.set_text(text)
            choices.append((text, probe.get_window_extent().width * 1.06))
        texts.append(choices)
    probe.remove()
    area = axes.get_window_extent()
    room = Box(area.x0, area.y0, figure.bbox.x1, figure.bbox.y1)
    labels = place_labels([pixels[i] for i in order], texts, height, room, _HALF_MARK)
    for i, label in zip(order, labels, strict=True):
        if label is not None:
            _write(axes, label, pixels[i], f"label-{i}")
    return any(
        label and label.text != _name(rows[i]) for i, label in zip(order, labels, strict=True)
    )


def _write(axes: Any, label: Label, point: tuple[float, float], name: str) -> None:
    line = {"arrowstyle": "-", "color": RULE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
    axes.annotate(
        label.text,
        point,
        xycoords="figure pixels",
        xytext=label.centre,
        textcoords="figure pixels",
        ha="center",
        va="center",
        arrowprops=line if label.leader else None,
        annotation_clip=False,
        gid=name,
    )


# --- its spread over tokens


def _spread_chart(rows: Sequence[RankedModel]) -> EvaluationChart:
    values = [max(v, _LEAST) for row in rows for q, v in row.model.percentiles.items() if q >= 50]
    lowest = min([v for v in values if v > _LEAST], default=_LEAST)
    with style("spread"):
        figure = matplotlib_figure()(figsize=(_WIDTH, 0.95 + 0.24 * len(rows)))
        axes = figure.subplots()
        axes.set_xscale("log")
        for y, row in enumerate(rows):
            _spread_row(axes, y, row, lowest)
        axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        _plain_axis(axes.xaxis)
        axes.set_xlabel("KLD of a token, nats")
        settle(figure)
        spots = [
            spot
            for y, row in enumerate(rows)
            for spot in _spread_spots(figure, axes, y, row, lowest)
        ]
        half = [
            f"{row.label} {nats(m)} nats"
            for row in rows
            if (m := row.model.percentiles.get(50.0)) is not None
        ]
        label = "KL divergence of single tokens, a row for each candidate"
        text = svg(figure, f"{label}; half of the tokens are below: {', '.join(half)}")
    caption = (
        "Loss of single tokens: half of them lie below the mark, 90 % below the end of the thick "
        "line, 99 % below the tick; the dot is the largest."
    )
    return EvaluationChart("spread", text, caption, {"spots": spots})


def _quantiles(row: RankedModel, lowest: float) -> dict[float, float]:
    """Return those that are drawn, with the largest as 100."""
    found = row.model.percentiles
    drawn = {q: max(found[q], lowest) for q in _QUANTILES if q in found}
    if row.model.maximum is not None:
        drawn[100.0] = max(row.model.maximum, lowest)
    return drawn


def _spread_row(axes: Any, y: int, row: RankedModel, lowest: float) -> None:
    drawn, one = _quantiles(row, lowest), mark(row.place - 1)
    colour = SERIES[one.colour]
    if drawn:
        axes.plot([min(drawn.values()), max(drawn.values())], [y, y], color=colour, linewidth=1)
    if 50.0 in drawn and 90.0 in drawn:
        ends = [drawn[50.0], drawn[90.0]]
        axes.plot(ends, [y, y], color=colour, linewidth=4, solid_capstyle="butt")
    if 99.0 in drawn:
        axes.plot([drawn[99.0]], [y], marker="|", markersize=9, color=colour, markeredgewidth=2)
    if 100.0 in drawn:
        axes.plot([drawn[100.0]], [y], marker="o", markersize=3, color=colour)
    if 50.0 in drawn:
        axes.plot([drawn[50.0]], [y], markersize=7, zorder=3, **_drawn(one))


def _spread_spots(
    figure: Any, axes: Any, y: int, row: RankedModel, lowest: float
) -> list[list[Any]]:
    spots = []
    for q, value in _quantiles(row, lowest).items():
        exact = row.model.maximum if q == 100.0 else row.model.percentiles[q]
        what = "largest" if q == 100.0 else f"{q:g} % of tokens below"
        text = f"{row.label}\n{what}: {nats(exact or 0.0)} nats"
        spots.append([*_share(figure, *axes.transData.transform((value, y))), text])
    return spots


# --- along the text


def _text_chart(rows: Sequence[RankedModel]) -> EvaluationChart:
    heights = [_relative(row.model.along) for row in rows]
    with style("along"):
        figure = matplotlib_figure()(figsize=(_WIDTH, 0.75 + 0.3 * len(rows)))
        figure.get_layout_engine().set(hspace=0.0, h_pad=0.01)
        grid = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, row, relative in zip(grid, rows, heights, strict=True):
            _text_row(axes, row, relative)
        grid[0].set_ylim(0, max(float(relative.max()) for relative in heights) * 1.05)
        grid[-1].set_xlim(0, 100)
        grid[-1].tick_params(axis="x", length=3)
        grid[-1].set_xlabel("place in the text, %")
        settle(figure)
        bounds = [axes.get_window_extent() for axes in grid]
        tracks = [
            [
                _share(figure, 0, b.y1)[1],
                _share(figure, 0, b.y0)[1],
                row.label,
                list(row.model.along),
            ]
            for b, row in zip(bounds, rows, strict=True)
        ]
        ends = [_share(figure, bounds[0].x0, 0)[0], _share(figure, bounds[0].x1, 0)[0]]
        most = [f"{row.label} {nats(max(row.model.along))} nats" for row in rows]
        label = "Mean KL divergence along the text, a row for each candidate; largest: "
        text = svg(figure, label + ", ".join(most))
    windows = max(len(row.model.along) for row in rows)
    caption = (
        f"Loss along the text, mean of each of {windows} windows. Each row is relative to its own "
        "mean, the line: peaks are places that cost this candidate more."
    )
    return EvaluationChart("along", text, caption, {"tracks": tracks, "ends": ends})


def _relative(along: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.maximum(np.array(along, np.float64), 0.0)
    return values / (values.mean() or 1.0)


def _text_row(axes: Any, row: RankedModel, relative: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    colour = SERIES[mark(row.place - 1).colour]
    edges = np.linspace(0, 100, len(relative) + 1)
    axes.stairs(relative, edges, fill=True, color=colour, alpha=0.4, linewidth=0)
    axes.stairs(relative, edges, baseline=None, color=colour, linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.6)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(_name(row), rotation=0, ha="right", va="center")
    axes.spines["left"].set_visible(False)
