"""The plan and the result of tuning, as text and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from qwen35.display import size
from qwen35.planning.layers import spell_layers
from qwen35.table import described_lines
from qwen35.tuning.fit import group_units
from qwen35.tuning.probing import probe_choices
from qwen35.tuning.recipe_search import TunedRecipe, TuningBudget, shares
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import names_of

__all__ = ["plan_text", "tuned_json", "tuned_text"]


def plan_text(space: ChoiceSpace, budget: TuningBudget, probes: int) -> tuple[str, dict[str, Any]]:
    """Return what a run would measure, as text and as plain values for JSON."""
    groups = group_units(space.units, probes) if probes else []
    count = sum(len(probe_choices(space, group)) for group in groups)
    exact = {unit.name: space.exact for unit in space.units}
    least, most = space.size(space.smallest), space.size(exact)
    value = {
        "units": len(space.units),
        "groups": len(groups),
        "probes": count,
        "smallest": least,
        "exact": most,
        "budget": budget.nbytes,
    }
    kinds = ", ".join(names_of(space.units))
    lines = [
        f"{len(space.units)} units, each with its own type: {kinds}",
        f"{count} probes of {len(groups)} groups; each temporarily writes about {size(most)}",
        f"weight files from {size(least)} to {size(most)}",
    ]
    if budget.nbytes is not None:
        lines.append(
            f"budget {size(budget.nbytes)}, {_bits(space, budget.nbytes):.3f} bits per weight"
        )
    return "\n".join(lines), value


def _bits(space: ChoiceSpace, nbytes: int) -> float:
    return 8 * nbytes / space.weights


def tuned_json(space: ChoiceSpace, tuned: TunedRecipe) -> dict[str, Any]:
    """Return a result as plain values for JSON."""
    return {
        "format": space.format,
        "bytes": tuned.nbytes,
        "bits_per_weight": _bits(space, tuned.nbytes),
        "predicted_kld": tuned.predicted if tuned.kld is not None else None,
        "measured_kld": tuned.kld,
        "probes": tuned.probes,
        "rank_correlation": tuned.errors_rank,
        "measured_over_predicted": list(tuned.prediction),
        "chosen": dict(tuned.chosen),
        "front": [{"bytes": b, "predicted_kld": k} for b, k in tuned.front],
    }


def tuned_text(
    space: ChoiceSpace, tuned: TunedRecipe, recipe: Path, width: int | None = None
) -> str:
    """Render a result: a row per kind of unit, then size and divergence."""
    of_kind = shares(tuned.fitted, tuned.chosen)
    rows = []
    for kind, cell in _cells(space, tuned).items():
        share = of_kind[kind] / tuned.predicted if tuned.predicted else 0.0
        rows.append((kind, f"{100 * share:>11.1f} %", cell))
    lines = described_lines(("role", "share of loss", "types"), rows, width)
    lines += ["", f"{size(tuned.nbytes)}, {_bits(space, tuned.nbytes):.3f} bits per weight"]
    if tuned.kld is None:
        lines.append("no divergence measured: chosen by squared errors alone")
    else:
        lines.append(
            f"mean divergence {tuned.kld:.6f} nats measured, {tuned.predicted:.6f} predicted "
            f"from {tuned.probes} probes"
        )
    if tuned.errors_rank is not None:
        lines.append(
            f"rank correlation of squared error and measured divergence: {tuned.errors_rank:.2f}"
        )
    lines += ["", f"{recipe}: use it as --recipe {recipe}"]
    return "\n".join(lines)


def _cells(space: ChoiceSpace, tuned: TunedRecipe) -> dict[str, str]:
    """Return each kind's most common type, and the layers with other types."""
    layers: dict[str, dict[str, list[int | None]]] = defaultdict(lambda: defaultdict(list))
    for unit in space.units:
        layers[unit.kind][tuned.chosen[unit.name]].append(unit.layer)
    cells = {}
    for kind, by_choice in layers.items():
        counts = Counter({choice: len(members) for choice, members in by_choice.items()})
        [(usual, _)] = counts.most_common(1)
        others = [
            f"{choice} in {spell_layers(layer for layer in members if layer is not None)}"
            for choice, members in by_choice.items()
            if choice != usual
        ]
        cells[kind] = "; ".join([usual, *others])
    return cells
