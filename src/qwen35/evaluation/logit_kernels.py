"""Numba kernels over logits: one pass per pair of rows, without temporary arrays.

Sums run in 256 lanes that are added in order, so they vectorize, yet no result depends on the
processor's vector width or the number of threads. All arithmetic is float64; logits are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined

__all__ = ["compare", "compare_compact", "compare_sixteen", "log_sum_exp"]

_LANES = 256
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471805599453, 2.3190468138462996e-17  # ln 2 in two parts
_SHIFT = 6755399441055744.0
"""1.5 * 2**52: adding it rounds to an integer, which is then in the low bits."""

_LEAST = -700.0
"""Arguments of `_exp` are clamped here, where e**x is still a normal float64."""

_CUT = -16.0
"""llama-perplexity skips tokens whose base log probability is not above this."""


@inlined
def _exp(x: Any) -> Any:
    """Return e**x for x <= 0, to a relative 1e-15: 2**n times a Taylor polynomial.

    Inlined and free of branches and calls, so that the loops around it vectorize.
    """
    x = max(x, _LEAST)
    shifted = x * _LOG2E + _SHIFT
    whole = shifted - _SHIFT
    r = x - whole * _LN2_HIGH
    r = r - whole * _LN2_LOW
    p = 1 / 479001600 * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    bits = np.int64((np.float64(shifted).view(np.int64) + np.int64(1023)) << np.int64(52))
    return p * np.int64(bits).view(np.float64)


@compiled
def _top(row: Any) -> Any:
    """Return the index of the largest value, the first of equals; -1 if any value is NaN."""
    lanes = row[:1].repeat(_LANES)
    whole = row.size - row.size % _LANES
    # NaN is counted rather than branched on, so that the loop vectorizes.
    nans: Any = 0
    for start in range(0, whole, _LANES):
        for k in range(_LANES):
            value = row[start + k]
            nans += np.int32(value != value)
            lanes[k] = max(lanes[k], value)
    largest = lanes.max()
    for j in range(whole, row.size):
        nans += np.int32(row[j] != row[j])
        largest = max(largest, row[j])
    if nans:
        return -1
    for j in range(row.size):
        if row[j] == largest:
            return j
    return -1


@compiled
def log_sum_exp(logits: Any, total: Any, top: Any) -> Any:
    """Compute log-sum-exp and top token of each row.

    logits: [n, v] float32 -> total: [n] float64, log of the sum of exponentials; top: [n] int64,
    index of the largest, or -1 in a row with NaN (its total is NaN too).
    """
    lanes = np.empty(_LANES)
    for i in range(logits.shape[0]):
        row = logits[i]
        top[i] = _top(row)
        if top[i] < 0:
            total[i] = np.nan
            continue
        largest = np.float64(row[top[i]])
        lanes[:] = 0.0
        whole = row.size - row.size % _LANES
        for start in range(0, whole, _LANES):
            for k in range(_LANES):
                lanes[k] += _exp(np.float64(row[start + k]) - largest)
        for j in range(whole, row.size):
            lanes[j - whole] += _exp(np.float64(row[j]) - largest)
        total[i] = largest + np.log(lanes.sum())


@compiled
def compare(base: Any, base_total: Any, logits: Any, total: Any, kld: Any) -> Any:
    """Compute the Kullback-Leibler divergence of rows from the base's, in nats.

    base, logits: [n, v] float32; base_total, total: their `log_sum_exp` -> kld: [n] float64, the
    sum of p * (log p - log q), never below 0.
    """
    lanes = np.empty(_LANES)
    for i in range(logits.shape[0]):
        p, q, norm = base[i], logits[i], base_total[i]
        lanes[:] = 0.0
        whole = p.size - p.size % _LANES
        for start in range(0, whole, _LANES):
            for k in range(_LANES):
                x = np.float64(p[start + k])
                lanes[k] += _exp(x - norm) * (x - np.float64(q[start + k]))
        for j in range(whole, p.size):
            x = np.float64(p[j])
            lanes[j - whole] += _exp(x - norm) * (x - np.float64(q[j]))
        # The normalizers are constant over a row, so they are added once after the loop. Rounding
        # may then leave equal rows a little below 0.
        kld[i] = max(0.0, lanes.sum() - (norm - total[i]))


@compiled
def compare_sixteen(words: Any, scale: Any, least: Any, logits: Any, total: Any, kld: Any) -> Any:
    """Compute the divergence of rows from 16-bit log probabilities, like llama-perplexity.

    words: [n, v] uint16; scale, least: [n] float32: a log probability is scale * word + least in
    float32; logits: [n, v] float32; total: their `log_sum_exp` -> kld: [n] float64. It may be below
    0: the stored probabilities do not add up to 1, and tokens at `_CUT` or below are skipped.
    """
    lanes = np.empty(_LANES)
    for i in range(logits.shape[0]):
        w, q, norm = words[i], logits[i], total[i]
        step, low = scale[i], least[i]
        lanes[:] = 0.0
        whole = q.size - q.size % _LANES
        for start in range(0, whole, _LANES):
            for k in range(_LANES):
                x = np.float64(np.float32(step * np.float32(w[start + k])) + low)
                mask = np.float64(x > _CUT)  # a factor, not a branch, so that the loop vectorizes
                lanes[k] += mask * _exp(x) * (x - np.float64(q[start + k]) + norm)
        for j in range(whole, q.size):
            x = np.float64(np.float32(step * np.float32(w[j])) + low)
            if x > _CUT:
                lanes[j - whole] += _exp(x) * (x - np.float64(q[j]) + norm)
        kld[i] = lanes.sum()


@compiled
def compare_compact(
    begins: Any,
    ends: Any,
    rest: Any,
    logits: Any,
    total: Any,
    kld: Any,
    spread: Any,
    ids: Any,
    kept: Any,
) -> Any:
    """Compute the divergence from a base of which only the likely tokens are stored.

    begins, ends: [n] int64, each row's range in ids (ascending tokens) and kept (their log
    probabilities); rest: [n] float64, total probability of the others; logits: [n, v] float32;
    total: their `log_sum_exp` -> kld: [n] float64, with the others as one token; spread: [n]
    float64, the model's log probability of all others together minus that of its least likely
    token.
    """
    for i in range(logits.shape[0]):
        row, norm = logits[i], total[i]
        inside, others, low = 0.0, 0.0, np.float64(row[0])
        slot = begins[i]
        for j in range(row.size):
            x = np.float64(row[j])
            low = min(low, x)
            if slot < ends[i] and ids[slot] == j:
                log_p = np.float64(kept[slot])
                inside += np.exp(log_p) * (log_p - x + norm)
                slot += 1
            else:
                others += _exp(x - norm)
        log_others = np.log(max(others, 1e-300))  # 0 if every token is kept
        if rest[i] > 0.0:
            inside += rest[i] * (np.log(rest[i]) - log_others)
        kld[i] = max(0.0, inside)
        spread[i] = log_others - (low - norm)
