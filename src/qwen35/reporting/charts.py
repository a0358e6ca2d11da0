"""SVG charts, drawn by Matplotlib in the page's colours, so that they follow its theme.

Matplotlib has no CSS variables, so it draws in placeholder colours that are replaced afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import takewhile
from typing import Any

from qwen35.errors import UsageError

__all__ = [
    "SERIES",
    "distribution_chart",
    "front_chart",
    "matplotlib_figure",
    "sensitivity_chart",
    "short_names",
    "size_chart",
]

SERIES = 8
"""Number of colours; a ninth candidate repeats the first with another dash pattern."""

_INK, _RULE = "#010203", "#010204"
_COLOURS = tuple(f"#0101{i:02x}" for i in range(0x10, 0x10 + SERIES))
_DASHES = ("-", "--", ":")
_MARKS = "os^Dv<>p"
_SIZE = (4.6, 3.3)
_STYLE = {
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it is selectable and takes the page's font
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def matplotlib_figure() -> Any:
    """Return Matplotlib's `Figure`, which needs no display.

    Raises:
        UsageError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "--report", f"{error.name} is not installed", hint="pip install 'qwen35[eval]'"
        ) from error
    return Figure


def short_names(names: Sequence[str], base: str) -> list[str]:
    """Remove the base's name, and the common prefix of all names up to its last hyphen.

    >>> short_names(["Qwen3.5-4B-Q8_0", "Qwen3.5-4B-FP8"], "Qwen3.5-4B-F16")
    ['Q8_0', 'FP8']
    >>> short_names(["nf4", "tiny-Q8_0"], "tiny")
    ['nf4', 'Q8_0']
    """
    names = [name.removeprefix(f"{base}-") or name for name in names]
    if len(names) < 2:
        return names
    common = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))))
    cut = names[0][:common].rfind("-") + 1
    return [name[cut:] or name for name in names]


def size_chart(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Draw mean divergence over bytes, the Pareto front as a line; rows of report.json."""
    import matplotlib as mpl
    from matplotlib.ticker import FuncFormatter, NullFormatter

    sizes, unit = _units([row["bytes"] for row in rows])
    klds = [max(row["figures"]["kld"]["value"], 1e-9) for row in rows]  # the axis is logarithmic
    # A fixed salt makes element ids, and so the file, the same in every run.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "size"}):
        figure = matplotlib_figure()(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        front = sorted((s, k) for s, k, row in zip(sizes, klds, rows, strict=True) if row["front"])
        axes.plot(*zip(*front, strict=True), color=_RULE, linewidth=2, zorder=1)
        order = sorted(range(len(rows)), key=lambda i: (sizes[i], klds[i]))
        for place, i in enumerate(order):
            colour, on_front = _COLOURS[i % SERIES], rows[i]["front"]
            face = colour if on_front else "none"
            axes.plot(
                [sizes[i]], [klds[i]], _MARKS[i % SERIES], color=colour, markerfacecolor=face,
                markersize=8, zorder=2, gid=f"point-{i}",
            )  # fmt: skip
            # Labels alternate above and below, so that neighbours do not overlap.
            axes.annotate(
                names[i], (sizes[i], klds[i]), xytext=(0, 8 if place % 2 == 0 else -17),
                textcoords="offset points", ha="center", color=_INK,
            )  # fmt: skip
        axes.margins(x=0.18, y=0.2)
        axes.grid(visible=True, axis="y")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"size, {unit}")
        axes.set_ylabel("mean KLD, nats per token")
        points = [
            f"{n} {s:.3g} {unit} {k:.3g} nats" for n, s, k in zip(names, sizes, klds, strict=True)
        ]
        return _svg(figure, f"Mean KL divergence over file size: {', '.join(points)}")


def _units(sizes: Sequence[int]) -> tuple[list[float], str]:
    unit, factor = ("GB", 1e9) if max(sizes) >= 1e9 else ("MB", 1e6)
    return [size / factor for size in sizes], unit


def distribution_chart(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], bins: Sequence[float]
) -> str:
    """Draw a histogram of tokens over the logarithm of divergence; rows of report.json."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": "distribution"}):
        figure = matplotlib_figure()(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            counts, total = row["distribution"], max(1, sum(row["distribution"]))
            axes.stairs(
                [100 * count / total for count in counts], bins, label=name, linewidth=1.8,
                color=_COLOURS[i % SERIES], linestyle=_DASHES[i // SERIES % 3], baseline=None,
            )  # fmt: skip
        held = [j for row in rows for j, count in enumerate(row["distribution"]) if count]
        axes.set_xlim(bins[max(0, min(held) - 1)], bins[min(len(bins) - 1, max(held) + 2)])
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, axis="y")
        axes.set_xlabel("KLD of a token, nats")
        axes.set_ylabel("tokens, %")
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.6, columnspacing=1.2)
        medians = [row["figures"]["percentiles"].get("50") for row in rows]
        half = [f"{n} {m:.2g} nats" for n, m in zip(names, medians, strict=True) if m is not None]
        label = "Share of tokens by KL divergence, one line per candidate"
        return _svg(figure, f"{label}; half of the tokens are below: {', '.join(half)}")


def sensitivity_chart(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """Draw a disc per unit, by layer and kind, with its cost as area; rows of tune.json."""
    import matplotlib as mpl

    largest = max((row["nats_per_million"] for row in rows), default=0.0) or 1.0
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "sensitivity"}):
        figure = matplotlib_figure()(figsize=(4.6, 0.7 + 0.26 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        for row in rows:
            place = -1 if row["layer"] is None else row["layer"]
            area = 110 * row["nats_per_million"] / largest
            axes.scatter([place], [kinds.index(row["kind"])], s=area + 1, color=_COLOURS[0])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("layer (left of 0: outside the layers)")
        cost = dict.fromkeys(kinds, 0.0)
        for row in rows:
            cost[row["kind"]] = max(cost[row["kind"]], row["nats_per_million"])
        highest = sorted(cost, key=lambda kind: -cost[kind])[:3]
        label = "Cost of the smallest type by role and layer, in nats per million weights"
        return _svg(figure, f"{label}; highest in {', '.join(highest)}")


def front_chart(value: Mapping[str, Any]) -> str:
    """Draw predicted divergence over size and mark the chosen recipe; value of tune.json."""
    import matplotlib as mpl
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in value["front"] if row["predicted_kld"] > 0]
    sizes, unit = _units([*(row["bytes"] for row in rows), value["bytes"]])
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "front"}):
        figure = matplotlib_figure()(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.plot(sizes[:-1], [r["predicted_kld"] for r in rows], color=_COLOURS[0], linewidth=1.8)
        if value["measured_kld"]:
            axes.plot([sizes[-1]], [value["measured_kld"]], "o", color=_COLOURS[1], markersize=8)
        axes.grid(visible=True, axis="y")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"size, {unit}")
        axes.set_ylabel("mean KLD, nats per token")
        ends = [
            f"{s:.3g} {unit} {r['predicted_kld']:.2g} nats"
            for s, r in zip(sizes, rows, strict=False)
        ]
        label = "Predicted mean KL divergence of the best allocation of each size"
        return _svg(figure, f"{label}: from {ends[0]} to {ends[-1]}" if ends else label)


def _svg(figure: Any, label: str) -> str:
    """Return a figure as an inline SVG element that scales and uses the page's colours."""
    # Without date and creator the same run gives the same bytes.
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for colour, name in (
        (_INK, "ink"),
        (_RULE, "rule"),
        *((colour, f"series-{i}") for i, colour in enumerate(_COLOURS)),
    ):
        text = text.replace(colour, f"var(--{name})")
    return text
