"""Matplotlib figures as inline SVG in the page's colours, so that they follow its theme.

Matplotlib has no CSS variables, so it draws in placeholder colours that are replaced afterwards.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from typing import Any

from qwen35.errors import UsageError, extra_hint
from qwen35.reporting.marks import COLOURS

__all__ = ["INK", "PAPER", "RULE", "SERIES", "matplotlib_figure", "settle", "style", "svg"]

INK, RULE, PAPER = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0101{i:02x}" for i in range(0x10, 0x10 + COLOURS))

_POINTS = 72
"""Pixels per inch of SVG files: a pixel is a point."""

_STYLE = {
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it is selectable and takes the page's font
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


def matplotlib_figure() -> Any:
    """Return a function that makes Matplotlib's `Figure`, which needs no display.

    Raises:
        UsageError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        found = f"{error.name} is not installed"
        raise UsageError("charts", found, hint=extra_hint("eval")) from error
    return partial(Figure, dpi=_POINTS, layout="constrained")


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Draw in the page's style; a fixed salt makes element ids the same in every run."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        # names may be in any script: the browser has fonts for it
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def settle(figure: Any) -> None:
    """Fix the places of a figure's axes, so that positions asked for now stay true."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def svg(figure: Any, label: str) -> str:
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
        (INK, "ink"),
        (RULE, "rule"),
        (PAPER, "paper"),
        *((colour, f"series-{i}") for i, colour in enumerate(SERIES)),
    ):
        text = text.replace(colour, f"var(--{name})")
    return text
