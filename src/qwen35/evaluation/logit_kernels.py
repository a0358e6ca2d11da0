"""The inner loops over logits, compiled by Numba: one pass over a pair of rows, nothing kept.

Sums run in 256 lanes that are added up in order, so that they vectorize and still depend on no
processor's vector width. Everything is float64 but the logits themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen35.codecs.compiled import compiled, inlined

__all__ = ["compare", "compare_compact", "compare_sixteen", "log_sum_exp"]

_LANES = 256
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471805599453, 2.3190468138462996e-17
_SHIFT = 6755399441055744.0
"""1.5 * 2**52: adding it rounds to a whole number, which is then in the low bits."""

_LEAST = -700.0
_CUT = -16.0
"""llama-perplexity leaves out tokens whose base log probability is not above this."""


@inlined
def _exp(x: Any) -> Any:
    """Return e**x to 1e-15 relative, for x <= 0: 2**n times a Taylor polynomial, no branch."""
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
    odd: Any = 0
    for start in range(0, whole, _LANES):
        for k in range(_LANES):
            value = row[start + k]
            odd += np.int32(value != value)  # NaN
            lanes[k] = max(lanes[k], value)
    largest = lanes.max()
    for j in range(whole, row.size):
        odd += np.int32(row[j] != row[j])
        largest = max(largest, row[j])
    if odd:
        return -1
    for j in range(row.size):
        if row[j] == largest:
            return j
    return -1


@compiled
def log_sum_exp(logits: Any, total: Any, top: Any) -> Any:
    """Normalize rows.

    logits: [n, v] float32 -> total: [n] float64, log of the sum of exponentials; top: [n] int64,
    where the largest is, -1 in a row that holds NaN (its total is NaN too).
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
    """Kullback-Leibler divergence of rows from the base's, in nats.

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
        kld[i] = max(0.0, lanes.sum() - (norm - total[i]))


@compiled
def compare_sixteen(words: Any, scale: Any, least: Any, logits: Any, total: Any, kld: Any) -> Any:
    """Kullback-Leibler divergence of rows from 16-bit log probabilities, as llama-perplexity's.

    words: [n, v] uint16; scale, least: [n] float32, so that a log probability is scale * word +
    least in float32; logits: [n, v] float32; total: their `log_sum_exp` -> kld: [n] float64. It may
    be below 0: the words do not add up to 1, and tokens at `_CUT` or below are left out.
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
                taken = np.float64(x > _CUT)
                lanes[k] += taken * _exp(x) * (x - np.float64(q[start + k]) + norm)
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
    """Kullback-Leibler divergence from a base of which only the likely tokens are known.

    begins, ends: [n] int64, which of ids (ascending) and kept, tokens and log probabilities, are a
    row's; rest: [n] float64, the probability of all others together; logits: [n, v] float32; total:
    their `log_sum_exp` -> kld: [n] float64, the others counted as one; spread: [n] float64, how far
    the model's log probabilities of the least likely token and of all others together are apart.
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
        log_others = np.log(max(others, 1e-300))
        if rest[i] > 0.0:
            inside += rest[i] * (np.log(rest[i]) - log_others)
        kld[i] = max(0.0, inside)
        spread[i] = log_others - (low - norm)
