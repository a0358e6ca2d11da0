"""The plan and the result of tuning, as text and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen35.display import printable, size
from qwen35.planning.layers import spell_layers
from qwen35.table import described_lines
from qwen35.tuning.measurements import Measurements
from qwen35.tuning.prices import FEW_TOKENS, few_experts
from qwen35.tuning.pricing_plan import PricingPlan
from qwen35.tuning.recipe_search import TunedRecipe, TuningBudget, shares
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import names_of

__all__ = ["plan_text", "tuned_json", "tuned_text"]


def plan_text(
    space: ChoiceSpace, budget: TuningBudget, plan: PricingPlan, probes: int, hessians: int = 0
) -> tuple[str, dict[str, Any]]:
    """Return what a run would measure, as text and as plain values for JSON.

    Args:
        space: the choices.
        budget: the limit.
        plan: of the passes that measure prices.
        probes: most models to measure as a check.
        hessians: bytes that Hessians take in memory afterwards; 0 for plain codes.
    """
    exact = {unit.name: space.exact for unit in space.units}
    count = space.active if budget.active else space.size
    least, most = count(space.smallest), count(exact)
    value = {
        "units": len(space.units),
        "windows": plan.windows,
        "memory": max(plan.memory, hessians),
        "disk": plan.disk,
        "read_bytes": plan.read_bytes,
        "probes": probes,
        "smallest": least,
        "exact": most,
        "budget": budget.nbytes,
        "active": budget.active,
    }
    kinds = ", ".join(names_of(space.units))
    what = "bytes read per token" if budget.active else "weight files"
    lines = [
        f"{len(space.units)} units, each with its own type: {kinds}",
        f"prices from at most {plan.windows} chunks of {plan.length + 1} tokens, once forward and "
        "once back",
        f"read {size(plan.read_bytes)}, and every weight once more for its types",
        f"memory about {size(plan.memory)}; disk at most {size(plan.disk)} meanwhile",
        f"{what} from {size(least)} to {size(most)}",
    ]
    if hessians:
        lines.append(f"then some rows with refined codes; Hessians take about {size(hessians)}")
    if plan.sizes.wide:
        lines.insert(3, "experts are read one by one")
    if probes:
        lines.append(f"{probes} probes; each temporarily writes about {size(space.size(exact))}")
    if budget.nbytes is not None:
        bits = _bits(space, budget.nbytes, active=budget.active)
        lines.append(f"budget {size(budget.nbytes)}, {bits:.3f} bits per weight")
    return "\n".join(lines), value


def _bits(space: ChoiceSpace, nbytes: int, *, active: bool = False) -> float:
    return 8 * nbytes / (space.active_weights if active else space.weights)


def tuned_json(
    space: ChoiceSpace, tuned: TunedRecipe, measured: Measurements, engine: str
) -> dict[str, Any]:
    """Return a result as plain values."""
    return {
        "format": space.format,
        "engine": engine,
        "bytes": tuned.nbytes,
        "bits_per_weight": _bits(space, tuned.nbytes),
        "active_bytes": tuned.active,
        "active_bits_per_weight": _bits(space, tuned.active, active=True),
        "active": tuned.by_active,
        "predicted_kld": tuned.predicted,
        "measured_kld": tuned.kld,
        "probes": [
            {"group": one.name or None, "predicted_kld": one.predicted, "measured_kld": one.kld}
            for one in tuned.checks
        ],
        "rank_correlation": tuned.rank,
        "priced_as": measured.origin or None,
        "codes": "plain" if measured.refined is None else "refined",
        "sample": measured.key.sample,
        "few_tokens": few_experts(measured.prices.experts),
        "chosen": dict(tuned.chosen),
        "front": [{"bytes": b, "predicted_kld": k} for b, k in tuned.front],
    }


def tuned_text(
    space: ChoiceSpace,
    tuned: TunedRecipe,
    measured: Measurements,
    recipe: Path,
    width: int | None = None,
) -> str:
    """Render a result: a row per kind of unit, then size and divergence."""
    of_kind = shares(tuned.costs, tuned.chosen)
    rows = []
    for kind, cell in _cells(space, tuned).items():
        share = of_kind[kind] / tuned.predicted if tuned.predicted else 0.0
        rows.append((kind, f"{100 * share:>11.1f} %", cell))
    lines = described_lines(("role", "share of loss", "types"), rows, width)
    lines += ["", f"{size(tuned.nbytes)}, {_bits(space, tuned.nbytes):.3f} bits per weight"]
    if tuned.by_active or space.checkpoint.config.moe:
        bits = _bits(space, tuned.active, active=True)
        lines.append(f"{size(tuned.active)} read per token, {bits:.3f} bits per weight of these")
    lines += [*_divergence(tuned), *price_notes(measured)]
    codes = "" if measured.refined is None else " --codes refined"
    lines += ["", f"{recipe}: use it as --recipe {recipe}{space.needs}{codes}"]
    return "\n".join(lines)


def _divergence(tuned: TunedRecipe) -> Iterator[str]:
    said = f"mean divergence {tuned.predicted:.6f} nats predicted"
    yield said if tuned.kld is None else f"{said}, {tuned.kld:.6f} measured"
    for check in tuned.checks[1:]:
        yield f"  {check.name} alone: {check.predicted:.6f} predicted, {check.kld:.6f} measured"
    if tuned.rank is not None:
        yield f"rank correlation of predicted and measured: {tuned.rank:.2f}"


def price_notes(measured: Measurements) -> Iterator[str]:
    """Yield what makes prices less certain than they look."""
    key, prices = measured.key, measured.prices
    if measured.origin:
        yield f"the prices are those of {printable(measured.origin)}"
    if measured.refined is not None:
        yield "the prices are those of refined codes"
    if key.sample > 1:
        yield f"types were compared on one row in {key.sample}"
    few = few_experts(prices.experts)
    # Of one stack in each layer: the others saw the same tokens.
    layers = {unit.partition("@")[2]: unit for unit in prices.experts}
    count = sum(few.get(unit, 0) for unit in layers.values())
    if count:
        of = sum(len(prices.experts[unit].tokens) for unit in layers.values())
        yield (
            f"{count:,} of {of:,} experts saw fewer than {FEW_TOKENS} tokens, and have the price "
            "per token of their layer"
        )


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
