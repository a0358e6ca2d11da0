"""Numbers of GGUF files by themselves: strips, rounding, and what a type can make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from qwen35.codecs.fp8_errors import Errors
from qwen35.errors import Finding
from qwen35.gguf.container import Container, Entry, read_container
from qwen35.gguf.types import GGML_TYPES
from qwen35.progress import Silent
from qwen35.verify.compared import Compared
from qwen35.verify.gguf_numbers import (
    _LOOSE,
    BOUNDS,
    F32,
    _accumulate,
    _bad_blocks,
    _Faults,
    _judged,
    _rounded,
    compare,
)
from qwen35.verify.memo import Memo

ROW = 2**20
"""So many values are decoded at a time: each row of so many is a strip."""


def written(
    folder: Path, values: np.ndarray, kind: GGMLQuantizationType | None = None
) -> Container:
    """Write a file of one tensor, packed already if `kind` says so."""
    path = folder / "x.gguf"
    writer = GGUFWriter(path, "qwen35")
    writer.add_tensor("a.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_container(path)


@pytest.mark.parametrize("shape", [(3, ROW), (2, ROW + 32), (5, ROW // 2)])
@pytest.mark.parametrize("place", [None, 0, -1, ROW])
def test_every_strip_is_decoded_to_its_end(
    shape: tuple[int, int], place: int | None, tmp_path: Path
) -> None:
    values = np.zeros(shape, np.float16)
    if place is not None:
        values.reshape(-1)[place] = np.inf
    container = written(tmp_path, values)
    with Memo({}) as memo:
        rows, found = compare(container, {}, None, memo=memo, threads=1, progress=Silent())
    assert rows == []
    assert [(f.check, f.subject, f.message) for f in found] == [
        ("decode", "x.gguf: a.weight", "a scale or weight is not finite")
    ] * (place is not None)


@pytest.mark.parametrize(("exponent", "finite"), [(252, True), (253, False), (255, False)])
def test_a_scale_that_is_beyond_float32_is_named(
    exponent: int, finite: bool, tmp_path: Path
) -> None:
    """No warning of NumPy's, but a finding: 2^(exponent - 128) times the largest level, 12."""
    block = np.full((2, 17), 0x77, np.uint8)
    block[1, 0] = exponent
    container = written(tmp_path, block, GGMLQuantizationType.MXFP4)
    with Memo({}) as memo:
        _, found = compare(container, {}, None, memo=memo, threads=1, progress=Silent())
    assert [f.message for f in found] == ["a scale or weight is not finite"] * (not finite)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    container = written(tmp_path, np.zeros((2, 64), np.float32))
    container.path.write_bytes(container.path.read_bytes()[:-1])
    with Memo({}) as memo:
        _, found = compare(container, {}, None, memo=memo, threads=1, progress=Silent())
    assert [(f.check, f.subject, f.message) for f in found] == [
        ("decode", "a.weight", "the file ends within it")
    ]


def floats(*rows: list[float]) -> F32:
    return np.array(rows, np.float32)


def ones(*shape: int) -> F32:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("kind", [*BOUNDS, "iq2_xxs"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_is_bad_beyond_its_bound(kind: str, sign: int) -> None:
    _, bound = BOUNDS.get(kind, _LOOSE)
    expected = sign * ones(2, 512)
    difference = 0 * expected
    assert _bad_blocks(expected, difference, kind) == 0
    difference[0, :256] = 0.99 * bound
    difference[1, 256:] = -0.99 * bound
    assert _bad_blocks(expected, difference, kind) == 0
    difference[0, :256] = 1.01 * bound
    assert _bad_blocks(expected, difference, kind) == 1
    difference[1, 256:] = -1.01 * bound
    assert _bad_blocks(expected, difference, kind) == 2
    assert _bad_blocks(3 * expected, 3 * difference, kind) == 2
    assert _bad_blocks(3 * expected, difference, kind) == 0


def test_a_block_is_judged_by_its_root_mean_square_and_largest() -> None:
    expected, difference = np.zeros((1, 256), np.float32), np.zeros((1, 256), np.float32)
    expected[0, 7] = -2
    difference[0, 9] = 16 * 2 * 0.0039  # one of 256: a sixteenth of it in the mean
    assert _bad_blocks(expected, difference, "q8_0") == 0
    difference[0, 9] = 16 * 2 * 0.0041
    assert _bad_blocks(expected, difference, "q8_0") == 1


def test_rows_of_less_than_a_block_are_blocks() -> None:
    expected, difference = ones(4, 64), np.zeros((4, 64), np.float32)
    difference[2] = 0.0041
    assert _bad_blocks(expected, difference, "q8_0") == 1
    assert _bad_blocks(ones(2, 384), np.full((2, 384), 0.0041, np.float32), "q8_0") == 2


@pytest.mark.parametrize(
    ("kind", "value", "rounded"),
    [
        ("f32", 1 + 2**-20, 1 + 2**-20),
        ("f16", 1 + 2**-10 + 2**-12, 1 + 2**-10),
        ("bf16", 1 + 2**-7 + 2**-9, 1 + 2**-7),
    ],
)
def test_floats_are_rounded_as_the_file_holds_them(kind: str, value: float, rounded: float) -> None:
    values = np.full((2, 3), value, np.float32)
    assert _rounded(values, kind).tolist() == [[rounded] * 3] * 2
    assert _rounded(values, kind).dtype == np.float32


def test_differences_add_up_strip_by_strip() -> None:
    result, faults = Compared(), _Faults()
    for _ in range(2):
        _accumulate(result, faults, "f16", floats([1.0, 2.5]), floats([1.0, 2.0]))
    assert (result.norm, result.squared) == (10.0, 0.5)
    assert (faults.values, faults.blocks) == (2, 0)
    for _ in range(2):
        _accumulate(result, faults, "q8_0", 1.5 * ones(1, 32), ones(1, 32))
    assert (result.norm, result.squared) == (74.0, 16.5)
    assert (faults.values, faults.blocks) == (2, 2)


def test_a_comparison_is_the_same_when_it_was_noted() -> None:
    compared = Compared(1.5, 2.5, Errors(count=3, worst=0.5), True, True, [Finding("a", "b", "c")])
    assert Compared.from_json(json.loads(json.dumps(compared.to_json()))) == compared
    assert Compared.from_json(json.loads(json.dumps(Compared().to_json()))) == Compared()


def test_sums_of_squares_hold_what_float32_cannot() -> None:
    result = Compared()
    _accumulate(result, _Faults(), "f32", floats([1e30, 0.0]), floats([1e30, 2e30]))
    assert result.norm == pytest.approx(5e60)
    assert result.squared == pytest.approx(4e60)


def test_each_block_is_judged_beside_its_own_largest() -> None:
    expected, difference = ones(2, 256), np.zeros((2, 256), np.float32)
    expected[1] *= 1000
    difference[0] = 0.0041
    assert _bad_blocks(expected, difference, "q8_0") == 1


def test_what_the_file_cannot_hold_is_not_held_against_it() -> None:
    """Rounding to f16 is no fault, but an error of what was measured."""
    exact = floats([1 + 2**-10 + 2**-12])
    result, faults = Compared(), _Faults()
    _accumulate(result, faults, "f16", floats([1 + 2**-10]), exact)
    assert (faults.values, result.squared) == (0, 0.0)
    assert result.norm == pytest.approx(float(exact[0, 0]) ** 2)


CONTAINER = Container(Path("x.gguf"), 0, {}, {})


@pytest.mark.parametrize(
    ("kind", "squared", "norm", "faults", "said"),
    [
        ("q4_K", 0.0288, 1.0, _Faults(), None),
        ("q4_K", 0.0290, 1.0, _Faults(), ("bound", "relative error 0.170, at most 0.17 in q4_K")),
        ("q4_K", 4.0, 1.0, _Faults(blocks=2), ("bound", "relative error 2.000, at most 0.17 in")),
        ("q4_K", 0.0, 0.0, _Faults(), None),
        ("q4_K", 4.0, 0.0, _Faults(), ("bound", "relative error 2.000, at most 0.17 in q4_K")),
        ("q4_K", 0.0, 1.0, _Faults(blocks=2), ("bound", "2 blocks are farther from the source")),
        ("iq2_xxs", 1.20, 1.0, _Faults(), None),
        ("iq2_xxs", 1.22, 1.0, _Faults(), ("bound", "relative error 1.105, at most 1.1 in iq2")),
        ("f16", 4.0, 1.0, _Faults(), None),
        ("f16", 4.0, 1.0, _Faults(values=3), ("values", "3 values differ from the source's")),
        ("f16", 4.0, 1.0, _Faults(values=3, blocks=2), ("values", "3 values differ from")),
    ],
)
def test_a_tensor_is_judged_by_values_then_error_then_blocks(
    kind: str, squared: float, norm: float, faults: _Faults, said: tuple[str, str] | None
) -> None:
    entry = Entry("a.weight", GGML_TYPES[kind], (1, 256), 0)
    found = list(_judged(CONTAINER, entry, Compared(squared=squared, norm=norm), faults))
    assert len(found) == (said is not None)
    for finding in found:
        assert said is not None
        assert (finding.check, finding.subject) == (said[0], "x.gguf: a.weight")
        assert finding.message.startswith(said[1])
