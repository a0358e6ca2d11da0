"""What was found of one model, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from qwen35.evaluation.divergence import Comparison, Series
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.speed import Speed
from qwen35.evaluation.text_chunks import Decode, TokenChunks

__all__ = ["EDGES", "ModelMeasurement", "WrongToken", "distribution", "front", "worst"]

EDGES = tuple(10 ** (i / 5) for i in range(-40, 11))
"""Bounds of the bins of divergence, in nats: five a factor of ten, 1e-8 to 100."""

_WORST = 12
_BEFORE, _AFTER = 48, 8
"""Tokens of context shown around one that went wrong."""


@dataclass(frozen=True)
class WrongToken:
    """A token where a candidate is far from the base.

    Args:
        chunk: counted from 1.
        place: in the chunk, counted from 0.
        kld: divergence of the prediction of it, in nats.
        before: the text before it.
        token: the token that came.
        after: the text after it.
        base_top: what the base held most likely.
        top: what the candidate did.
        base_probability: the base's, of the token that came.
        probability: the candidate's.
    """

    chunk: int
    place: int
    kld: float
    before: str
    token: str
    after: str
    base_top: str
    top: str
    base_probability: float
    probability: float


@dataclass(frozen=True)
class ModelMeasurement:
    """One model and what was found of it.

    Args:
        model: what was run.
        comparison: its figures.
        distribution: tokens in each bin of `EDGES`; those below the first are in the first bin.
        worst: tokens where it is farthest from the base.
        speed: on this machine, if that was asked for.
        front: whether no other candidate is both smaller and nearer.
    """

    model: EvaluatedModel
    comparison: Comparison
    distribution: Sequence[int]
    worst: Sequence[WrongToken]
    speed: Speed | None = None
    front: bool = False


def distribution(series: Series) -> list[int]:
    """Count tokens by their divergence, in the bins of `EDGES`."""
    assert series.kld is not None
    values = np.clip(series.kld, EDGES[0], EDGES[-1])
    return [int(n) for n in np.histogram(values, EDGES)[0]]


def worst(base: Series, series: Series, chunks: TokenChunks, decode: Decode) -> list[WrongToken]:
    """Return the tokens of largest divergence, largest first."""
    assert series.kld is not None
    order = np.argsort(-series.kld, axis=None, kind="stable")[:_WORST]
    found = []
    for chunk, row in zip(*np.unravel_index(order, series.kld.shape), strict=True):
        ids = [int(i) for i in chunks.ids[chunk]]
        place = chunks.first + 1 + int(row)
        found.append(
            WrongToken(
                chunk=int(chunk) + 1,
                place=place,
                kld=float(series.kld[chunk, row]),
                before=decode(ids[max(0, place - _BEFORE) : place]),
                token=decode([ids[place]]),
                after=decode(ids[place + 1 : place + 1 + _AFTER]),
                base_top=decode([int(base.top[chunk, row])]),
                top=decode([int(series.top[chunk, row])]),
                base_probability=exp(-float(base.nll[chunk, row])),
                probability=exp(-float(series.nll[chunk, row])),
            )
        )
    return found


def front(sizes: Sequence[int], klds: Sequence[float]) -> list[bool]:
    """Return which points no other one beats in both; equal points are on the front together.

    >>> front([3, 2, 4, 3], [0.1, 0.2, 0.05, 0.3])
    [True, True, True, False]
    """
    points = list(zip(sizes, klds, strict=True))
    return [
        not any(s <= size and k <= kld and (s, k) != (size, kld) for s, k in points)
        for size, kld in points
    ]
