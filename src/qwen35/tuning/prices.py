"""Prices: nats a token that each candidate of each unit costs, and how they add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "FEW_TOKENS",
    "MOST",
    "ExpertPrices",
    "Prices",
    "RefinedShares",
    "few_experts",
    "shared_prices",
]

FEW_TOKENS = 128
"""Tokens below which an expert has the price a token of its layer."""

MOST = 1e12
"""Bound on prices and numbers of tokens, far above any real ones: the solver needs finite sums."""

PriceTable = dict[str, dict[str, float]]
"""Unit to choice to nats a token of the text."""


@dataclass
class ExpertPrices:
    """A unit that is a stack of experts.

    Args:
        tokens: that reached each of them.
        prices: choice to the price of each of them as measured.
    """

    tokens: list[int]
    prices: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RefinedShares:
    """What refined codes leave of the prices of rounding weights.

    Args:
        hessians: SHA-256 of the Hessians by which they were chosen.
        shares: unit to choice to the share that is left, from 0 to 1; 1 where codes stay plain.
    """

    hessians: str
    shares: PriceTable

    def of(self, unit: str, choice: str) -> float:
        """Return the share of a choice; 1 if it was not compared."""
        return self.shares.get(unit, {}).get(choice, 1.0)


@dataclass
class Prices:
    """Prices of the units of a model, or of one block of it.

    Args:
        weights: of rounding weights.
        inputs: of rounding the inputs of products, as llama.cpp does.
        experts: the units of ``weights`` that are stacks of experts.
    """

    weights: PriceTable = field(default_factory=dict)
    inputs: PriceTable = field(default_factory=dict)
    experts: dict[str, ExpertPrices] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether all are numbers within bounds; damaged weights have others."""
        rows = [*self.weights.values(), *self.inputs.values()]
        return all(0 <= nats < MOST for row in rows for nats in row.values())

    def table(self, *, inputs: bool, refined: RefinedShares | None = None) -> PriceTable:
        """Return the price of each unit and choice.

        Args:
            inputs: whether that of rounding inputs counts.
            refined: what refined codes leave of that of rounding weights; None for plain codes.
        """
        return {
            unit: {
                choice: nats * (1.0 if refined is None else refined.of(unit, choice))
                + (self.inputs[unit].get(choice, 0.0) if inputs else 0.0)
                for choice, nats in row.items()
            }
            for unit, row in self.weights.items()
        }


def united(parts: Iterable[Prices]) -> Prices:
    """Add up the prices of blocks; a tied matrix has two roles, and the sum of their prices."""
    total = Prices()
    for part in parts:
        for mine, other in ((total.weights, part.weights), (total.inputs, part.inputs)):
            for unit, row in other.items():
                own = mine.setdefault(unit, {})
                for choice, nats in row.items():
                    own[choice] = own.get(choice, 0.0) + nats
        total.experts |= part.experts
    return total


def shared_prices(prices: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Return the prices of experts; those that few tokens reached have their layer's per token.

    >>> shared_prices([3.0, 1.0], [224, 32])
    [3.0, 0.5]
    """
    seen = sum(tokens)
    a_token = sum(prices) / seen if seen else 0.0
    return [
        price if count >= FEW_TOKENS else count * a_token
        for price, count in zip(prices, tokens, strict=True)
    ]


def few_experts(experts: Mapping[str, ExpertPrices]) -> dict[str, int]:
    """Return how many experts of each unit have the price a token of their layer, if any."""
    counts = {
        unit: sum(count < FEW_TOKENS for count in experts[unit].tokens) for unit in sorted(experts)
    }
    return {unit: count for unit, count in counts.items() if count}
