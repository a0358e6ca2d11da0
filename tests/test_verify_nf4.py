"""NF4 codes and scales beside the source: which are equally near, and which are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from qwen35.array_types import F32
from qwen35.codecs.nf4.arrays import AbsmaxStatistics
from qwen35.codecs.nf4.judge import same_mean, wrong_codes, wrong_scales
from qwen35.codecs.nf4.layout import BLOCK, NESTED_BLOCK
from qwen35.codecs.nf4.tables import BOUNDS, dynamic_map

SCALE = 3.0
ON, NEAR, BEYOND = 0.0, 5e-6, 3e-5
"""How far a quotient lies from a bound: rounding explains the first two, but not the last."""


def count(codes: list[int], quotients: list[float], scale: float = SCALE) -> int:
    """Count the wrong ones of some codes, in the first nibbles of a block that is right elsewhere.

    The block before it has another scale, and no code of it is looked at.
    """
    packed = np.zeros(BLOCK, np.uint8)
    expected = packed.copy()
    for i in range(0, len(codes), 2):
        packed[BLOCK // 2 + i // 2] = codes[i] << 4 | codes[i + 1]
        expected[BLOCK // 2 + i // 2] = packed[BLOCK // 2 + i // 2] ^ 0xFF
    values = np.full(2 * BLOCK, 7, np.float32)
    values[BLOCK : BLOCK + len(quotients)] = np.array(quotients) * scale
    return wrong_codes(packed, expected, values, np.array([1, scale], np.float32))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("lower", range(15))
@pytest.mark.parametrize(
    ("offset", "below", "above"),
    [(ON, 0, 0), (NEAR, 0, 0), (-NEAR, 0, 0), (BEYOND, 1, 0), (-BEYOND, 0, 1)],
)
def test_a_code_is_wrong_beyond_the_bounds_of_its_level(
    place: int, lower: int, offset: float, below: int, above: int
) -> None:
    """`below` and `above`: whether the level under the bound, and the one over it, is wrong."""
    right = [3, 9, 12, 6]
    middles = [float(BOUNDS[code - 1] + BOUNDS[code]) / 2 for code in right]
    for code, wrong in ((lower, below), (lower + 1, above)):
        codes, quotients = list(right), list(middles)
        codes[place], quotients[place] = code, float(BOUNDS[lower]) + offset
        assert count(codes, quotients) == wrong


def test_every_wrong_code_counts() -> None:
    far = [float(BOUNDS[0]) - 0.1] * 4
    assert count([0, 0, 0, 0], far) == 0
    assert count([1, 0, 5, 15], far) == 3
    assert count([0, 15, 0, 0], [1.0, 1.0, -1.0, -1.0]) == 1


def test_the_outermost_levels_have_one_bound() -> None:
    assert count([0, 15], [-1.0, 1.0]) == 0
    assert count([15, 0], [-1.0, 1.0]) == 2


def test_a_block_of_zeros_may_hold_any_code() -> None:
    assert count([0, 15, 7, 3], [0.0] * 4, scale=0.0) == 0


@pytest.mark.parametrize(("off", "same"), [(0.0, True), (9e-6, True), (1.1e-5, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_may_differ_by_rounding_of_the_largest(sign: int, off: float, same: bool) -> None:
    true = np.array([1.0, 3.0, 2.0], np.float32)
    assert same_mean(2.0 + sign * off * 3, true) is same
    assert same_mean(-2.0 + sign * off * 3, -true) is same


def random_scales(count: int, scale: float = 1.0) -> F32:
    return np.random.default_rng(0).random(count, dtype=np.float32) * np.float32(scale)


TRUE = random_scales(2 * 65536 - 9)
OURS = AbsmaxStatistics.of(TRUE)
OFFSET = OURS.offset
CENTRED = (TRUE - np.float32(OFFSET)) / np.repeat(OURS.nested, NESTED_BLOCK)[: len(TRUE)]
MIDDLES = (dynamic_map()[:-1] + dynamic_map()[1:]) / 2
NEAREST = np.searchsorted(MIDDLES, CENTRED).astype(np.uint8)
"""What bitsandbytes gives on CUDA; `OURS` has what the table gives that it uses on a CPU."""


@pytest.mark.parametrize("magnitude", [1.0, 64.0, 2**-6])
def test_scales_are_those_of_a_cpu_or_of_cuda(magnitude: float) -> None:
    assert np.count_nonzero(OURS.codes != NEAREST) > 50
    true, nested, offset = TRUE * magnitude, OURS.nested * magnitude, OFFSET * magnitude
    for codes in (OURS.codes, NEAREST):
        assert wrong_scales(codes, nested, offset, true) == 0
        for place in np.flatnonzero((codes >= 3) & (codes <= 252))[[0, -1]]:
            for step in (-3, 3):
                other = codes.copy()
                other[place] = int(other[place]) + step
                assert wrong_scales(other, nested, offset, true) == 1


def test_another_code_is_wrong_on_either_side() -> None:
    assert wrong_scales(OURS.codes ^ 1, OURS.nested, OFFSET, TRUE) > 60000
    for step in (-1, 1):
        other = np.clip(NEAREST.astype(int) + step, 0, 255).astype(np.uint8)
        middle = (dynamic_map()[other] + dynamic_map()[NEAREST]) / 2
        right = (other == NEAREST) | (other == OURS.codes) | (np.abs(CENTRED - middle) < 1e-6)
        assert wrong_scales(other, OURS.nested, OFFSET, TRUE) == np.count_nonzero(~right)


@pytest.mark.parametrize(("factor", "wrong"), [(1 + 5e-6, 0), (1 + 2e-5, len(TRUE))])
def test_one_wrong_nested_scale_spoils_all(factor: float, wrong: int) -> None:
    nested = OURS.nested.copy()
    nested[3] *= np.float32(factor)
    assert wrong_scales(OURS.codes, nested, OFFSET, TRUE) == wrong


def test_scales_are_judged_by_the_stored_offset() -> None:
    """Which may differ from ours by the rounding of a sum."""
    true = random_scales(65536)
    theirs = AbsmaxStatistics.of(true, float(AbsmaxStatistics.of(true).offset) + 9e-6)
    assert wrong_scales(theirs.codes, theirs.nested, theirs.offset, true) == 0


def test_the_least_scales_of_scales_must_fit_as_well() -> None:
    true = random_scales(512, 1e-9)
    ours = AbsmaxStatistics.of(true)
    assert wrong_scales(ours.codes, ours.nested, ours.offset, true) == 0
    assert wrong_scales(ours.codes, ours.nested * 2, ours.offset, true) == 512


def test_scales_that_are_all_the_same_may_have_any_code() -> None:
    """Nothing is left when their mean is taken off: a scale of zero decides."""
    true = np.full(256, 0.25, np.float32)
    ours = AbsmaxStatistics.of(true)
    assert not ours.nested.any()
    assert wrong_scales(ours.codes ^ 7, ours.nested, ours.offset, true) == 0
    assert same_mean(0.0, np.zeros(256, np.float32))
