"""Numbers of GGUF files by themselves: strips, rounding, and what a type can make."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from qwen35.array_types import F32
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import GgufFiles
from qwen35.codecs.codec import Piece
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.ggml.judge import BOUNDS, LOOSE, bad_blocks, check_bound, judge, round_as
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.errors import Finding
from qwen35.verification.gguf_subject import GgufSubject
from qwen35.verification.numbers_check import NumbersResult, check_numbers

ROW = 2**20
"""More values than are decoded at a time: each row of so many is a piece."""


def written(
    folder: Path, values: np.ndarray, kind: GGMLQuantizationType | None = None
) -> GgufSubject:
    """Write a file of one tensor, packed already if `kind` says so."""
    path = folder / "x.gguf"
    writer = GGUFWriter(path, "qwen35")
    writer.add_tensor("a.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = GgufFiles(LocalFolder(folder), (path.name,), whole=True, root=folder)
    return GgufSubject(str(folder), files)


def check(subject: GgufSubject) -> NumbersResult:
    return check_numbers(subject, None, threads=1)


@pytest.mark.parametrize("shape", [(3, ROW), (2, ROW + 32), (5, ROW // 2)])
@pytest.mark.parametrize("place", [None, 0, -1, ROW])
def test_every_strip_is_decoded_to_its_end(
    shape: tuple[int, int], place: int | None, tmp_path: Path
) -> None:
    values = np.zeros(shape, np.float16)
    if place is not None:
        values.reshape(-1)[place] = np.inf
    numbers = check(written(tmp_path, values))
    assert numbers.roles == []
    assert [(f.check, f.subject, f.message) for f in numbers.findings] == [
        ("decode", "x.gguf: a.weight", "a scale or weight is not finite")
    ] * (place is not None)


@pytest.mark.parametrize(("exponent", "finite"), [(252, True), (253, False), (255, False)])
def test_a_scale_that_is_beyond_float32_is_named(
    exponent: int, finite: bool, tmp_path: Path
) -> None:
    """No warning of NumPy's, but a finding: 2^(exponent - 128) times the largest level, 12."""
    block = np.full((2, 17), 0x77, np.uint8)
    block[1, 0] = exponent
    numbers = check(written(tmp_path, block, GGMLQuantizationType.MXFP4))
    assert [f.message for f in numbers.findings] == ["a scale or weight is not finite"] * (
        not finite
    )


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    subject, path = written(tmp_path, np.zeros((2, 64), np.float32)), tmp_path / "x.gguf"
    path.write_bytes(path.read_bytes()[:-1])
    message = (
        "x.gguf ends within it: it changed since its header was read; "
        "run again once it no longer changes"
    )
    assert [(f.check, f.subject, f.message) for f in check(subject).findings] == [
        ("decode", "a.weight", message)
    ]


def floats(*rows: list[float]) -> F32:
    return np.array(rows, np.float32)


def ones(*shape: int) -> F32:
    return np.ones(shape, np.float32)


class Decoded:
    """The values of a tensor, as a file holds them."""

    def __init__(self, values: F32) -> None:
        self._values = values.reshape(-1)

    def read_into(self, first: int, out: F32) -> None:
        out[:] = self._values[first : first + out.size]


def compared(kind: str, found: F32, expected: F32) -> WeightComparison:
    """Compare row by row."""
    result = WeightComparison("x.gguf: a.weight")
    pieces = (Piece(row, expected[row : row + 1], "F32") for row in range(len(expected)))
    judge(Decoded(found), GGML_TYPES[kind], pieces, result)
    return result


def messages(result: WeightComparison) -> list[str]:
    return [finding.message for finding in result.findings]


@pytest.mark.parametrize("kind", [*BOUNDS, "iq2_xxs"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_is_bad_beyond_its_bound(kind: str, sign: int) -> None:
    _, bound = BOUNDS.get(kind, LOOSE)
    expected = sign * ones(2, 512)
    difference = 0 * expected
    assert bad_blocks(expected, difference, kind) == 0
    difference[0, :256] = 0.99 * bound
    difference[1, 256:] = -0.99 * bound
    assert bad_blocks(expected, difference, kind) == 0
    difference[0, :256] = 1.01 * bound
    assert bad_blocks(expected, difference, kind) == 1
    difference[1, 256:] = -1.01 * bound
    assert bad_blocks(expected, difference, kind) == 2
    assert bad_blocks(3 * expected, 3 * difference, kind) == 2
    assert bad_blocks(3 * expected, difference, kind) == 0


def test_a_block_is_judged_by_its_root_mean_square_and_largest() -> None:
    expected, difference = np.zeros((1, 256), np.float32), np.zeros((1, 256), np.float32)
    expected[0, 7] = -2
    difference[0, 9] = 16 * 2 * 0.0039  # one of 256: a sixteenth of it in the mean
    assert bad_blocks(expected, difference, "q8_0") == 0
    difference[0, 9] = 16 * 2 * 0.0041
    assert bad_blocks(expected, difference, "q8_0") == 1


def test_rows_of_less_than_a_block_are_blocks() -> None:
    expected, difference = ones(4, 64), np.zeros((4, 64), np.float32)
    difference[2] = 0.0041
    assert bad_blocks(expected, difference, "q8_0") == 1
    assert bad_blocks(ones(2, 384), np.full((2, 384), 0.0041, np.float32), "q8_0") == 2


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
    assert round_as(values, kind).tolist() == [[rounded] * 3] * 2
    assert round_as(values, kind).dtype == np.float32


def test_differences_add_up_piece_by_piece() -> None:
    result = compared("f16", floats([1.0, 2.5], [1.0, 2.5]), floats([1.0, 2.0], [1.0, 2.0]))
    assert (result.norm, result.squared) == (10.0, 0.5)
    assert messages(result) == ["2 values differ from the source's"]
    result = compared("q8_0", 1.5 * ones(2, 32), ones(2, 32))
    assert (result.norm, result.squared) == (64.0, 16.0)
    expected = ones(9, 256)
    expected[2:] *= 1000
    found = expected + 0.0041 * (expected == 1)
    assert messages(compared("q8_0", found, expected)) == [
        "2 blocks are farther from the source than q8_0 can be"
    ]


def test_a_comparison_is_the_same_when_it_was_noted() -> None:
    errors, findings = asdict(ErrorSums(count=3, worst=0.5)), [Finding("a", "b", "c")]
    noted = WeightComparison("d", 1.5, 2.5, errors, True, True, findings)
    assert WeightComparison.from_json(json.loads(json.dumps(noted.to_json()))) == noted
    assert (
        WeightComparison.from_json(json.loads(json.dumps(WeightComparison().to_json())))
        == WeightComparison()
    )


def test_sums_of_squares_hold_what_float32_cannot() -> None:
    result = compared("f32", floats([1e30, 0.0]), floats([1e30, 2e30]))
    assert result.norm == pytest.approx(5e60)
    assert result.squared == pytest.approx(4e60)


def test_each_block_is_judged_beside_its_own_largest() -> None:
    expected, difference = ones(2, 256), np.zeros((2, 256), np.float32)
    expected[1] *= 1000
    difference[0] = 0.0041
    assert bad_blocks(expected, difference, "q8_0") == 1


def test_what_the_file_cannot_hold_is_not_held_against_it() -> None:
    """Rounding to f16 is no fault, but an error of what was measured."""
    exact = floats([1 + 2**-10 + 2**-12])
    result = compared("f16", floats([1 + 2**-10]), exact)
    assert (messages(result), result.squared) == ([], 0.0)
    assert result.norm == pytest.approx(float(exact[0, 0]) ** 2)


@pytest.mark.parametrize(
    ("kind", "squared", "norm", "blocks", "said"),
    [
        ("q4_K", 0.0288, 1.0, 0, None),
        ("q4_K", 0.0290, 1.0, 0, "relative error 0.170, at most 0.17 in q4_K"),
        ("q4_K", 4.0, 1.0, 2, "relative error 2.000, at most 0.17 in q4_K"),
        ("q4_K", 0.0, 0.0, 0, None),
        ("q4_K", 4.0, 0.0, 0, "relative error 2.000, at most 0.17 in q4_K"),
        ("q4_K", 0.0, 1.0, 2, "2 blocks are farther from the source than q4_K can be"),
        ("iq2_xxs", 1.20, 1.0, 0, None),
        ("iq2_xxs", 1.22, 1.0, 0, "relative error 1.105, at most 1.1 in iq2_xxs"),
    ],
)
def test_a_tensor_is_judged_by_error_then_blocks(
    kind: str, squared: float, norm: float, blocks: int, said: str | None
) -> None:
    result = WeightComparison("x.gguf: a.weight", squared, norm)
    check_bound(result, kind, blocks)
    assert messages(result) == [said] * (said is not None)
    assert all(f.check == "bound" and f.subject == result.subject for f in result.findings)


def test_floats_are_judged_by_values_alone() -> None:
    [finding] = compared("f16", floats([4.0, 4.0, 1.0]), floats([1.0, 1.0, 1.0])).findings
    assert finding == Finding("values", "x.gguf: a.weight", "2 values differ from the source's")
    assert compared("f16", floats([4.0]), floats([4.0])).findings == []
