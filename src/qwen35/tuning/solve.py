"""The best choice for each unit under a budget: a multiple-choice knapsack, solved exactly.

HiGHS (through SciPy) proves its solution optimal by branch and bound; a model has some hundred
units and a handful of choices, which takes it well under a second.
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

from qwen35.errors import UsageError
from qwen35.tuning.units import Allocation, Unit

__all__ = ["KnapsackSolution", "cheapest", "nearest"]

Costs = Mapping[str, Mapping[str, float]]
"""Unit to choice to what it costs, not negative."""


@dataclass(frozen=True)
class KnapsackSolution:
    """An allocation and what it comes to.

    Args:
        choices: unit to choice.
        nbytes: of all units.
        cost: the sum of all costs.
    """

    choices: Allocation
    nbytes: int
    cost: float


def nearest(units: Sequence[Unit], costs: Costs, budget: int) -> KnapsackSolution:
    """Return the allocation of least cost that takes at most `budget` bytes.

    Raises:
        UsageError: even the smallest choices take more.
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
    """Return the allocation of fewest bytes whose cost is at most `limit`.

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
        raise UsageError(
            "tuning", f"{error.name} is not installed", hint="pip install 'qwen35[tune]'"
        ) from error
    of_unit = np.repeat(np.arange(len(units)), [len(unit.sizes) for unit in units])
    count = len(of_unit)
    once = csr_array((np.ones(count), (of_unit, np.arange(count))), shape=(len(units), count))
    scale = _scale(limited)
    with _stdout_unused():
        found = milp(
            objective / _scale(objective),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint((limited / scale)[None], -np.inf, limit / scale),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise RuntimeError(f"the solver found nothing: {found.message}")
    taken = np.rint(found.x).astype(bool)
    names = [(unit, choice) for unit in units for choice in unit.sizes]
    choices = {u.name: c for (u, c), used in zip(names, taken, strict=True) if used}
    return KnapsackSolution(
        choices,
        sum(unit.sizes[choices[unit.name]] for unit in units),
        sum(costs[unit.name][choices[unit.name]] for unit in units),
    )


@contextmanager
def _stdout_unused() -> Iterator[None]:
    """Keep stdout, which is for data, from lines that HiGHS prints whatever it is told."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scale(values: Any) -> float:
    """Return what to divide by so that a solver's absolute tolerances are far below any value."""
    whole = [round(value) for value in values]
    if np.array_equal(values, whole):
        return float(gcd(*whole) or 1)
    return float(values.max()) / 1e4 or 1.0
