"""The statistics of `llama-perplexity --kl-divergence`, from values per token.

Source: ``tools/perplexity/perplexity.cpp`` of ggml-org/llama.cpp at 0c1e570, `kl_divergence`. Its
errors treat tokens as independent samples. Neighbouring tokens share context, so every figure here
also has an error that treats chunks as the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen35.array_types import F64, I64

__all__ = ["PERCENTILES", "Comparison", "Estimate", "Series", "compare_series", "perplexity"]


PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
"""In the order of llama-perplexity's table."""

_LEAST_TOKENS = 10  # llama-perplexity gives no error for so few
_LEAST_CHUNKS = 2  # one chunk has no spread


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard errors.

    Args:
        value: the figure.
        error: treating tokens as independent, as llama-perplexity does.
        block_error: treating chunks as independent; None for a single chunk.
    """

    value: float
    error: float
    block_error: float | None

    def through(self, function: Callable[[float], float], slope: float) -> Estimate:
        """Return `function` of the figure; propagate errors to first order by its slope there."""
        blocks = None if self.block_error is None else abs(slope) * self.block_error
        return Estimate(function(self.value), abs(slope) * self.error, blocks)


@dataclass(frozen=True)
class Series:
    """One model's values for every scored token.

    Args:
        nll: [chunks, scored] float64, negative log probability of the actual token, in nats.
        top: [chunks, scored] int64, the most likely token.
        kld: [chunks, scored] float64, divergence from the base, in nats; None for the base.
        bound: [chunks, scored] float64, upper bound on what `kld` misses; None if it is exact.
    """

    nll: F64
    top: I64
    kld: F64 | None = None
    bound: F64 | None = None


@dataclass(frozen=True)
class Comparison:
    """A candidate compared with the base.

    Args:
        kld: mean Kullback-Leibler divergence, in nats per token.
        bound: upper bound on what the mean misses with a compact reference; 0.0 if it is exact.
        maximum: largest divergence.
        minimum: smallest divergence.
        percentiles: percent to divergence.
        perplexity: of the candidate.
        base_perplexity: of the base.
        ratio: of the perplexities.
        log_ratio: logarithm of `ratio`.
        difference: of the perplexities.
        correlation: of the two models' log probabilities.
        change: mean change in the probability of the actual token.
        change_rms: root mean square of that change.
        same_top: share of positions where both have the same most likely token.
    """

    kld: Estimate
    bound: float
    maximum: float
    minimum: float
    percentiles: dict[float, float]
    perplexity: Estimate
    base_perplexity: Estimate
    ratio: Estimate
    log_ratio: Estimate
    difference: Estimate
    correlation: float
    change: Estimate
    change_rms: Estimate
    same_top: Estimate


def mean(values: F64) -> Estimate:
    """Return the mean of [chunks, scored] values with both errors.

    >>> mean(np.array([[1.0, 3.0], [5.0, 7.0]])).value
    4.0
    """
    return Estimate(float(values.mean()), _error(values.reshape(-1)), _block_error(values))


def _error(values: F64) -> float:
    """sqrt((mean of squares - square of mean) / (n - 1)); 0 for ten or fewer, as upstream."""
    if values.size <= _LEAST_TOKENS:
        return 0.0
    return float(values.std() / math.sqrt(values.size - 1))


def _block_error(values: F64) -> float | None:
    if len(values) < _LEAST_CHUNKS:
        return None
    return float(values.mean(axis=1).std(ddof=1) / math.sqrt(len(values)))


def perplexity(nll: F64) -> Estimate:
    """Return exp of the mean negative log probability; nll: [chunks, scored]."""
    mean_nll = mean(nll)
    value = math.exp(mean_nll.value)
    return mean_nll.through(math.exp, value)


def compare_series(base: Series, candidate: Series) -> Comparison:
    """Compute all figures of a candidate; its `kld` must be set."""
    assert candidate.kld is not None
    log_ratio = mean(candidate.nll - base.nll)
    change = np.exp(-candidate.nll) - np.exp(-base.nll)
    square = mean(change**2)
    rms = math.sqrt(square.value)
    same = (candidate.top == base.top).astype(np.float64)
    values = candidate.kld.reshape(-1)
    percentiles = np.percentile(values, PERCENTILES)
    ppl, base_ppl = perplexity(candidate.nll), perplexity(base.nll)
    return Comparison(
        kld=mean(candidate.kld),
        bound=0.0 if candidate.bound is None else float(candidate.bound.mean()),
        maximum=float(values.max()),
        minimum=float(values.min()),
        percentiles={p: float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        perplexity=ppl,
        base_perplexity=base_ppl,
        ratio=log_ratio.through(math.exp, math.exp(log_ratio.value)),
        log_ratio=log_ratio,
        difference=_difference(candidate.nll, base.nll, ppl.value, base_ppl.value),
        correlation=_correlation(candidate.nll.reshape(-1), base.nll.reshape(-1)),
        change=mean(change),
        change_rms=square.through(math.sqrt, 0.5 / rms if rms else 0.0),
        same_top=mean(same),
    )


def _difference(nll: F64, base: F64, ppl: float, base_ppl: float) -> Estimate:
    """PPL(Q) - PPL(base); to first order a token contributes ppl * nll - base_ppl * base."""
    contribution = mean(ppl * nll - base_ppl * base)
    return Estimate(ppl - base_ppl, contribution.error, contribution.block_error)


def _correlation(first: F64, second: F64) -> float:
    spread = float(first.std() * second.std())
    if not spread:
        return 1.0
    return float(((first - first.mean()) * (second - second.mean())).mean() / spread)
