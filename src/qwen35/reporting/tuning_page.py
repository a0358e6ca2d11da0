"""The report of a tuning: sensitivity of each unit, and divergence over size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import json_bytes
from qwen35.reporting.page_frame import render
from qwen35.reporting.report_files import write_files
from qwen35.reporting.tuning_charts import front_chart, sensitivity_chart
from qwen35.tuning.prices import ExpertPrices, shared_prices
from qwen35.tuning.recipe_search import TunedRecipe
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.tuning_display import price_notes, tuned_json
from qwen35.tuning.tuning_job import TuningResult
from qwen35.tuning.units import names_of

__all__ = ["TUNE_NAMES", "write_tuning"]

TUNE_NAMES = ("tune.json", "tune.html")


def write_tuning(folder: Path, result: TuningResult) -> None:
    """Write tune.json and tune.html into `folder`.

    Raises:
        OutputError: a file cannot be written.
    """
    space, tuned, measured = result.space, result.tuned, result.measured
    value = {
        "model": measured.name,
        "text": measured.key.text,
        "imatrix": measured.key.imatrix,
        "context": measured.key.context,
        "chunks": measured.key.chunks,
        "tool": measured.key.tool,
        **tuned_json(space, tuned, measured, result.engine),
        "sensitivity": _sensitivity(space, tuned),
        "experts": _experts(space, measured.prices.experts),
        "costs": tuned.costs,
    }
    notes = list(price_notes(measured))
    files = (json_bytes(value), _page(value, notes, space).encode())
    write_files(folder, dict(zip(TUNE_NAMES, files, strict=True)))


def _sensitivity(space: ChoiceSpace, tuned: TunedRecipe) -> list[dict[str, Any]]:
    """Return the cost of each unit's smallest choice, in nats per million weights."""
    rows = []
    for unit in space.units:
        smallest = min(unit.sizes, key=lambda choice: unit.sizes[choice])
        cost = tuned.costs[unit.name][smallest]
        rows.append(
            {
                "kind": unit.kind,
                "layer": unit.layer,
                "choice": smallest,
                "nats": cost,
                "nats_per_million": 1e6 * cost / unit.numel,
                "chosen": tuned.chosen[unit.name],
            }
        )
    return rows


def _experts(space: ChoiceSpace, experts: Mapping[str, ExpertPrices]) -> list[dict[str, Any]]:
    """Return coverage and prices of the experts of each unit, in its smallest type."""
    rows = []
    for unit in space.units:
        if unit.name not in experts:
            continue
        one, choice = experts[unit.name], next(iter(unit.sizes))
        rows.append(
            {
                "unit": unit.name,
                "choice": choice,
                "tokens": one.tokens,
                "nats": shared_prices(one.prices[choice], one.tokens),
            }
        )
    return rows


def _page(value: Mapping[str, Any], notes: Sequence[str], space: ChoiceSpace) -> str:
    from markupsafe import Markup

    rows: Sequence[Mapping[str, Any]] = value["sensitivity"]
    charts = [sensitivity_chart(rows, list(names_of(space.units))), front_chart(value)]
    drawn = [Markup(chart) for chart in charts]  # noqa: S704 - Matplotlib escapes text
    return render("tune.html.jinja", value=value, rows=rows, notes=notes, charts=drawn)
