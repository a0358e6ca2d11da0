"""References that candidates are compared with: exact logits, 16-bit or compact log probabilities.

Every reference covers one chunk's scored tokens: `n` rows over a vocabulary of `v`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwen35.array_types import F32, F64, I64, U16
from qwen35.evaluation import logit_kernels

__all__ = [
    "ChunkComparison",
    "CompactReference",
    "ExactReference",
    "Reference",
    "SixteenBitReference",
    "normalize",
]


@dataclass(frozen=True)
class ChunkComparison:
    """One model's results for a chunk.

    Args:
        nll: [n] float64, negative log probability of each target, in nats.
        top: [n] int64, the most likely token.
        kld: [n] float64, divergence from the reference, in nats.
        bound: [n] float64, upper bound on what `kld` misses; None if `kld` is exact.
    """

    nll: F64
    top: I64
    kld: F64
    bound: F64 | None = None


class Reference(Protocol):
    """One chunk of the base: its own results, and comparison with a candidate."""

    @property
    def nll(self) -> F64:
        """Negative log probability of each target, [n]."""

    @property
    def top(self) -> I64:
        """The most likely token, [n]."""

    def against(self, logits: F32, targets: I64, threads: int) -> ChunkComparison:
        """Compare a candidate's logits, [n, v]."""

    def of(self, row: int, ids: I64) -> F64:
        """Return the log probabilities of tokens in a row, [len(ids)]; NaN where unknown."""

    def spread(self, row: int) -> tuple[float, float]:
        """Return the sum of p log p of a row, and the log probability of its least likely token."""


def normalize(logits: F32, targets: I64, threads: int) -> tuple[F64, F64, I64]:
    """Return log-sum-exp, negative log probability of the target, and top token; all [n]."""
    total, top = np.empty(len(logits)), np.empty(len(logits), np.int64)
    _spread(threads, logit_kernels.log_sum_exp, logits, total, top)
    return total, total - logits[np.arange(len(logits)), targets], top


def _spread(threads: int, kernel: Callable[..., Any], *arrays: Any) -> None:
    """Run a kernel on row ranges of all arrays, one range per thread."""
    count = len(arrays[0])
    cuts = np.linspace(0, count, min(threads, count) + 1).astype(int)
    parts = [tuple(a[i:j] for a in arrays) for i, j in pairwise(cuts)]
    if len(parts) == 1:
        kernel(*parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        for future in [pool.submit(kernel, *part) for part in parts]:
            future.result()


class ExactReference:
    """The base's own logits.

    Args:
        logits: [n, v] float32; not copied.
        targets: [n], the actual next tokens.
        threads: for the kernels.
    """

    def __init__(self, logits: F32, targets: I64, threads: int) -> None:
        self.logits = logits
        self.total, self.nll, self.top = normalize(logits, targets, threads)

    def against(self, logits: F32, targets: I64, threads: int) -> ChunkComparison:
        """Compare a candidate's logits, [n, v]."""
        total, nll, top = normalize(logits, targets, threads)
        kld = np.empty(len(logits))
        _spread(threads, logit_kernels.compare, self.logits, self.total, logits, total, kld)
        return ChunkComparison(nll, top, kld)

    def of(self, row: int, ids: I64) -> F64:
        """Return the log probabilities of tokens in a row, [len(ids)]."""
        found: F64 = self.logits[row, ids].astype(np.float64) - self.total[row]
        return found

    def spread(self, row: int) -> tuple[float, float]:
        """Return the sum of p log p of a row, and the log probability of its least likely token."""
        return _spread_of(self.logits[row].astype(np.float64) - self.total[row])


def _spread_of(log_p: F64) -> tuple[float, float]:
    return float((np.exp(log_p) * log_p).sum()), float(log_p.min())


class SixteenBitReference:
    """A chunk of a llama-perplexity file.

    Args:
        words: [n, v] uint16.
        scale: [n] float32.
        least: [n] float32; a log probability is ``scale * word + least``.
        targets: [n], the actual next tokens.
    """

    def __init__(self, words: U16, scale: F32, least: F32, targets: I64) -> None:
        self.words, self.scale, self.least = words, scale, least
        target_words = words[np.arange(len(words)), targets].astype(np.float32)
        self.nll = -(scale * target_words + least).astype(np.float64)
        self.top = words.argmax(axis=1)

    def against(self, logits: F32, targets: I64, threads: int) -> ChunkComparison:
        """Compare a candidate's logits, [n, v]; the divergence has the file's 16-bit precision."""
        total, nll, top = normalize(logits, targets, threads)
        kld = np.empty(len(logits))
        arrays = (self.words, self.scale, self.least, logits, total, kld)
        _spread(threads, logit_kernels.compare_sixteen, *arrays)
        return ChunkComparison(nll, top, kld)

    def of(self, row: int, ids: I64) -> F64:
        """Return the log probabilities of tokens in a row, [len(ids)]."""
        words = self.words[row, ids].astype(np.float64)
        found: F64 = float(self.scale[row]) * words + float(self.least[row])
        return found

    def spread(self, row: int) -> tuple[float, float]:
        """Return the sum of p log p of a row, and the log probability of its least likely token."""
        return _spread_of(self.of(row, np.arange(self.words.shape[1])))


def _compare_compact(*rows: Any, ids: Any, kept: Any) -> None:
    # `_spread` slices positional arrays by row; ids and kept are indexed by token instead.
    logit_kernels.compare_compact(*rows, ids, kept)


@dataclass(frozen=True)
class CompactReference:
    """The likely tokens of each row, and the sum over the others.

    The divergence counts the kept tokens one by one and all others as a single token, so by the log
    sum inequality it is never above the true one. It misses ``rest * KL(others of base || others of
    candidate)``, which is at most ``inner + rest * log(q(others) / min q)``.

    Args:
        nll: [n] float64.
        top: [n] int64.
        starts: [n + 1] int64, index of each row's first token.
        ids: tokens, ascending in each row.
        kept: [starts[-1]] float32, log probabilities of `ids`.
        rest: [n] float64, the probability of all other tokens.
        inner: [n] float64, the sum of p * log(p / rest) over them, 0 or less.
    """

    nll: F64
    top: I64
    starts: I64
    ids: npt.NDArray[np.uint32]
    kept: F32
    rest: F64
    inner: F64

    def against(self, logits: F32, targets: I64, threads: int) -> ChunkComparison:
        """Compare a candidate's logits, [n, v]; `ChunkComparison.bound` bounds the error."""
        total, nll, top = normalize(logits, targets, threads)
        kld, spread = np.empty(len(logits)), np.empty(len(logits))
        ranges = (self.starts[:-1], self.starts[1:], self.rest)
        kernel = partial(_compare_compact, ids=self.ids, kept=self.kept)
        _spread(threads, kernel, *ranges, logits, total, kld, spread)
        bound = np.maximum(0.0, self.inner + self.rest * spread)
        return ChunkComparison(nll, top, kld, bound)

    def of(self, row: int, ids: I64) -> F64:
        """Return the log probabilities of tokens in a row, [len(ids)]; NaN for those not kept."""
        begin, end = self.starts[row : row + 2]
        known = self.ids[begin:end].astype(np.int64)
        found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        values = self.kept[begin:end].astype(np.float64)[found]
        return np.where(known[found] == ids, values, np.nan)

    def spread(self, row: int) -> tuple[float, float]:
        """Return the sum of p log p of a row, and the log probability of its least likely token.

        Tokens that are not kept count as a thousandth of all of them.
        """
        begin, end = self.starts[row : row + 2]
        kept = self.kept[begin:end].astype(np.float64)
        inside, least = float((np.exp(kept) * kept).sum()), float(kept.min())
        rest = float(self.rest[row])
        if rest <= 0:
            return inside, least
        others = rest * np.log(rest) + float(self.inner[row])
        return inside + others, min(least, float(np.log(rest)) - np.log(1000))
