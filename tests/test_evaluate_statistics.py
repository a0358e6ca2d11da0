"""Divergence and its statistics: what must hold for any logits, against NumPy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen35.evaluation.divergence import PERCENTILES, Series, compare_series, mean, perplexity
from qwen35.evaluation.reference import ChunkComparison, ExactReference, normalize

F32 = npt.NDArray[np.float32]

FEW = settings(max_examples=50)

logits = st.integers(2, 700).flatmap(
    lambda width: arrays(np.float32, (2, 3, width), elements=st.floats(-40, 40, width=32))
)
"""A base's and a candidate's rows, narrower and wider than the kernels' lanes."""


def compare(base: F32, candidate: F32, threads: int = 1) -> ChunkComparison:
    targets = np.zeros(len(base), np.int64)
    return ExactReference(base, targets, threads).against(candidate, targets, threads)


def plain(base: F32, candidate: F32) -> npt.NDArray[np.float64]:
    """The divergence by its formula."""
    p, q = (_log_softmax(rows.astype(np.float64)) for rows in (base, candidate))
    found: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return found


def _log_softmax(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = rows - rows.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


@given(logits)
@FEW
def test_divergence_is_its_formula_and_never_negative(pair: F32) -> None:
    found = compare(*pair).kld
    assert (found >= 0).all()
    assert found == pytest.approx(plain(*pair), rel=1e-9, abs=1e-12)


@given(logits)
@FEW
def test_equal_logits_have_none(pair: F32) -> None:
    assert (compare(pair[0], pair[0].copy()).kld == 0).all()


@given(logits, st.integers(-50, 50))
@FEW
def test_a_constant_changes_nothing(pair: F32, constant: int) -> None:
    whole = np.round(pair * 16) / 16  # so that adding the constant rounds nothing
    moved = compare(whole[0] + np.float32(constant), whole[1])
    still = compare(whole[0], whole[1])
    assert moved.kld == pytest.approx(still.kld, rel=1e-9, abs=1e-12)
    both = compare(whole[0], whole[1] + np.float32(constant))
    assert both.kld == pytest.approx(still.kld, rel=1e-9, abs=1e-12)
    assert both.nll == pytest.approx(still.nll, abs=1e-12)


@given(logits)
@FEW
def test_log_probabilities_and_top(pair: F32) -> None:
    targets = np.arange(3) % pair.shape[2]
    total, nll, top = normalize(pair[0], targets, 1)
    expected = _log_softmax(pair[0].astype(np.float64))
    assert nll == pytest.approx(-expected[np.arange(3), targets], abs=1e-12)
    assert top.tolist() == pair[0].argmax(axis=1).tolist()
    assert total == pytest.approx(np.log(np.exp(pair[0].astype(np.float64)).sum(axis=1)))


def test_threads_do_not_change_a_bit() -> None:
    pair = np.random.default_rng(5).normal(0, 4, (2, 7, 1000)).astype(np.float32)
    one, three = (compare(pair[0], pair[1], threads) for threads in (1, 3))
    assert one.kld.tobytes() == three.kld.tobytes()
    assert one.nll.tobytes() == three.nll.tobytes()


def test_nan_is_not_lost() -> None:
    pair = np.zeros((2, 2, 600), np.float32)
    pair[1, 1, 550] = np.nan
    found = compare(*pair)
    assert math.isnan(found.nll[1])
    assert not math.isnan(found.nll[0])


def test_an_extreme_pair_stays_finite() -> None:
    base, candidate = np.zeros((2, 1, 300), np.float32)
    base[0, 0], candidate[0, 1] = 900, 900
    assert compare(base, candidate).kld == pytest.approx([900.0], rel=1e-6)


values = arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(6, 40)),
                elements=st.floats(0, 5))  # fmt: skip


def series(nll: Any, kld: Any = None, top: Any = 0) -> Series:
    return Series(nll, np.broadcast_to(top, nll.shape).astype(np.int64), kld)


@given(values)
@FEW
def test_percentiles_interpolate_between_neighbours(kld: npt.NDArray[np.float64]) -> None:
    found = compare_series(series(kld * 0), series(kld * 0, kld))
    ordered = sorted(kld.reshape(-1))
    for percent in PERCENTILES:
        place = percent / 100 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        expected = ordered[low] + (place - low) * (ordered[high] - ordered[low])
        assert found.percentiles[percent] == pytest.approx(expected, abs=1e-12)
        assert found.percentiles[percent] == pytest.approx(np.percentile(kld, percent))
    assert found.maximum == ordered[-1]
    assert found.minimum == ordered[0]


@given(values)
@FEW
def test_errors_by_tokens_and_by_chunks(x: npt.NDArray[np.float64]) -> None:
    found = mean(x)
    n = x.size
    variance = (x**2).mean() - x.mean() ** 2
    assert found.error == pytest.approx(math.sqrt(max(0, variance) / (n - 1)), abs=1e-7)
    by_chunk = x.mean(axis=1)
    expected = by_chunk.std(ddof=1) / math.sqrt(len(by_chunk))
    assert found.block_error == pytest.approx(expected, abs=1e-12)


def test_the_error_by_chunks_is_right_where_tokens_of_a_chunk_agree() -> None:
    """Simulated: chunks differ, tokens in a chunk hardly. The error by tokens is far too small."""
    generator = np.random.default_rng(7)
    means, tokens, chunks = [], [], []
    for _ in range(400):
        x = generator.normal(0, 1, (16, 1)) + generator.normal(0, 0.1, (16, 40))
        found = mean(x)
        assert found.block_error is not None
        means.append(found.value)
        tokens.append(found.error)
        chunks.append(found.block_error)
    spread = float(np.std(means))
    assert np.mean(chunks) == pytest.approx(spread, rel=0.1)
    assert np.mean(tokens) < spread / 4


@given(values, values.map(lambda x: x.mean()))
@FEW
def test_perplexities_and_their_ratio(x: npt.NDArray[np.float64], more: float) -> None:
    base, candidate = series(x), series(x + more, x)
    found = compare_series(base, candidate)
    assert perplexity(x).value == pytest.approx(math.exp(x.mean()))
    assert found.ratio.value == pytest.approx(math.exp(more))
    assert found.ratio.error == pytest.approx(0, abs=1e-6)
    assert found.perplexity.value == pytest.approx(found.base_perplexity.value * found.ratio.value)
    assert found.difference.value == pytest.approx(
        found.perplexity.value - found.base_perplexity.value
    )


def test_errors_of_the_ratio_use_the_covariance() -> None:
    """llama-perplexity's formula: var(a) + var(b) - 2 cov(a, b), each over n - 1."""
    generator = np.random.default_rng(3)
    a = generator.exponential(2, (4, 50))
    b = a + generator.normal(0, 0.2, a.shape)
    found = compare_series(series(a), series(b, a * 0))
    n = a.size
    va, vb = (float(x.var()) / (n - 1) for x in (a, b))
    covariance = float((a * b).mean() - a.mean() * b.mean()) / (n - 1)
    expected = math.sqrt(va + vb - 2 * covariance)
    assert found.log_ratio.error == pytest.approx(expected)
    assert found.ratio.error == pytest.approx(found.ratio.value * expected)
    assert found.correlation == pytest.approx(covariance / math.sqrt(va * vb))


def test_change_of_probability_and_top() -> None:
    nll = np.log(1 / np.full((2, 20), 0.5))
    other = np.log(1 / np.full((2, 20), 0.4))
    top = np.zeros((2, 20))
    top[0, :5] = 1
    found = compare_series(series(nll), series(other, nll * 0, top))
    assert found.change.value == pytest.approx(-0.1)
    assert found.change_rms.value == pytest.approx(0.1)
    assert found.same_top.value == pytest.approx(35 / 40)
    assert found.same_top.error == pytest.approx(math.sqrt(35 / 40 * 5 / 40 / 39))
