"""Conversions between float formats, held against torch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen35.codecs.floats import all_finite, bf16_from_f32, empty, f32_from, from_f32

ALL_16_BITS = np.arange(65536, dtype=np.uint16)
SPECIAL = [
    0x00000000,  # zero
    0x80000000,
    0x00000001,  # smallest subnormal
    0x007FFFFF,  # largest subnormal
    0x00800000,  # smallest normal
    0x00008000,  # half of a bf16 subnormal: to even, zero
    0x00008001,
    0x00018000,  # one and a half: to even, two
    0x3F800000,  # one
    0x3F808000,  # one and half a step: to even, one
    0x3F808001,
    0x3F818000,  # one and one and a half steps: to even, two steps
    0x3F817FFF,
    0x3FFFFFFF,  # carries into the exponent
    0x7F7F0000,  # largest bf16
    0x7F7F7FFF,  # rounds to the largest bf16
    0x477FE000,  # largest f16
    0x33800000,  # smallest f16 subnormal
    0x33000000,  # half of it: to even, zero
    0x33000001,
]
SPECIAL += [pattern ^ 0x80000000 for pattern in SPECIAL]


def torch_bf16(values: np.ndarray) -> np.ndarray:
    """Round as torch does; the bits."""
    rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
    bits: np.ndarray = rounded.view(torch.int16).numpy().view(np.uint16)
    return bits


@pytest.mark.parametrize("pattern", SPECIAL, ids=hex)
def test_special_pattern_is_rounded_as_torch_does(pattern: int) -> None:
    value = np.array([pattern], np.uint32).view(np.float32)
    assert bf16_from_f32(value) == torch_bf16(value)


def test_ties_go_to_even_by_hand() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32)
    rounded = bf16_from_f32(bits.view(np.float32))
    assert [hex(code) for code in rounded.tolist()] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80"]


def test_every_upper_half_with_telling_lower_halves() -> None:
    finite = ALL_16_BITS[(ALL_16_BITS & 0x7F80) != 0x7F80].astype(np.uint32)
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = ((finite << np.uint32(16)) | np.uint32(low)).view(np.float32)
        np.testing.assert_array_equal(bf16_from_f32(values), torch_bf16(values))


@given(arrays(np.uint32, st.integers(1, 40)))
def test_any_finite_values_are_rounded_as_torch_does(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(bf16_from_f32(values), torch_bf16(values))


def test_bf16_to_f32_is_exact_for_every_pattern() -> None:
    ours = f32_from(ALL_16_BITS, "BF16")
    theirs = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_f16_to_f32_is_exact_for_every_finite_pattern() -> None:
    finite = ALL_16_BITS[(ALL_16_BITS & 0x7C00) != 0x7C00]
    ours = f32_from(finite.view(np.float16), "F16")
    theirs = torch.from_numpy(finite.view(np.int16)).view(torch.float16).float().numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(("dtype", "carrier"), [("BF16", np.uint16), ("F16", np.float16)])
def test_every_finite_pattern_survives_the_way_through_f32(
    dtype: str, carrier: type[np.generic]
) -> None:
    exponent = {"BF16": 0x7F80, "F16": 0x7C00}[dtype]
    finite = ALL_16_BITS[(ALL_16_BITS & exponent) != exponent]
    back = from_f32(f32_from(finite.view(carrier), dtype), dtype)
    assert back.dtype == carrier
    np.testing.assert_array_equal(back.view(np.uint16), finite)


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-60000, 60000, width=32)))
def test_f16_is_rounded_as_torch_does(values: np.ndarray) -> None:
    theirs = torch.from_numpy(values.copy()).to(torch.float16).view(torch.int16).numpy()
    np.testing.assert_array_equal(from_f32(values, "F16").view(np.int16), theirs)


def test_f32_stays_itself() -> None:
    values = np.array([1.5, -0.0, 3e-45], np.float32)
    assert f32_from(values, "F32") is values
    np.testing.assert_array_equal(from_f32(values, "F32").view(np.uint32), values.view(np.uint32))


PATTERNS = {
    # dtype: carrier, bits, infinity, largest finite
    "BF16": (np.uint16, np.uint16, 0x7F80, 0x7F7F),
    "F16": (np.float16, np.uint16, 0x7C00, 0x7BFF),
    "F32": (np.float32, np.uint32, 0x7F800000, 0x7F7FFFFF),
}


@pytest.mark.parametrize("dtype", PATTERNS)
@pytest.mark.parametrize("where", [0, 7, 63])
def test_one_bad_value_is_found_wherever_it_is(dtype: str, where: int) -> None:
    carrier, bits, infinity, largest = PATTERNS[dtype]
    sign = 1 << (8 * np.dtype(bits).itemsize - 1)
    array = np.full(64, largest, bits)
    array[::2] |= bits(sign)
    assert all_finite(array.view(carrier), dtype)
    for bad in (
        infinity,
        infinity | sign,
        infinity + 1,
        (infinity + 1) | sign,
        sign - 1,
        2 * sign - 1,
    ):
        spoilt = array.copy()
        spoilt[where] = bad
        assert not all_finite(spoilt.view(carrier), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_finite_is_what_torch_says_for_every_pattern(dtype: str) -> None:
    carrier = PATTERNS[dtype][0]
    kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    theirs = torch.isfinite(torch.from_numpy(ALL_16_BITS.view(np.int16)).view(kind)).numpy()
    ours = np.array([all_finite(ALL_16_BITS[i : i + 1].view(carrier), dtype) for i in range(65536)])
    np.testing.assert_array_equal(ours, theirs)


@given(arrays(np.uint32, st.integers(0, 20)))
def test_finite_is_what_numpy_says_of_float32(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    assert all_finite(values, "F32") is bool(np.isfinite(values).all())


@pytest.mark.parametrize("dtype", PATTERNS)
def test_nothing_is_finite(dtype: str) -> None:
    assert all_finite(empty(dtype, 0), dtype)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("BF16", np.uint16),
        ("F16", np.float16),
        ("F32", np.float32),
        ("U8", np.uint8),
        ("F8_E4M3", np.uint8),
    ],
)
def test_empty_arrays_carry_the_format(dtype: str, kind: type[np.generic]) -> None:
    array = empty(dtype, 3)
    assert array.dtype == np.dtype(kind)
    assert array.shape == (3,)


def test_rounding_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bf16_from_f32(np.array([-1.0, 3e38, 1e-45], np.float32))
