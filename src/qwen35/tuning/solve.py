"""Solver: the best choice per unit under a budget, an exact multiple-choice knapsack.

HiGHS (through SciPy) proves optimality by branch and bound. A model has a few hundred units with a
handful of choices, which takes well under a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from qwen35.errors import UsageError, extra_hint
from qwen35.tuning.units import Allocation, Unit

__all__ = ["KnapsackSolution", "cheapest", "nearest"]

Costs = Mapping[str, Mapping[str, float]]
"""Unit to choice to cost, not negative."""


@dataclass(frozen=True)
class KnapsackSolution:
    """An allocation with its size and cost.

    Args:
        choices: unit to choice.
        nbytes: of all units.
        cost: of all units.
    """

    choices: Allocation
    nbytes: int
    cost: float


SECONDS = 900.0
"""Bound on the search for the best allocation, which takes seconds: files of others tell costs."""


def nearest(units: Sequence[Unit], costs: Costs, budget: int) -> KnapsackSolution:
    """Return the allocation of least cost in at most `budget` bytes.

    Raises:
        UsageError: even the smallest choices exceed the budget.
    """
    least = sum(min(unit.sizes.values()) for unit in units)
    if least > budget:
        raise UsageError(
            "--size",
            f"{least - budget:,} bytes too small",
            hint="allow smaller types with --types, or more bytes",
        )
    values, sizes = _tables(units, costs)
    return _solve(units, costs, objective=values, limited=sizes, limit=budget)


def cheapest(units: Sequence[Unit], costs: Costs, limit: float) -> KnapsackSolution:
    """Return the smallest allocation whose cost is at most `limit`.

    Raises:
        UsageError: even the most precise choices cost more.
    """
    least = sum(min(costs[unit.name][choice] for choice in unit.sizes) for unit in units)
    if least > limit:
        raise UsageError(
            "--max-kld",
            f"{limit:.3g}",
            expected=f"at least {least:.3g}",
            hint="allow more precise types with --types",
        )
    values, sizes = _tables(units, costs)
    return _solve(units, costs, objective=sizes, limited=values, limit=limit)


def _tables(units: Sequence[Unit], costs: Costs) -> tuple[Any, Any]:
    values = np.array([costs[u.name][choice] for u in units for choice in u.sizes])
    sizes = np.array([size for u in units for size in u.sizes.values()], np.float64)
    return values, sizes


def _solve(
    units: Sequence[Unit], costs: Costs, *, objective: Any, limited: Any, limit: float
) -> KnapsackSolution:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        found = f"{error.name} is not installed"
        raise UsageError("tuning", found, hint=extra_hint("tune")) from error
    of_unit = np.repeat(np.arange(len(units)), [len(unit.sizes) for unit in units])
    count = len(of_unit)
    once = csr_array((np.ones(count), (of_unit, np.arange(count))), shape=(len(units), count))
    scale = _scale(limited)
    with _stdout_discarded():
        result = milp(
            objective / _scale(objective),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint((limited / scale)[None], -np.inf, limit / scale),
            ],
            # the default gap would accept near-optimal solutions
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
    if result.status == 1:  # a solution, if any, would depend on the machine's speed
        found, hint = f"no optimum within {SECONDS:g} s", "give fewer --types, or measure again"
        raise UsageError("tuning", found, hint=hint)
    if result.x is None:
        raise RuntimeError(f"the solver found no solution: {result.message}")
    selected = np.rint(result.x).astype(bool)
    names = [(unit, choice) for unit in units for choice in unit.sizes]
    choices = {u.name: c for (u, c), used in zip(names, selected, strict=True) if used}
    return KnapsackSolution(
        choices,
        sum(unit.sizes[choices[unit.name]] for unit in units),
        sum(costs[unit.name][choices[unit.name]] for unit in units),
    )


@contextmanager
def _stdout_discarded() -> Iterator[None]:
    """Discard stdout, which is for data: HiGHS prints from native code even with output off."""
    sys.stdout.flush()  # or buffered output would go to the null device
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def _scale(values: Any) -> float:
    """Return a divisor that puts all values far above the solver's absolute tolerances."""
    whole = [round(value) for value in values]
    if np.array_equal(values, whole):  # bytes: dividing by the divisor keeps them exact
        return float(gcd(*whole) or 1)
    return float(values.max()) / 1e4 or 1.0
