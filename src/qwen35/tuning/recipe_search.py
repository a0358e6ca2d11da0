"""From a budget to a recipe: errors, probes, fit, solution, and a last look at the truth."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean

from qwen35.errors import UsageError
from qwen35.progress import Progress, Silent
from qwen35.tuning.fit import CostFit, Probe, UnitGroup, fit, group_units, rank_correlation
from qwen35.tuning.measurements import MeasuredTrial, Measurements
from qwen35.tuning.probing import ProbeLab, ProbeSetting, opened, probe_choices
from qwen35.tuning.solve import KnapsackSolution, cheapest, nearest
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import Allocation

__all__ = ["TunedRecipe", "TuningBudget", "tune"]

_FRONT = 24
_SMOOTHING = (0.0, 0.5, 1.0)
"""How far the slopes of a kind are drawn to their mean, in the solutions that are compared."""

_ROUNDS = 5
_MARGIN = 0.98


@dataclass(frozen=True)
class TuningBudget:
    """What must be kept to: one of the two.

    Args:
        nbytes: of the weight files, at most.
        kld: mean divergence in nats, at most, on the tuning text.
    """

    nbytes: int | None = None
    kld: float | None = None


@dataclass(frozen=True)
class TunedRecipe:
    """What came out.

    Args:
        chosen: unit to choice.
        nbytes: of the weight files.
        predicted: mean divergence by the fit, in nats.
        kld: what was measured; None without probes.
        fitted: what each unit costs in each choice.
        front: bytes and predicted divergence of the best allocations of other sizes.
        probes: groups measured.
        errors_rank: rank correlation of a group's squared error with its measured divergence.
        prediction: measured over predicted divergence of whole allocations, for each tried.
    """

    chosen: Allocation
    nbytes: int
    predicted: float
    kld: float | None
    fitted: CostFit
    front: Sequence[tuple[int, float]]
    probes: int
    errors_rank: float | None
    prediction: Sequence[float]


def tune(
    space: ChoiceSpace,
    budget: TuningBudget,
    setting: ProbeSetting,
    measured: Measurements,
    *,
    probes: int,
    save: Callable[[Measurements], None],
    work: Path | None = None,
    progress: Callable[[str], Progress] = lambda _: Silent(),
) -> TunedRecipe:
    """Find the allocation that keeps to a budget and costs least.

    Args:
        space: the choices.
        budget: what must be kept to.
        setting: how divergence is measured.
        measured: what is known already; what is missing is measured and added.
        probes: groups to measure, at most; 0 to go by squared errors alone.
        save: called whenever something was added.
        work: folder for files of a moment.
        progress: makes progress that counts a unit.

    Raises:
        UsageError: the budget cannot be kept to.
    """
    wanted = {unit.name: set(unit.sizes) for unit in space.units}
    if wanted != {unit: set(row) for unit, row in measured.errors.items()}:
        measured.errors = space.errors(setting.threads, progress("weights"))
        save(measured)
    if not probes:
        if budget.kld is not None:
            raise UsageError("--max-kld", "given with --probes 0", hint="nothing would measure it")
        fitted = _fit(space, group_units(space.units, 1), measured, 0.0)
        solution = _within(space, fitted, budget.nbytes)
        return _tuned(space, solution, None, fitted, measured)
    groups = _groups(space, measured, probes)
    with opened(space, setting, work) as lab:
        _probe(lab, groups, measured, save, progress("probes"))
        if budget.kld is not None:
            solution, kld, fitted = _below(lab, groups, measured, budget.kld, save)
        else:
            solution, kld, fitted = _best(lab, groups, measured, budget.nbytes, save)
    return _tuned(space, solution, kld, fitted, measured)


def _groups(space: ChoiceSpace, measured: Measurements, most: int) -> list[UnitGroup]:
    """Return the groups measured before, if they still cover the units, or else new ones."""
    known = [UnitGroup(name, tuple(units)) for name, units in measured.groups.items()]
    covered = sorted(unit for group in known for unit in group.units)
    if covered == sorted(unit.name for unit in space.units):
        return known
    groups = group_units(space.units, most)
    measured.groups = {group.name: list(group.units) for group in groups}
    measured.probes = []
    return groups


def _probe(
    lab: ProbeLab,
    groups: Sequence[UnitGroup],
    measured: Measurements,
    save: Callable[[Measurements], None],
    progress: Progress,
) -> None:
    done = {(probe.group, probe.choice) for probe in measured.probes}
    wanted = [(group, choice) for group in groups for choice in probe_choices(lab.space, group)]
    missing = [(group, choice) for group, choice in wanted if (group.name, choice) not in done]
    exact = {unit.name: lab.space.exact for unit in lab.space.units}
    progress.begin("probes", len(wanted))
    try:
        progress.advance(len(wanted) - len(missing), "measured before")
        for start in range(0, len(missing), lab.side_by_side):
            part = missing[start : start + lab.side_by_side]
            tried = [{**exact, **dict.fromkeys(group.units, choice)} for group, choice in part]
            for (group, choice), kld in zip(part, lab.measure(tried), strict=True):
                measured.probes.append(Probe(group.name, choice, kld))
            save(measured)
            progress.advance(len(part), part[-1][0].name)
    finally:
        progress.end()


def _fit(
    space: ChoiceSpace, groups: Sequence[UnitGroup], measured: Measurements, smoothing: float
) -> CostFit:
    exact = {space.exact: 0.0}
    found = fit(groups, measured.probes, measured.errors, exact)
    if not smoothing:
        return found
    kinds: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        kinds[group.name.partition("@")[0]].append(max(found.slopes[group.name], 1e-15))
    costs: dict[str, dict[str, float]] = {}
    for group in groups:
        own = max(found.slopes[group.name], 1e-15)
        shared = fmean(map(log, kinds[group.name.partition("@")[0]]))
        factor = exp(smoothing * (shared - log(own)))
        for unit in group.units:
            offset = found.offsets[group.name] / len(group.units)
            costs[unit] = {
                choice: cost if choice in exact else (cost - offset) * factor + offset
                for choice, cost in found.costs[unit].items()
            }
    return CostFit(found.slopes, found.offsets, costs)


def _within(space: ChoiceSpace, fitted: CostFit, nbytes: int | None) -> KnapsackSolution:
    """Solve for a size of the weight files, whose heads depend a little on what is chosen."""
    assert nbytes is not None  # one of the two is given
    room = nbytes
    while True:
        found = nearest(space.units, fitted.costs, room - _beside(space))
        if set(found.choices.values()) == {space.exact}:
            hint = "nothing needs to be quantized: give less"
            raise UsageError("--size", f"{nbytes:,} bytes hold the whole model", hint=hint)
        over = space.size(found.choices) - nbytes
        if over <= 0:
            return found
        room -= over


def _beside(space: ChoiceSpace) -> int:
    """Return the bytes of the files that no choice bears on."""
    least = {unit.name: min(unit.sizes, key=lambda c: unit.sizes[c]) for unit in space.units}
    return space.size(least) - sum(unit.sizes[least[unit.name]] for unit in space.units)


def _trial(
    lab: ProbeLab,
    solutions: Sequence[KnapsackSolution],
    measured: Measurements,
    save: Callable[[Measurements], None],
) -> list[float]:
    """Measure whole allocations, each once."""
    known = {trial.digest: trial.kld for trial in measured.trials}
    missing = {_digest(s.choices): s for s in solutions if _digest(s.choices) not in known}
    if missing:
        klds = lab.measure([solution.choices for solution in missing.values()])
        for (digest, solution), kld in zip(missing.items(), klds, strict=True):
            size = lab.space.size(solution.choices)
            measured.trials.append(MeasuredTrial(digest, size, solution.cost, kld))
            known[digest] = kld
        save(measured)
    return [known[_digest(solution.choices)] for solution in solutions]


def _digest(chosen: Allocation) -> str:
    return hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()


def _best(
    lab: ProbeLab,
    groups: Sequence[UnitGroup],
    measured: Measurements,
    nbytes: int | None,
    save: Callable[[Measurements], None],
) -> tuple[KnapsackSolution, float, CostFit]:
    """Solve by several fits and keep the solution that measures best."""
    fits = [_fit(lab.space, groups, measured, smoothing) for smoothing in _SMOOTHING]
    solutions = [_within(lab.space, fitted, nbytes) for fitted in fits]
    klds = _trial(lab, solutions, measured, save)
    best = min(range(len(klds)), key=lambda i: klds[i])
    return solutions[best], klds[best], fits[best]


def _below(
    lab: ProbeLab,
    groups: Sequence[UnitGroup],
    measured: Measurements,
    limit: float,
    save: Callable[[Measurements], None],
) -> tuple[KnapsackSolution, float, CostFit]:
    """Solve for a divergence, and again for a corrected one until the measured one is below it."""
    fitted = _fit(lab.space, groups, measured, 0.0)
    allowed, found = limit, []
    for _ in range(_ROUNDS):
        solution = cheapest(lab.space.units, fitted.costs, allowed)
        [kld] = _trial(lab, [solution], measured, save)
        if kld <= limit:
            found.append((solution, kld))
            if kld >= _MARGIN * limit or kld == 0:
                break
        allowed *= (0.5 * (1 + _MARGIN)) * limit / max(kld, 1e-12)
    if not found:
        raise UsageError(
            "--max-kld",
            f"{limit:.3g} was not reached in {_ROUNDS} rounds (the last measured {kld:.3g})",
            hint="allow more precise types with --types",
        )
    return *min(found, key=lambda pair: pair[0].nbytes), fitted


def _tuned(
    space: ChoiceSpace,
    solution: KnapsackSolution,
    kld: float | None,
    fitted: CostFit,
    measured: Measurements,
) -> TunedRecipe:
    pairs = [
        (sum(measured.errors[u][p.choice] for u in measured.groups[p.group]), p.kld)
        for p in measured.probes
        if p.choice == probe_choices(space, UnitGroup(p.group, tuple(measured.groups[p.group])))[0]
    ]
    return TunedRecipe(
        solution.choices,
        space.size(solution.choices),
        solution.cost,
        kld,
        fitted,
        list(_front(space, fitted)),
        len(measured.probes),
        rank_correlation(*map(list, zip(*pairs, strict=True))) if pairs else None,
        [trial.kld / trial.predicted for trial in measured.trials if trial.predicted > 0],
    )


def _front(space: ChoiceSpace, fitted: CostFit) -> Iterator[tuple[int, float]]:
    """Yield bytes and predicted divergence for sizes from the smallest to the largest."""
    small = sum(min(unit.sizes.values()) for unit in space.units)
    large = sum(max(unit.sizes.values()) for unit in space.units)
    beside = _beside(space)
    for i in range(_FRONT + 1):
        found = nearest(space.units, fitted.costs, small + (large - small) * i // _FRONT)
        yield beside + found.nbytes, found.cost


def shares(fitted: CostFit, chosen: Mapping[str, str]) -> dict[str, float]:
    """Return what each kind of unit costs as chosen, in nats."""
    found: dict[str, float] = defaultdict(float)
    for unit, choice in chosen.items():
        found[unit.partition("@")[0]] += fitted.costs[unit][choice]
    return dict(found)
