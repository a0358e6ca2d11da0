"""report.html: one evaluation, or several compared, in one file without network requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwen35.display import size
from qwen35.reporting.evaluation_charts import evaluation_charts
from qwen35.reporting.marks import mark
from qwen35.reporting.page_frame import render
from qwen35.reporting.ranking import Ranking, error_of, nats, perplexity_change, rank
from qwen35.reporting.reported import parse_report

__all__ = ["page", "ranking_page"]

_HEAT = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Divergences of a token, in nats, from which on it is marked more strongly."""


def page(report: Mapping[str, Any]) -> str:
    """Render the page of one evaluation.

    Args:
        report: the content of report.json.

    Raises:
        UsageError: Matplotlib is not installed.
    """
    return ranking_page(rank([("", parse_report(report, "report.json"))]))


def ranking_page(ranking: Ranking) -> str:
    """Render the page of ranked candidates.

    Raises:
        UsageError: Matplotlib is not installed.
    """
    from markupsafe import Markup

    charts = [
        {
            "name": chart.name,
            "svg": Markup(chart.svg),  # noqa: S704 - Matplotlib escapes text
            "caption": chart.caption,
            "hover": json.dumps(chart.hover, ensure_ascii=False, separators=(",", ":")),
        }
        for chart in (evaluation_charts(ranking) if ranking.models else [])
    ]
    return render(
        "report.html.jinja",
        ranking=ranking,
        base=ranking.base,
        charts=charts,
        legend=[f"{limit:g}" for limit in _HEAT],
        mark=mark,
        nats=nats,
        change=perplexity_change,
        error_of=error_of,
        size=size,
        heat=_heat,
    )


def _heat(kld: float | None) -> int:
    """Return how strongly a token is marked, from 0 to 5; one that was not compared is not.

    >>> _heat(0.001), _heat(0.05), _heat(2.0)
    (0, 3, 5)
    """
    return sum(kld is not None and kld >= limit for limit in _HEAT)
