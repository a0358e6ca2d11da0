"""Recipe search: prices, the best allocation under a budget, and measurements that check it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from qwen35.errors import UsageError
from qwen35.progress import Progress, Silent
from qwen35.tuning.measurements import Measurements, Probe
from qwen35.tuning.probing import ProbeLab, ProbeSetting, open_lab
from qwen35.tuning.solve import KnapsackSolution, cheapest, nearest
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.unit_groups import group_units, rank_correlation
from qwen35.tuning.units import Allocation, Unit

__all__ = ["PriceCheck", "TunedRecipe", "TuningBudget", "shares", "tune", "whole_model"]

_FRONT = 16
"""Number of steps between the smallest and the largest size on the predicted front."""

_ROUNDS = 5
"""Most corrections of a predicted divergence by a measured one."""

_MARGIN = 0.98
"""A divergence of at least this share of the limit is close enough to stop."""

Costs = Mapping[str, Mapping[str, float]]
"""Unit to choice to nats a token."""


@dataclass(frozen=True)
class TuningBudget:
    """The limit on a recipe; one of the first two is set.

    Args:
        nbytes: most bytes of the weight files, or read per token.
        kld: largest predicted mean divergence on the tuning text, in nats.
        active: whether bytes are those read per token.
    """

    nbytes: int | None = None
    kld: float | None = None
    active: bool = False


@dataclass(frozen=True)
class PriceCheck:
    """A measured model beside its price.

    Args:
        name: of the group that was quantized alone; empty for the whole recipe.
        predicted: its price, in nats.
        kld: measured mean divergence, in nats.
    """

    name: str
    predicted: float
    kld: float


@dataclass(frozen=True)
class TunedRecipe:
    """The result of tuning.

    Args:
        chosen: unit to choice.
        nbytes: of the weight files.
        active: bytes read per token.
        predicted: mean divergence on the text by the prices, in nats.
        costs: the price of each unit in each choice.
        by_active: whether the budget, and the sizes of `front`, are bytes read per token.
        front: bytes and predicted divergence of the best allocations of other sizes.
        checks: measured models, the recipe first; empty without probes.
    """

    chosen: Allocation
    nbytes: int
    active: int
    predicted: float
    costs: Costs
    by_active: bool
    front: Sequence[tuple[int, float]]
    checks: Sequence[PriceCheck] = ()

    @property
    def kld(self) -> float | None:
        """Measured mean divergence; None without probes."""
        return self.checks[0].kld if self.checks else None

    @property
    def rank(self) -> float | None:
        """Rank correlation of prices and measured divergences of groups; None for fewer than 3."""
        groups = self.checks[1:]
        if len(groups) < 3:
            return None
        return rank_correlation([one.predicted for one in groups], [one.kld for one in groups])


def tune(
    space: ChoiceSpace,
    budget: TuningBudget,
    measured: Measurements,
    costs: Costs,
    *,
    probes: int = 0,
    setting: ProbeSetting,
    save: Callable[[Measurements], None],
    work: Path | None = None,
    progress: Callable[[str], Progress] = lambda _: Silent(),
) -> TunedRecipe:
    """Find the allocation of least cost within a budget.

    Args:
        space: the choices.
        budget: the limit.
        measured: keeps the probes; missing ones are measured and added.
        costs: the price of each choice.
        probes: most models to measure as a check.
        setting: how.
        save: called after measurements were added.
        work: folder for temporary files.
        progress: returns a progress that counts the named unit.

    Raises:
        UsageError: the budget cannot be met.
    """
    market = _Market(space, budget, costs)
    if not probes:
        return market.tuned(market.solved())
    with open_lab(space, setting, work) as lab:
        bench = _Bench(lab, measured, save, costs, progress("probes"))
        solution = market.solved() if budget.kld is None else _below(market, bench, budget.kld)
        return replace(market.tuned(solution), checks=bench.checks(solution, probes))


@dataclass(frozen=True)
class _Market:
    """Units with what each choice takes of the budget, and its price."""

    space: ChoiceSpace
    budget: TuningBudget
    costs: Costs

    @property
    def units(self) -> Sequence[Unit]:
        """The units, whose sizes are what counts for the budget."""
        if not self.budget.active:
            return self.space.units
        return [
            replace(unit, sizes=read_sizes(unit, self.space.read_share(unit)))
            for unit in self.space.units
        ]

    @property
    def fixed(self) -> int:
        """Bytes of the budget that no choice changes."""
        if self.budget.active:
            return self.space.fixed_active
        return self.space.fixed_bytes

    def solved(self) -> KnapsackSolution:
        """Return the best allocation for the budget, by the prices alone."""
        if self.budget.kld is not None:
            return self.below(self.budget.kld)
        assert self.budget.nbytes is not None  # a budget sets exactly one limit
        return self._within(self.budget.nbytes)

    def below(self, nats: float) -> KnapsackSolution:
        """Return the smallest allocation of at most such a price."""
        return cheapest(self.units, self.costs, nats)

    def _within(self, nbytes: int) -> KnapsackSolution:
        """Solve for a size.

        File headers depend slightly on the choices, so the budget shrinks until the exact size
        fits.
        """
        room = nbytes
        while True:
            solution = nearest(self.units, self.costs, room - self.fixed)
            if set(solution.choices.values()) == {self.space.exact}:
                raise whole_model(nbytes)
            excess = 0 if self.budget.active else self.space.size(solution.choices) - nbytes
            if excess <= 0:
                return solution
            room -= excess

    def tuned(self, solution: KnapsackSolution) -> TunedRecipe:
        """Return a solution as a result."""
        chosen = solution.choices
        if self.space.packs_nothing(chosen):
            hint = "allow more: nothing could be packed"
            raise UsageError("--max-kld", "only the whole model is that close", hint=hint)
        return TunedRecipe(
            chosen,
            self.space.size(chosen),
            self.space.active(chosen),
            solution.cost,
            self.costs,
            self.budget.active,
            list(self._front()),
        )

    def _front(self) -> Iterator[tuple[int, float]]:
        """Yield bytes and predicted divergence for sizes from the smallest to the largest."""
        units = self.units
        small = sum(min(unit.sizes.values()) for unit in units)
        large = sum(max(unit.sizes.values()) for unit in units)
        for i in range(_FRONT + 1):
            solution = nearest(units, self.costs, small + (large - small) * i // _FRONT)
            yield self.fixed + solution.nbytes, solution.cost


def whole_model(nbytes: int) -> UsageError:
    """Return the error of a budget that leaves nothing to choose."""
    hint = "nothing needs to be quantized: give less"
    return UsageError("--size", f"{nbytes:,} bytes hold the whole model", hint=hint)


def read_sizes(unit: Unit, share: Fraction) -> dict[str, int]:
    """Return the bytes of each choice that a token reads, rounded up."""
    return {choice: -int(-share * nbytes // 1) for choice, nbytes in unit.sizes.items()}


@dataclass(frozen=True)
class _Bench:
    """Measures allocations beside their prices; each only once."""

    lab: ProbeLab
    measured: Measurements
    save: Callable[[Measurements], None]
    costs: Costs
    progress: Progress

    def klds(self, tried: Sequence[tuple[str, Allocation]]) -> list[float]:
        """Return the divergence of each named allocation; measure only new ones."""
        known = {probe.digest: probe.kld for probe in self.measured.probes}
        missing = {d: one for one in tried if (d := _digest(one[1])) not in known}
        self.progress.begin("probes", len(tried))
        try:
            self.progress.advance(len(tried) - len(missing), "already measured")
            todo, most = list(missing.items()), self.lab.side_by_side
            for start in range(0, len(todo), most):
                batch = todo[start : start + most]
                made = self.lab.measure([chosen for _, (_, chosen) in batch])
                for (digest, (name, _)), kld in zip(batch, made, strict=True):
                    self.measured.probes.append(Probe(name, digest, kld))
                    known[digest] = kld
                self.save(self.measured)
                self.progress.advance(len(batch), batch[-1][1][0] or "the recipe")
        finally:
            self.progress.end()
        return [known[_digest(chosen)] for _, chosen in tried]

    def checks(self, solution: KnapsackSolution, probes: int) -> list[PriceCheck]:
        """Measure a solution, and then its dearest groups, each alone."""
        space, chosen = self.lab.space, solution.choices
        exact = {unit.name: space.exact for unit in space.units}
        tried: list[tuple[str, Allocation, float]] = [("", chosen, solution.cost)]
        alone: list[tuple[str, Allocation, float]] = []
        for group in group_units(space.units, max(1, probes - 1)):
            own = {unit: chosen[unit] for unit in group.units}
            price = sum(self.costs[unit][choice] for unit, choice in own.items())
            if set(own.values()) != {space.exact}:
                alone.append((group.name, {**exact, **own}, price))
        tried += sorted(alone, key=lambda one: -one[2])[: probes - 1]
        klds = self.klds([(name, allocation) for name, allocation, _ in tried])
        return [
            PriceCheck(name, price, kld) for (name, _, price), kld in zip(tried, klds, strict=True)
        ]


def _digest(chosen: Allocation) -> str:
    return hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()


def _below(market: _Market, bench: _Bench, limit: float) -> KnapsackSolution:
    """Solve for a divergence, and correct the target until the measured one is below the limit."""
    allowed, accepted = limit, []
    for _ in range(_ROUNDS):
        solution = market.below(allowed)
        [kld] = bench.klds([("", solution.choices)])
        if kld <= limit:
            accepted.append(solution)
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
    return min(accepted, key=lambda solution: solution.nbytes)


def shares(costs: Costs, chosen: Mapping[str, str]) -> dict[str, float]:
    """Return the price of each kind of unit as chosen, in nats."""
    found: dict[str, float] = defaultdict(float)
    for unit, choice in chosen.items():
        found[unit.partition("@")[0]] += costs[unit][choice]
    return dict(found)
