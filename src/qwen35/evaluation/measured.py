"""The measurements of one model, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from qwen35.evaluation.divergence import Comparison, Series
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.served_speed import ServedSpeed
from qwen35.evaluation.speed import Speed
from qwen35.evaluation.text_chunks import Decode, TokenChunks

__all__ = ["EDGES", "ModelMeasurement", "WrongToken", "distribution", "front", "worst"]

EDGES = tuple(10 ** (i / 5) for i in range(-40, 11))
"""Bin edges of the divergence histogram, in nats: five per decade, 1e-8 to 100."""

_WORST = 12
_BEFORE, _AFTER = 48, 8
"""Tokens of context shown around a wrong one."""


@dataclass(frozen=True)
class WrongToken:
    """A token where a candidate diverges far from the base.

    Args:
        chunk: counted from 1.
        place: position in the chunk, counted from 0.
        kld: divergence of its prediction, in nats.
        before: the text before it.
        token: the actual token.
        after: the text after it.
        base_top: the base's most likely token.
        top: the candidate's most likely token.
        base_probability: the base's probability of the actual token.
        probability: the candidate's probability of the actual token.
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
    """The measurements of one model.

    Args:
        model: the model.
        comparison: its figures.
        distribution: tokens per bin of `EDGES`; smaller and larger values count in the end bins.
        worst: the tokens that diverge most from the base.
        speed: on this machine, if requested.
        front: whether it is on the Pareto front of size and divergence.
        scored: tokens that were compared.
        served_speed: of the server that runs it, if requested.
        along: mean divergence of each window of the text, in nats.
        passage: divergence of each token of the report's passage, in nats; None where it was not
            compared.
    """

    model: EvaluatedModel
    comparison: Comparison
    distribution: Sequence[int]
    worst: Sequence[WrongToken]
    speed: Speed | None = None
    front: bool = False
    scored: int = 0
    served_speed: Sequence[ServedSpeed] = ()
    along: Sequence[float] = ()
    passage: Sequence[float | None] = ()


def distribution(series: Series) -> list[int]:
    """Count tokens by their divergence, in the bins of `EDGES`."""
    assert series.kld is not None
    values = np.clip(series.kld, EDGES[0], EDGES[-1])
    return [int(n) for n in np.histogram(values, EDGES)[0]]


def worst(base: Series, series: Series, chunks: TokenChunks, decode: Decode) -> list[WrongToken]:
    """Return the tokens with the largest divergences, largest first."""
    assert series.kld is not None
    compared = int(np.isfinite(series.kld).sum())  # others come last
    order = np.argsort(-series.kld, axis=None, kind="stable")[: min(_WORST, compared)]
    tokens = []
    for chunk, row in zip(*np.unravel_index(order, series.kld.shape), strict=True):
        ids = [int(i) for i in chunks.ids[chunk]]
        place = chunks.first + 1 + int(row)
        tokens.append(
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
    return tokens


def front(sizes: Sequence[int], klds: Sequence[float]) -> list[bool]:
    """Return which points are on the Pareto front; equal points are on it together.

    >>> front([3, 2, 4, 3], [0.1, 0.2, 0.05, 0.3])
    [True, True, True, False]
    """
    points = list(zip(sizes, klds, strict=True))
    return [
        not any(s <= size and k <= kld and (s, k) != (size, kld) for s, k in points)
        for size, kld in points
    ]
