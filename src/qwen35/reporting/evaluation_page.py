"""report.html from the content of report.json: one file without scripts or network requests."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from qwen35.reporting.charts import SERIES, distribution_chart, short_names, size_chart

__all__ = ["page"]


def page(report: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        report: the content of report.json.

    Raises:
        UsageError: Matplotlib is not installed.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    rows = report["candidates"]
    package = resources.files("qwen35.reporting")
    source = package.joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = _visible
    names = short_names([row["name"] for row in rows], report["base"]["name"])
    charts = []
    if rows:  # safe as Markup: Matplotlib escapes text
        charts.append(Markup(size_chart(rows, names)))  # noqa: S704
        charts.append(Markup(distribution_chart(rows, names, report["bins"])))  # noqa: S704
    return environment.from_string(source).render(
        report=report,
        style=Markup(package.joinpath("style.css").read_text("utf-8")),  # noqa: S704
        charts=charts,
        series=SERIES,
    )


def _visible(text: str) -> str:
    r"""Make white space in a token visible.

    >>> _visible(" a"), _visible("\n")
    ('␣a', '⏎')
    """
    return text.replace(" ", "␣").replace("\t", "⇥").replace("\n", "⏎")
