"""Block-wise FP8 back to numbers, held against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35.codecs.fp8.arrays import decode_rows, e4m3_values
from qwen35.codecs.fp8.layout import BLOCK as FP8_BLOCK


def torch_values(codes: np.ndarray) -> torch.Tensor:
    """Return the values of E4M3 codes by torch."""
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).to(torch.float32)


def torch_decode(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Decode a whole weight with torch."""
    rows, columns = codes.shape
    wide = torch.from_numpy(scale.copy()).repeat_interleave(128, 0).repeat_interleave(128, 1)
    product: np.ndarray = (torch_values(codes) * wide[:rows, :columns]).numpy()
    return product


def test_values_of_all_codes_are_those_of_torch() -> None:
    codes = np.arange(256, dtype=np.uint8)
    ours, theirs = e4m3_values(), torch_values(codes).numpy()
    assert ours.dtype == np.float32
    nan = np.isnan(theirs)
    assert np.flatnonzero(nan).tolist() == [0x7F, 0xFF]
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


def test_values_by_hand() -> None:
    values = e4m3_values()
    assert values[0x00] == 0
    assert np.signbit(values[0x80])
    assert values[0x01] == 2**-9
    assert values[0x07] == 7 * 2**-9
    assert values[0x08] == 2**-6
    assert values[0x38] == 1
    assert values[0xB8] == -1
    assert values[0x7E] == 448
    assert values[0xFE] == -448


def random_weight(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return finite codes and scales."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 256, (rows, columns), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    shape = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    return codes, generator.uniform(1e-4, 2, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (128, 128), (127, 129), (129, 127), (256, 384), (300, 65), (1, 1000), (513, 256)],
)
def test_decoding_is_that_of_torch_bit_by_bit(rows: int, columns: int) -> None:
    codes, scale = random_weight(rows, columns, rows * 1009 + columns)
    decoded = decode_rows(codes, scale)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(
        decoded.view(np.uint32), torch_decode(codes, scale).view(np.uint32)
    )


@settings(max_examples=25)
@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_any_shape_is_decoded_as_torch_does(rows: int, columns: int, seed: int) -> None:
    codes, scale = random_weight(rows, columns, seed)
    np.testing.assert_array_equal(decode_rows(codes, scale), torch_decode(codes, scale))


@pytest.mark.parametrize("rows", [128, 300, 512])
@pytest.mark.parametrize("step", [128, 256])
def test_rows_may_come_in_strips_of_blocks(rows: int, step: int) -> None:
    codes, scale = random_weight(rows, 200, rows)
    strips = []
    for start in range(0, rows, step):
        strip = codes[start : start + step]
        first = start // FP8_BLOCK
        strips.append(decode_rows(strip, scale[first : first - (-len(strip) // FP8_BLOCK)]))
    np.testing.assert_array_equal(np.concatenate(strips), decode_rows(codes, scale))


def test_each_block_has_its_own_scale() -> None:
    codes = np.full((200, 200), 0x38, np.uint8)  # ones
    scale = np.array([[1, 2], [3, 4]], np.float32)
    decoded = decode_rows(codes, scale)
    corners = decoded[[0, 127, 128, 199]][:, [0, 127, 128, 199]]
    assert corners.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_swapped_scales_would_be_seen() -> None:
    codes, scale = random_weight(256, 256, 7)
    assert not np.array_equal(decode_rows(codes, scale), torch_decode(codes, scale.T.copy()))


def test_nan_codes_decode_to_nan() -> None:
    codes = np.array([[0x7F, 0xFF, 0x00]], np.uint8)
    decoded = decode_rows(codes, np.ones((1, 1), np.float32))
    assert np.isnan(decoded).tolist() == [[True, True, False]]


def test_codes_are_left_as_they_were() -> None:
    codes, scale = random_weight(130, 130, 3)
    before = codes.copy()
    decode_rows(codes, scale)
    np.testing.assert_array_equal(codes, before)
    np.testing.assert_array_equal(e4m3_values()[0x38], 1)
