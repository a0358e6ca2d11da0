"""Recipe search: squared errors, probes, fit, solution, and a measurement of the result."""

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
from qwen35.tuning.probing import ProbeLab, ProbeSetting, open_lab, probe_choices
from qwen35.tuning.solve import KnapsackSolution, cheapest, nearest
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.units import Allocation

__all__ = ["TunedRecipe", "TuningBudget", "tune"]

_FRONT = 24
"""Number of steps between the smallest and the largest size on the predicted front."""

_SMOOTHING = (0.0, 0.5, 1.0)
"""How far slopes are pulled to the mean of their kind, one candidate solution each.

A probe of one layer is noisy where layers are much alike, so the best value is measured.
"""

_ROUNDS = 5
"""Most corrections of a predicted divergence by a measured one."""

_MARGIN = 0.98
"""A divergence of at least this share of the limit is close enough to stop."""


@dataclass(frozen=True)
class TuningBudget:
    """The limit on a recipe; exactly one of the two is set.

    Args:
        nbytes: most bytes of the weight files.
        kld: largest mean divergence on the tuning text, in nats.
    """

    nbytes: int | None = None
    kld: float | None = None


@dataclass(frozen=True)
class TunedRecipe:
    """The result of tuning.

    Args:
        chosen: unit to choice.
        nbytes: of the weight files.
        predicted: mean divergence predicted by the fit, in nats.
        kld: measured mean divergence; None without probes.
        fitted: cost of each unit in each choice.
        front: bytes and predicted divergence of the best allocations of other sizes.
        probes: number of probes measured.
        errors_rank: rank correlation of a group's squared error with its measured divergence.
        prediction: measured over predicted divergence of each allocation tried.
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
    """Find the allocation of least cost within a budget.

    Args:
        space: the choices.
        budget: the limit.
        setting: how divergence is measured.
        measured: earlier measurements; missing ones are measured and added.
        probes: most groups to probe; 0 to use squared errors alone.
        save: called after measurements were added.
        work: folder for temporary files.
        progress: returns a progress that counts the named unit.

    Raises:
        UsageError: the budget cannot be met.
    """
    required = {unit.name: set(unit.sizes) for unit in space.units}
    if required != {unit: set(row) for unit, row in measured.errors.items()}:
        measured.errors = space.errors(setting.threads, progress("weights"))
        save(measured)
    if not probes:
        if budget.kld is not None:
            raise UsageError("--max-kld", "given with --probes 0", hint="nothing would measure it")
        fitted = _fit(space, group_units(space.units, 1), measured, 0.0)
        solution = _within(space, fitted, budget.nbytes)
        return _tuned(space, solution, None, fitted, measured)
    groups = _groups(space, measured, probes)
    with open_lab(space, setting, work) as lab:
        _probe(lab, groups, measured, save, progress("probes"))
        if budget.kld is not None:
            solution, kld, fitted = _below(lab, groups, measured, budget.kld, save)
        else:
            solution, kld, fitted = _best(lab, groups, measured, budget.nbytes, save)
    return _tuned(space, solution, kld, fitted, measured)


def _groups(space: ChoiceSpace, measured: Measurements, most: int) -> list[UnitGroup]:
    """Return the groups probed before if they cover the units exactly, else new ones."""
    earlier = [UnitGroup(name, tuple(units)) for name, units in measured.groups.items()]
    covered = sorted(unit for group in earlier for unit in group.units)
    if covered == sorted(unit.name for unit in space.units):
        return earlier
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
    required = [(group, choice) for group in groups for choice in probe_choices(lab.space, group)]
    missing = [(group, choice) for group, choice in required if (group.name, choice) not in done]
    exact = {unit.name: lab.space.exact for unit in lab.space.units}
    progress.begin("probes", len(required))
    try:
        progress.advance(len(required) - len(missing), "already measured")
        for start in range(0, len(missing), lab.side_by_side):
            batch = missing[start : start + lab.side_by_side]
            tried = [{**exact, **dict.fromkeys(group.units, choice)} for group, choice in batch]
            for (group, choice), kld in zip(batch, lab.measure(tried), strict=True):
                measured.probes.append(Probe(group.name, choice, kld))
            save(measured)
            progress.advance(len(batch), batch[-1][0].name)
    finally:
        progress.end()


def _fit(
    space: ChoiceSpace, groups: Sequence[UnitGroup], measured: Measurements, smoothing: float
) -> CostFit:
    """Fit costs, with slopes pulled to the geometric mean of their kind by `smoothing`."""
    exact = {space.exact: 0.0}
    fitted = fit(groups, measured.probes, measured.errors, exact)
    if not smoothing:
        return fitted
    kinds: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        kinds[group.name.partition("@")[0]].append(max(fitted.slopes[group.name], 1e-15))
    costs: dict[str, dict[str, float]] = {}
    for group in groups:
        own = max(fitted.slopes[group.name], 1e-15)  # slopes may be 0, logarithms may not
        shared = fmean(map(log, kinds[group.name.partition("@")[0]]))
        factor = exp(smoothing * (shared - log(own)))
        for unit in group.units:
            offset = fitted.offsets[group.name] / len(group.units)
            costs[unit] = {
                choice: cost if choice in exact else (cost - offset) * factor + offset
                for choice, cost in fitted.costs[unit].items()
            }
    return CostFit(fitted.slopes, fitted.offsets, costs)


def _within(space: ChoiceSpace, fitted: CostFit, nbytes: int | None) -> KnapsackSolution:
    """Solve for a size of the weight files.

    File headers depend slightly on the choices, so the budget shrinks until the exact size fits.
    """
    assert nbytes is not None  # a budget sets exactly one limit
    room = nbytes
    while True:
        solution = nearest(space.units, fitted.costs, room - _fixed_bytes(space))
        if set(solution.choices.values()) == {space.exact}:
            hint = "nothing needs to be quantized: give less"
            raise UsageError("--size", f"{nbytes:,} bytes hold the whole model", hint=hint)
        excess = space.size(solution.choices) - nbytes
        if excess <= 0:
            return solution
        room -= excess


def _fixed_bytes(space: ChoiceSpace) -> int:
    """Return the bytes of the files that do not depend on any choice."""
    least = {unit.name: min(unit.sizes, key=lambda c: unit.sizes[c]) for unit in space.units}
    return space.size(least) - sum(unit.sizes[least[unit.name]] for unit in space.units)


def _trial(
    lab: ProbeLab,
    solutions: Sequence[KnapsackSolution],
    measured: Measurements,
    save: Callable[[Measurements], None],
) -> list[float]:
    """Return the divergence of whole allocations; measure only new ones."""
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
    """Solve with several fits and keep the solution with the least measured divergence."""
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
    """Solve for a divergence, and correct the target until the measured one is below the limit."""
    fitted = _fit(lab.space, groups, measured, 0.0)
    allowed, accepted = limit, []
    for _ in range(_ROUNDS):
        solution = cheapest(lab.space.units, fitted.costs, allowed)
        [kld] = _trial(lab, [solution], measured, save)
        if kld <= limit:
            accepted.append((solution, kld))
            if kld >= _MARGIN * limit or kld == 0:
                break
        # Scale by the error of the prediction, aiming between the margin and the limit.
        allowed *= (0.5 * (1 + _MARGIN)) * limit / max(kld, 1e-12)
    if not accepted:
        raise UsageError(
            "--max-kld",
            f"{limit:.3g} was not reached in {_ROUNDS} rounds (the last measured {kld:.3g})",
            hint="allow more precise types with --types",
        )
    return *min(accepted, key=lambda pair: pair[0].nbytes), fitted


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
    fixed = _fixed_bytes(space)
    for i in range(_FRONT + 1):
        solution = nearest(space.units, fitted.costs, small + (large - small) * i // _FRONT)
        yield fixed + solution.nbytes, solution.cost


def shares(fitted: CostFit, chosen: Mapping[str, str]) -> dict[str, float]:
    """Return the cost of each kind of unit as chosen, in nats."""
    costs: dict[str, float] = defaultdict(float)
    for unit, choice in chosen.items():
        costs[unit.partition("@")[0]] += fitted.costs[unit][choice]
    return dict(costs)
