"""Charts of a tuning: the price of each unit, and the predicted loss over size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen35.reporting.svg_figure import SERIES, matplotlib_figure, style, svg

__all__ = ["front_chart", "sensitivity_chart"]

_SIZE = (4.6, 3.3)


def _units(sizes: Sequence[int]) -> tuple[list[float], str]:
    unit, factor = ("GB", 1e9) if max(sizes) >= 1e9 else ("MB", 1e6)
    return [size / factor for size in sizes], unit


def sensitivity_chart(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """Draw a disc per unit, by layer and kind, with its price as area; rows of tune.json."""
    largest = max((row["nats_per_million"] for row in rows), default=0.0) or 1.0
    with style("sensitivity"):
        figure = matplotlib_figure()(figsize=(4.6, 0.7 + 0.26 * len(kinds)))
        axes = figure.subplots()
        for row in rows:
            place = -1 if row["layer"] is None else row["layer"]
            area = 110 * row["nats_per_million"] / largest
            axes.scatter([place], [kinds.index(row["kind"])], s=area + 1, color=SERIES[0])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("layer (left of 0: outside the layers)")
        cost = dict.fromkeys(kinds, 0.0)
        for row in rows:
            cost[row["kind"]] = max(cost[row["kind"]], row["nats_per_million"])
        highest = sorted(cost, key=lambda kind: -cost[kind])[:3]
        label = "Price of the smallest type by role and layer, in nats per million weights"
        return svg(figure, f"{label}; highest in {', '.join(highest)}")


def front_chart(value: Mapping[str, Any]) -> str:
    """Draw predicted divergence over size and mark the chosen recipe; value of tune.json."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in value["front"] if row["predicted_kld"] > 0]
    own = value["active_bytes"] if value["active"] else value["bytes"]
    sizes, unit = _units([*(row["bytes"] for row in rows), own])
    with style("front"):
        figure = matplotlib_figure()(figsize=_SIZE)
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.plot(sizes[:-1], [r["predicted_kld"] for r in rows], color=SERIES[0], linewidth=1.8)
        kld = value["measured_kld"] or value["predicted_kld"]
        if kld > 0:
            axes.plot([sizes[-1]], [kld], "o", color=SERIES[1], markersize=8)
        axes.grid(visible=True, axis="y")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{'read per token' if value['active'] else 'size'}, {unit}")
        axes.set_ylabel("mean KLD, nats per token")
        ends = [
            f"{s:.3g} {unit} {r['predicted_kld']:.2g} nats"
            for s, r in zip(sizes, rows, strict=False)
        ]
        label = "Predicted mean KL divergence of the best allocation of each size"
        return svg(figure, f"{label}: from {ends[0]} to {ends[-1]}" if ends else label)
