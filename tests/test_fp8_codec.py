"""The FP8 codec beside plain PyTorch: scales, codes, and what each mode is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import (
    E4M3,
    candidates,
    decode,
    encode,
    expected_scale,
    losses,
    tiles,
    to_codes,
    try_encode,
)
from qwen35.codecs.fp8 import kernels as fp8_kernels
from qwen35.codecs.fp8.arrays import e4m3_values, encode_rows
from qwen35.codecs.fp8.layout import ScaleChoice, ScaleMode, fits, layout
from qwen35.errors import UsageError
from qwen35.tensors import TensorSpec

MODES: tuple[ScaleMode, ...] = ("rms", "max", "percentile", "mse", "search")
ALL = [ScaleChoice(mode) for mode in MODES]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gaussian(rows: int = 256, columns: int = 384, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(rows: int = 256, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Return values of Student's t distribution with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.randn(4, rows, columns, generator=generator).square().sum(0)
    return (normal / (chi / 4).sqrt() * 0.02).bfloat16().float()


def channel_weights(columns: int, seed: int = 1) -> torch.Tensor:
    """Return weights of columns, some of which hardly matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(columns, generator=generator).pow(8) * 10


def error(weight: torch.Tensor, scale_choice: ScaleChoice) -> float:
    """Return the squared error of a weight."""
    return float((decode(*encode(weight, scale_choice)).double() - weight.double()).square().sum())


def saturated(weight: torch.Tensor, scale_choice: ScaleChoice) -> int:
    """Count values that lie beyond the largest code."""
    _, scales = encode(weight, scale_choice)
    ratio = tiles(weight.float()).abs() / scales.float()[:, :, None, None]
    return int((ratio > 464).sum())  # 464 is midway between 448 and the next step


# --- scales and codes, exactly


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_choice", ALL, ids=str)
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_codes_are_the_nearest_values_for_the_stored_scale(
    make: Any, scale_choice: ScaleChoice, dtype: torch.dtype
) -> None:
    weight = make().to(dtype)
    codes, scales = encode(weight, scale_choice)
    assert torch.equal(codes.view(torch.uint8), to_codes(weight, scales).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale_choice",
    [
        ScaleChoice("max"),
        ScaleChoice("rms"),
        ScaleChoice("rms", rms_factor=2.5),
        ScaleChoice("percentile"),
        ScaleChoice("percentile", percentile=99),
        ScaleChoice("percentile", percentile=100),
        ScaleChoice("percentile", percentile=0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_scales_are_those_of_the_formula(
    make: Any, scale_choice: ScaleChoice, dtype: torch.dtype
) -> None:
    weight = make().to(dtype)
    _, scales = encode(weight, scale_choice)
    for row, line in enumerate(tiles(weight)):
        for column, tile in enumerate(line):
            assert scales[row, column] == expected_scale(tile, scale_choice)


def test_weighted_rms_is_that_of_the_formula() -> None:
    weight, columns = heavy_tailed(256, 384), channel_weights(384)
    _, scales = encode(weight, ScaleChoice("rms"), columns)
    _, even = encode(weight, ScaleChoice("rms"))
    for row, line in enumerate(tiles(weight)):
        for column, tile in enumerate(line):
            own = columns[column * 128 : (column + 1) * 128]
            assert scales[row, column] == expected_scale(tile, ScaleChoice("rms"), own)
    assert not torch.equal(scales, even)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", [1, 2, 7, 50])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_mse_chooses_the_least_error_of_its_grid(make: Any, grid: int, weighted: bool) -> None:
    weight = make(128, 256)
    columns = channel_weights(256) if weighted else torch.ones(256)
    scale_choice = ScaleChoice("mse", grid_size=grid)
    _, scales = encode(weight, scale_choice, columns if weighted else None)
    for number, tile in enumerate(tiles(weight)[0]):
        choice = candidates(tile, scale_choice)
        assert scales[0, number] in choice
        own = columns[number * 128 : (number + 1) * 128]
        least = losses(tile, choice, own).min()
        assert losses(tile, scales[0, number], own) <= least * (1 + 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_search_chooses_the_least_error_of_an_octave(make: Any, weighted: bool) -> None:
    weight = make(128, 256)
    columns = channel_weights(256) if weighted else torch.ones(256)
    _, scales = encode(weight, ScaleChoice("search"), columns if weighted else None)
    for number, tile in enumerate(tiles(weight)[0]):
        first = expected_scale(tile, ScaleChoice("max"))
        bits = int(first.view(torch.int16)) + torch.arange(0, 128, 4, dtype=torch.int16)
        octave = bits.view(torch.bfloat16)
        assert scales[0, number] in octave
        own = columns[number * 128 : (number + 1) * 128]
        least = losses(tile, octave, own).min()
        assert losses(tile, scales[0, number], own) <= least * (1 + 1e-5)


def test_every_code_comes_back() -> None:
    """All 254 numbers in a tile whose scale is a power of two."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    tile = torch.zeros(128 * 128, dtype=torch.uint8)
    tile[: len(codes)] = codes
    tile = tile.reshape(128, 128)
    for exponent in (-20, -3, 0, 5):
        weight = tile.view(E4M3).float() * 2.0**exponent
        got, scales = encode(weight, ScaleChoice("max"))
        assert float(scales[0, 0]) == 2.0**exponent
        assert torch.equal(got.view(torch.uint8), tile)
        assert torch.equal(decode(got, scales), weight)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(ALL),
    st.sampled_from(DTYPES),
    st.floats(-9, 3),
    st.sampled_from(["gaussian", "uniform", "sparse", "constant", "outlier"]),
)
def test_any_weight_is_encoded_to_nearest(
    seed: int, scale_choice: ScaleChoice, dtype: torch.dtype, power: float, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(128, 128, generator=generator)
    if kind == "uniform":
        base = torch.rand(128, 128, generator=generator) * 2 - 1
    elif kind == "sparse":
        base = base * (torch.rand(128, 128, generator=generator) < 0.001)
    elif kind == "constant":
        base = torch.ones(128, 128) * base[0, 0]
    elif kind == "outlier":
        base[5, 7] = 1000
    weight = (base * 10.0 ** (power if dtype != torch.float16 else min(power, 1))).to(dtype)
    if not weight.isfinite().all():
        return
    codes, scales = encode(weight, scale_choice)
    assert bool((scales.float() > 0).all())
    assert bool(scales.isfinite().all())
    assert torch.equal(codes.view(torch.uint8), to_codes(weight, scales).view(torch.uint8))


@settings(max_examples=40)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
def test_any_values_give_a_positive_scale_and_nearest_codes(values: list[float]) -> None:
    tile = torch.zeros(128 * 128)
    tile[: len(values)] = torch.tensor(values)
    tile = tile.reshape(128, 128)
    for scale_choice in ALL:
        codes, scales = encode(tile, scale_choice)
        assert bool((scales > 0).all() & scales.isfinite().all()), scale_choice
        assert torch.equal(codes.view(torch.uint8), to_codes(tile, scales).view(torch.uint8))


def test_tiles_do_not_depend_on_their_neighbours() -> None:
    weight = heavy_tailed(256, 384)
    for scale_choice in ALL:
        codes, scales = encode(weight, scale_choice)
        alone, scale = encode(weight[128:, 128:256], scale_choice)
        assert torch.equal(codes[128:, 128:256].view(torch.uint8), alone.view(torch.uint8))
        assert scales[1, 1] == scale[0, 0]


# --- what each mode is for


def test_every_mode_gives_another_result_on_heavy_tails() -> None:
    weight = heavy_tailed()
    found = {mode: encode(weight, ScaleChoice(mode))[1] for mode in MODES}
    for one in MODES:
        for other in MODES:
            assert one == other or not torch.equal(found[one], found[other]), (one, other)


def test_rms_saturates_outliers_instead_of_compressing_everything_else() -> None:
    weight = heavy_tailed()
    _, rms = encode(weight, ScaleChoice("rms"))
    _, largest = encode(weight, ScaleChoice("max"))
    assert bool((rms < largest).all())
    assert saturated(weight, ScaleChoice("rms")) > 100
    assert saturated(weight, ScaleChoice("max")) == 0
    counts = [saturated(weight, ScaleChoice("rms", rms_factor=k)) for k in (2.5, 3.0, 4.0, 128)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0


def test_percentile_clips_where_it_says() -> None:
    weight = heavy_tailed()
    counts = {p: saturated(weight, ScaleChoice("percentile", percentile=p)) for p in (99, 99.9)}
    share = {p: count / weight.numel() for p, count in counts.items()}
    assert 0.005 < share[99] <= 0.01
    assert 0.0003 < share[99.9] <= 0.001
    hundred, largest = (
        encode(weight, c) for c in (ScaleChoice("percentile", percentile=100), ScaleChoice("max"))
    )
    assert torch.equal(hundred[1], largest[1])


def test_mse_errs_less_than_max_and_search_less_than_both() -> None:
    for weight in (gaussian(), heavy_tailed()):
        found = {mode: error(weight, ScaleChoice(mode)) for mode in MODES}
        assert found["mse"] < found["max"]
        assert found["search"] < found["mse"]
        assert max(found["percentile"], found["rms"]) > found["max"]


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(-6, 6), st.booleans())
def test_search_never_clips_and_never_does_worse_than_max(
    seed: int, power: float, tails: bool
) -> None:
    weight = (heavy_tailed if tails else gaussian)(128, 128, seed) * 10.0**power
    _, largest = encode(weight, ScaleChoice("max"))
    _, scales = encode(weight, ScaleChoice("search"))
    ratio = float(scales / largest)
    assert 1 <= ratio < 2
    assert saturated(weight, ScaleChoice("search")) == 0
    assert error(weight, ScaleChoice("search")) <= error(weight, ScaleChoice("max")) * (1 + 1e-5)


def test_error_of_clean_output_is_that_of_the_format() -> None:
    """Half a step of three bits of mantissa, evenly: about 0.026 of the weight."""
    for weight in (gaussian(), heavy_tailed()):
        norm = float(weight.double().square().sum())
        for mode in ("max", "mse", "search"):
            relative = math.sqrt(error(weight, ScaleChoice(mode)) / norm)
            assert 0.024 < relative < 0.027


# --- statistics of activations


@pytest.mark.parametrize("mode", ["rms", "mse", "search"])
def test_weights_of_columns_change_these_modes(mode: ScaleMode) -> None:
    weight, columns = heavy_tailed(), channel_weights(256)
    _, even = encode(weight, ScaleChoice(mode))
    _, weighed = encode(weight, ScaleChoice(mode), columns)
    assert not torch.equal(even, weighed)
    assert ScaleChoice(mode).weighted


@pytest.mark.parametrize("mode", ["mse", "search"])
def test_weighted_error_falls_with_weights(mode: ScaleMode) -> None:
    weight, columns = heavy_tailed(), channel_weights(256)

    def weighed_error(weights: torch.Tensor | None) -> float:
        decoded = decode(*encode(weight, ScaleChoice(mode), weights))
        squares = (decoded.double() - weight.double()).square()
        return float((squares.sum(0) * columns.double()).sum())

    assert weighed_error(columns) < weighed_error(None)


@pytest.mark.parametrize("mode", ["max", "percentile"])
def test_weights_of_columns_are_ignored_elsewhere(mode: ScaleMode) -> None:
    weight, columns = heavy_tailed(), channel_weights(256)
    even, weighed = (encode(weight, ScaleChoice(mode), w) for w in (None, columns))
    assert torch.equal(even[1], weighed[1])
    assert not ScaleChoice(mode).weighted


@pytest.mark.parametrize("scale_choice", ALL, ids=str)
def test_a_tile_without_any_activation_is_encoded_as_without_statistics(
    scale_choice: ScaleChoice,
) -> None:
    """The toolkit before clips half of such a tile's range."""
    weight = heavy_tailed()
    columns = channel_weights(256)
    columns[:128] = 0
    codes, scales = encode(weight, scale_choice, columns)
    plain_codes, plain_scales = encode(weight, scale_choice)
    assert torch.equal(scales[:, 0], plain_scales[:, 0])
    assert torch.equal(codes[:, :128].view(torch.uint8), plain_codes[:, :128].view(torch.uint8))


@pytest.mark.parametrize("scale_choice", ALL, ids=str)
def test_only_ratios_of_weights_matter(scale_choice: ScaleChoice) -> None:
    weight, columns = heavy_tailed(), channel_weights(256)
    _, small = encode(weight, scale_choice, columns * 2.0**-60)
    _, large = encode(weight, scale_choice, columns * 2.0**60)
    assert torch.equal(small, large)


def test_an_outlier_in_a_dead_column_saturates_in_weighted_rms() -> None:
    weight, columns = gaussian(128, 128), torch.ones(128)
    weight[3, 5], columns[5] = 10.0, 0.0
    codes, scales = encode(weight, ScaleChoice("rms"), columns)
    assert float(codes[3, 5].float()) == 448
    assert float(scales) < 0.001


def test_a_tile_that_is_zero_where_activations_are_is_still_encoded() -> None:
    weight, columns = torch.zeros(128, 128), torch.ones(128)
    weight[:, 5] = gaussian(128, 128)[:, 5]
    columns[5] = 0
    for scale_choice in (ScaleChoice("rms"), ScaleChoice("mse"), ScaleChoice("search")):
        codes, scales = encode(weight, scale_choice, columns)
        assert bool((scales > 0).all())
        relative = (decode(codes, scales) - weight).norm() / weight.norm()
        assert float(relative) < 0.1, scale_choice


# --- special values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_choice", ALL, ids=str)
def test_a_tile_of_zeros_has_scale_one_and_codes_zero(
    scale_choice: ScaleChoice, dtype: torch.dtype
) -> None:
    weight = gaussian(256, 256).to(dtype)
    weight[:128, 128:] = 0
    codes, scales = encode(weight, scale_choice)
    assert float(scales[0, 1]) == 1
    assert not codes[:128, 128:].view(torch.uint8).any()
    assert bool(codes[128:].view(torch.uint8).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_choice", ALL, ids=str)
def test_nan_and_infinity_are_told(
    scale_choice: ScaleChoice, bad: float, dtype: torch.dtype
) -> None:
    weight = gaussian(256, 256).to(dtype)
    weight[200, 255] = bad
    assert not try_encode(weight, scale_choice)[2]


def test_negative_nan_is_told_too() -> None:
    weight = gaussian(128, 128)
    weight.view(torch.int32)[0, 0] = -1  # sign, exponent and mantissa all ones
    assert not try_encode(weight, ScaleChoice("max"))[2]
    assert not try_encode(weight.bfloat16(), ScaleChoice("search"))[2]


@pytest.mark.parametrize("scale_choice", ALL, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-37, 1e-20, 1e20, 2.0**120])
def test_tiny_and_huge_weights_keep_their_precision(
    magnitude: float, scale_choice: ScaleChoice
) -> None:
    weight = gaussian(128, 256) / 0.02 * magnitude / 4
    codes, scales = encode(weight, scale_choice)
    assert torch.equal(codes.view(torch.uint8), to_codes(weight, scales).view(torch.uint8))
    relative = (decode(codes, scales).double() - weight.double()).norm() / weight.double().norm()
    limit = 0.05 if magnitude > 1e-36 else 0.2  # the scale cannot be smaller than 2**-126
    assert float(relative) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_choice", [*ALL, ScaleChoice("rms", rms_factor=100)], ids=str)
def test_the_largest_numbers_give_finite_scales(
    scale_choice: ScaleChoice, dtype: torch.dtype
) -> None:
    sign = gaussian(128, 128).sign()
    weight = (sign * 3.3e38).to(dtype)
    codes, scales = encode(weight, scale_choice)
    assert bool(scales.isfinite().all())
    assert torch.equal(codes.view(torch.uint8), to_codes(weight, scales).view(torch.uint8))
    assert bool(decode(codes, scales).isfinite().all())


@pytest.mark.parametrize("scale_choice", ALL, ids=str)
def test_the_smallest_numbers_do_not_become_nan(scale_choice: ScaleChoice) -> None:
    for value in (1e-45, 1e-42, 1.2e-38, 3e-36):
        weight = torch.full((128, 128), value)
        codes, scales = encode(weight, scale_choice)
        assert float(scales) >= torch.finfo(torch.bfloat16).tiny
        assert torch.equal(codes.view(torch.uint8), to_codes(weight, scales).view(torch.uint8))


def test_grid_of_one_is_max() -> None:
    """The toolkit before took half of the range then."""
    for weight in (gaussian(), heavy_tailed()):
        one, largest = (
            encode(weight, c) for c in (ScaleChoice("mse", grid_size=1), ScaleChoice("max"))
        )
        assert torch.equal(one[1], largest[1])
        assert torch.equal(one[0].view(torch.uint8), largest[0].view(torch.uint8))


@pytest.mark.parametrize(
    "nonsense",
    [
        {"mode": "median"},
        {"mode": ""},
        {"mode": "rms", "rms_factor": 0.0},
        {"mode": "rms", "rms_factor": -3.0},
        {"mode": "rms", "rms_factor": math.nan},
        {"mode": "rms", "rms_factor": math.inf},
        {"mode": "rms", "rms_factor": 1e30},
        {"mode": "percentile", "percentile": 0.0},
        {"mode": "percentile", "percentile": -1.0},
        {"mode": "percentile", "percentile": 100.001},
        {"mode": "percentile", "percentile": 101.0},
        {"mode": "percentile", "percentile": math.nan},
        {"mode": "mse", "grid_size": 0},
        {"mode": "mse", "grid_size": -5},
        {"mode": "mse", "grid_size": 10**9},
    ],
)
def test_parameters_that_make_no_sense_are_refused(nonsense: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        ScaleChoice(**nonsense)


def test_values_are_left_as_they_were() -> None:
    weight = gaussian().numpy()
    before = weight.copy()
    codes, scales = np.empty(weight.shape, np.uint8), np.empty((2, 3), np.uint16)
    for scale_choice in ALL:
        encode_rows(weight, "F32", scale_choice, None, codes, scales)
    np.testing.assert_array_equal(weight, before)


# --- the layout


def test_only_whole_tiles_fit() -> None:
    assert fits((128, 128))
    assert fits((1024, 3584))
    for shape in ((127, 128), (128, 192), (0, 128), (128,), (4, 128, 128), ()):
        assert not fits(shape)


def test_scale_is_named_after_the_weight() -> None:
    codes, scale = layout(TensorSpec("a.weight.b.weight", "F16", (384, 256)))
    assert (codes.name, codes.dtype, codes.shape) == ("a.weight.b.weight", "F8_E4M3", (384, 256))
    assert (scale.name, scale.dtype) == ("a.weight.b.weight_scale_inv", "BF16")
    assert scale.shape == (3, 2)


# --- transformers' own quantizer


def of_transformers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings_ = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings_))
    made = quantize.convert({"w.weight": weight})
    return made["w.weight"], made["w.weight_scale_inv"]


def with_scales(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = np.empty(weight.shape, np.uint8)
    fp8_kernels.encode_with(weight.float().numpy(), scales.float().numpy(), codes)
    return torch.from_numpy(codes)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codes_are_those_of_transformers(make: Any, seed: int) -> None:
    """It multiplies by 448 / m where we divide by m / 448: that moves what is midway, no more."""
    weight = make(256, 384, seed).bfloat16()
    theirs, scales = of_transformers(weight)
    largest = tiles(weight.float()).abs().amax((2, 3))
    factor = (448 / largest).repeat_interleave(128, 0).repeat_interleave(128, 1)
    scaled = weight.float() * factor
    bits = theirs.view(torch.uint8)
    assert torch.equal(with_scales(scaled, torch.ones(2, 3)), bits)
    ours = with_scales(weight, scales)
    other = ours != bits
    assert int(other.sum()) < 0.005 * weight.numel()
    midway = (ours.view(E4M3).double() + theirs.double())[other] / 2
    assert torch.allclose(scaled[other].double(), midway, rtol=2.0**-21, atol=0)


def test_max_is_transformers_own_where_its_scale_needs_no_rounding() -> None:
    weight = gaussian(256, 256).bfloat16()
    for row in (0, 128):
        for column in (0, 128):
            weight[row, column] = 0.109375 if row else 0.21875  # 448 * 2**-12, 448 * 2**-11
    theirs, their_scales = of_transformers(weight)
    codes, scales = encode(weight, ScaleChoice("max"))
    assert torch.equal(scales.float(), their_scales)
    assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))


def test_rounding_the_scale_first_costs_nothing() -> None:
    """The scales of `max` are transformers' rounded; the error is not larger for it."""
    weight = gaussian(512, 512).bfloat16()
    theirs, their_scales = of_transformers(weight)
    codes, scales = encode(weight, ScaleChoice("max"))
    assert torch.equal(scales, their_scales.bfloat16())
    ours = (decode(codes, scales) - weight.float()).norm()
    exact = (decode(theirs, their_scales) - weight.float()).norm()
    rounded_after = (decode(theirs, their_scales.bfloat16()) - weight.float()).norm()
    assert ours < exact * 1.002
    assert ours < rounded_after


def test_dequantized_by_transformers_as_by_us() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = heavy_tailed(256, 384).bfloat16()
    codes, scales = encode(weight, ScaleChoice("search"))
    dequantize = Fp8Dequantize(SimpleNamespace(quantization_config=SimpleNamespace()))
    made = dequantize._dequantize_one(codes, scales)
    assert torch.equal(made.bfloat16(), decode(codes, scales).bfloat16())


def test_decoded_values_are_those_of_the_table() -> None:
    codes, _ = encode(heavy_tailed(), ScaleChoice("max"))
    by_table = e4m3_values()[codes.view(torch.uint8).numpy()]
    np.testing.assert_array_equal(by_table, codes.float().numpy())


def spread(name: str) -> torch.Tensor:
    """Return values of one distribution."""
    values: dict[str, Callable[[], torch.Tensor]] = {
        "normal": gaussian,
        "heavy tails": heavy_tailed,
        "all but one tiny": lambda: gaussian() * 1e-4 + torch.eye(256, 384),
        "ties": lambda: gaussian().mul(200).round(),
        "constant": lambda: torch.full((256, 384), 0.3),
    }
    return values[name]().bfloat16()


@pytest.mark.parametrize("mode", ["search", "mse"])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "all but one tiny", "ties", "constant"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_that_are_ruled_out_are_never_the_best(
    name: str, mode: ScaleMode, weighted: bool
) -> None:
    # float32 values have no histogram: each scale is tried on the tile
    values = spread(name)
    columns = values.shape[1]
    weights = np.linspace(0, 3, columns, dtype=np.float32) if weighted else None
    results = []
    for array, dtype in (
        (values.view(torch.uint16).numpy(), "BF16"),
        (values.float().numpy(), "F32"),
    ):
        codes = np.empty(array.shape, np.uint8)
        scales = np.empty((array.shape[0] // 128, columns // 128), np.uint16)
        assert encode_rows(array, dtype, ScaleChoice(mode), weights, codes, scales)
        results.append((codes.tobytes(), scales.tobytes()))
    assert results[0] == results[1]
