"""Refined codes: what must hold whatever the weights, the grid and the inputs are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.fp8.arrays import e4m3_levels
from qwen35.codecs.ggml.grids import GRIDS, grid_of, with_codes
from qwen35.codecs.ggml.library import find_library
from qwen35.codecs.ggml.quantizers import encode
from qwen35.codecs.ggml.stored import decode
from qwen35.codecs.ggml.types import GGML_TYPES, REFINED
from qwen35.codecs.nf4.tables import LEVELS
from qwen35.codecs.refining import CodeGrid, Curvature, refined_codes, row_losses, searched_scales
from refined_grids import INTEGERS, Pair, grid_for, nearest, pair_of, weights_of


def loss(weights: F32, grid: CodeGrid, codes: U8, hessian: Array) -> Array:
    errors = grid.values(codes).astype(np.float64) - weights
    rows: Array = np.einsum("rj,jk,rk->r", errors, hessian.astype(np.float64), errors)
    return rows


def damped(pair: Pair) -> Array:
    wide = pair.fit.astype(np.float64)
    added = np.float32(0.01 * wide.diagonal().mean())
    return wide + added * np.eye(len(wide))


LEVELS_OF = {"integers": INTEGERS, "nf4": LEVELS, "e4m3": e4m3_levels().values}


@pytest.mark.parametrize("levels", LEVELS_OF)
def test_a_diagonal_hessian_gives_the_nearest_codes(levels: str) -> None:
    weights, drawn = weights_of(20, 64), np.random.default_rng(2)
    grid = grid_for(weights, LEVELS_OF[levels])
    diagonal = np.diag(drawn.exponential(size=64)).astype(np.float32)
    guesses = drawn.integers(0, len(grid.levels), weights.shape).astype(np.uint8)
    start = replace(grid, codes=guesses)
    codes = refined_codes(weights, start, Curvature.of(Pair(diagonal, diagonal)))
    np.testing.assert_array_equal(grid.values(codes), grid.values(grid.codes))


@pytest.mark.parametrize("levels", LEVELS_OF)
def test_the_loss_falls_with_each_step(levels: str) -> None:
    weights, pair = weights_of(40, 128), pair_of(128)
    grid, curvature = grid_for(weights, LEVELS_OF[levels]), Curvature.of(pair)
    fed_back = refined_codes(weights, grid, curvature, sweeps=0)
    descended = refined_codes(weights, grid, curvature)
    plain, first, second = (
        loss(weights, grid, codes, damped(pair)) for codes in (grid.codes, fed_back, descended)
    )
    assert (second <= first * (1 + 1e-5)).all()
    assert (second < first).any()
    assert second.sum() < first.sum() < 0.8 * plain.sum()


def test_error_feedback_is_gptq() -> None:
    weights, pair = weights_of(12, 64), pair_of(64)
    grid = grid_for(weights)
    codes = refined_codes(weights, grid, Curvature.of(pair), sweeps=0)
    order = np.argsort(-pair.fit.diagonal(), kind="stable")
    # as GPTQ's authors write it: with the upper Cholesky factor of the inverse
    upper = np.linalg.cholesky(np.linalg.inv(damped(pair)[np.ix_(order, order)])).T
    group = 64 // grid.scales.shape[1]
    scales, offsets = (
        np.repeat(one.astype(np.float64), group, axis=1)[:, order]
        for one in (grid.scales, grid.offsets)
        if one is not None
    )
    left, expected = weights[:, order].astype(np.float64), np.empty(weights.shape)
    for j in range(64):
        steps = np.clip(np.rint((left[:, j] - offsets[:, j]) / scales[:, j]), 0, 15)
        expected[:, order[j]] = steps
        error = (left[:, j] - (scales[:, j] * steps + offsets[:, j])) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    assert (codes == expected).mean() > 0.97  # those that reach too far from their weight differ


@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=25)
def test_all_codes_tried_bound_it(columns: int, seed: int, spectrum: float) -> None:
    weights = weights_of(3, columns, seed)
    pair = pair_of(columns, 30, seed=seed, spectrum=spectrum)
    grid = grid_for(weights, INTEGERS[:4], columns)
    curvature = Curvature.of(pair)
    found = loss(weights, grid, refined_codes(weights, grid, curvature), damped(pair))
    tried = np.array(list(itertools.product(range(4), repeat=columns)), np.uint8)
    for row in range(3):
        one = CodeGrid(
            tried,
            np.repeat(grid.scales[row : row + 1], len(tried), axis=0),
            grid.levels,
            None if grid.offsets is None else np.repeat(grid.offsets[[row]], len(tried), axis=0),
        )
        same = np.repeat(weights[row : row + 1], len(tried), axis=0)
        losses = loss(same, one, tried, damped(pair))
        assert losses.min() * (1 - 1e-5) <= found[row]
        # no other code of a single column is better, of those within reach
        own = refined_codes(weights, grid, curvature)[row]
        single = (tried != own).sum(1) <= 1
        near = np.abs(one.values(tried) - same).max(1) <= np.abs(grid.scales[row]).max()
        assert found[row] <= losses[single & near].min(initial=np.inf) * (1 + 1e-3) + 1e-12


def test_the_best_of_the_scales_is_chosen() -> None:
    weights, pair = weights_of(30, 96), pair_of(96)
    grid = grid_for(weights, LEVELS)
    grid = replace(grid, offsets=None)
    grid.scales[3, 1] = 0
    others = np.stack([grid.scales * np.float32(factor) for factor in (0.8, 1.1, 0.9)])
    chosen = searched_scales(weights, grid, others, Curvature.of(pair))
    diagonal = damped(pair).diagonal()
    errors = []
    for scales in (grid.scales, *others):
        one = replace(grid, scales=scales)
        squared = np.square(one.values(nearest(weights, one)).astype(np.float64) - weights)
        errors.append((squared * diagonal).reshape(30, -1, 32).sum(-1))
    assert set(np.unique(chosen)) >= {0, 2, 3}
    picked = np.take_along_axis(np.array(errors), chosen[None].astype(np.intp), 0)[0]
    np.testing.assert_allclose(picked, np.min(errors, axis=0), rtol=1e-6)
    assert chosen[3, 1] == 0


def test_no_row_depends_on_another() -> None:
    weights, curvature = weights_of(100, 96), Curvature.of(pair_of(96))
    grid = grid_for(weights)
    expected = refined_codes(weights, grid, curvature)
    order = np.random.default_rng(3).permutation(100)
    for rows in (order, np.arange(1), np.arange(17, 40), order[:65]):
        part = CodeGrid(grid.codes[rows], grid.scales[rows], grid.levels, grid.offsets[rows])  # type: ignore[index]
        np.testing.assert_array_equal(refined_codes(weights[rows], part, curvature), expected[rows])


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_too_few_tokens_and_dead_columns_stay_finite(tokens: int) -> None:
    weights, pair = weights_of(16, 64), pair_of(64, max(tokens, 2))
    for matrix in (pair.fit, pair.held_out):
        matrix[:, 5:9] = matrix[5:9] = 0
    grid, curvature = grid_for(weights), Curvature.of(pair)
    assert np.isfinite(curvature.feedback).all()
    codes = refined_codes(weights, grid, curvature)
    assert (codes < 16).all()
    np.testing.assert_array_equal(codes[:, 5:9], grid.codes[:, 5:9])
    assert (
        loss(weights, grid, codes, damped(pair)).sum()
        <= loss(weights, grid, grid.codes, damped(pair)).sum()
    )


def test_inputs_that_are_all_zero_are_of_no_use() -> None:
    zeros = np.zeros((64, 64), np.float32)
    assert not Curvature.of(Pair(zeros, zeros)).useful
    assert not Curvature.of(Pair(pair_of(64).fit, zeros)).useful


def test_what_is_no_sum_of_squares_is_of_no_use_and_does_no_harm() -> None:
    weights, pair = weights_of(8, 64), pair_of(64)
    for matrix in (pair.fit - np.float32(1e4), np.full((64, 64), np.float32(3.4e38)), -pair.fit):
        curvature = Curvature.of(Pair(matrix, pair.held_out))
        assert not curvature.useful
        assert (refined_codes(weights, grid_for(weights), curvature) < 16).all()


def test_a_scale_of_zero_keeps_its_codes() -> None:
    weights = weights_of(8, 64)
    grid = grid_for(weights)
    grid.scales[:, 1] = 0
    codes = refined_codes(weights, grid, Curvature.of(pair_of(64)))
    np.testing.assert_array_equal(codes[:, 32:], grid.codes[:, 32:])


def test_losses_are_those_of_the_held_out_tokens() -> None:
    weights, pair = weights_of(37, 64), pair_of(64)
    grid = grid_for(weights)
    found = row_losses(weights, grid, grid.codes, Curvature.of(pair))
    np.testing.assert_allclose(found, loss(weights, grid, grid.codes, pair.held_out), rtol=1e-4)


def test_columns_that_were_reordered_read_their_own_inputs() -> None:
    weights, pair = weights_of(8, 64), pair_of(64)
    columns = np.random.default_rng(4).permutation(64)
    grid = grid_for(weights, group=64)
    moved = CodeGrid(grid.codes[:, columns], grid.scales, grid.levels, grid.offsets)
    expected = refined_codes(weights, grid, Curvature.of(pair))[:, columns]
    found = refined_codes(weights[:, columns], moved, Curvature.of(pair, columns))
    np.testing.assert_array_equal(found, expected)


# --- ggml's blocks

needs_library = pytest.mark.skipif(find_library() is None, reason="needs llama-cpp-python")


def test_the_types_that_are_refined_have_grids() -> None:
    assert set(REFINED) == GRIDS.keys()


@pytest.mark.parametrize(
    "kind", [*sorted(GRIDS.keys() - {"nvfp4"}), pytest.param("nvfp4", marks=needs_library)]
)
def test_blocks_hold_the_codes_that_they_are_given(kind: str) -> None:
    weights = weights_of(6, 512, 7) * np.float32(50)
    data = np.frombuffer(encode("x", weights, kind, None), np.uint8)
    grid = grid_of(data, kind, weights.shape)
    row = GGML_TYPES[kind]
    decoded = decode(data, row).reshape(-1)
    np.testing.assert_array_equal(grid.values(grid.codes).reshape(-1), decoded)
    np.testing.assert_array_equal(with_codes(data, kind, grid.codes), data)
    drawn = np.random.default_rng(8).integers(0, len(grid.levels), weights.shape).astype(np.uint8)
    other = with_codes(data, kind, drawn)
    again = grid_of(other, kind, weights.shape)
    np.testing.assert_array_equal(again.codes, drawn)
    np.testing.assert_array_equal(again.scales, grid.scales)
    np.testing.assert_array_equal(grid.values(drawn).reshape(-1), decode(other, row).reshape(-1))


@pytest.mark.parametrize(
    "kind", [*sorted(GRIDS.keys() - {"nvfp4"}), pytest.param("nvfp4", marks=needs_library)]
)
def test_every_type_errs_less_in_outputs(kind: str) -> None:
    weights, pair = weights_of(16, 512, 9) * np.float32(50), pair_of(512, 1200)
    importance = pair.fit.diagonal().copy()
    data = np.frombuffer(encode("x", weights, kind, importance), np.uint8)
    grid = grid_of(data, kind, weights.shape)
    codes = refined_codes(weights, grid, Curvature.of(pair))
    before, after = (loss(weights, grid, one, pair.held_out).sum() for one in (grid.codes, codes))
    assert after < 0.8 * before
