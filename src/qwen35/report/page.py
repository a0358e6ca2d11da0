"""report.html from the content of report.json: one file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from qwen35.report.charts import SERIES, distribution_chart, short_names, size_chart

__all__ = ["page"]


def page(report: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        report: what report.json holds.

    Raises:
        UsageError: Matplotlib is not installed.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    rows = report["candidates"]
    source = resources.files("qwen35.report").joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    charts = []
    if rows:  # Matplotlib escapes the text that it draws
        charts = [Markup(size_chart(rows)), Markup(distribution_chart(rows, report["bins"]))]  # noqa: S704
    return environment.from_string(source).render(
        report=report,
        charts=charts,
        short=short_names([row["name"] for row in rows]),
        series=SERIES,
    )
