"""Files of Hessians: what a weight finds in them, and every way in which they can be damaged."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from checkpoints import ASSET
from qwen35.array_types import F32
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import open_folder
from qwen35.errors import InputError
from qwen35.planning.hessians import (
    HEAD_FILE,
    HESSIANS,
    MeasuredInput,
    hessian_head,
    layer_file,
    open_hessians,
    triangle_rows,
)

LAYER = "model.language_model.layers.0"
GEOMETRY = {"layers": 1, "hidden": 3}
FILES = [layer_file(0), HEAD_FILE]


def gram(columns: int, seed: int) -> F32:
    """Return X^T X of random inputs."""
    x = np.random.default_rng(seed).standard_normal((7, columns)).astype(np.float32)
    gram: F32 = x.T @ x
    return gram


class Sums(NamedTuple):
    """An input and its Hessians."""

    about: MeasuredInput
    both: tuple[F32, F32]


def sums(*weights: Any, columns: int = 3, seed: int = 0) -> Sums:
    """Return an input with random Hessians."""
    return Sums(
        MeasuredInput(columns, 7, 5, weights), (gram(columns, seed), gram(columns, seed + 1))
    )


def hashed(matrix: F32) -> str:
    """Return the SHA-256 of a triangle."""
    return hashlib.sha256(matrix[np.triu_indices(len(matrix))].tobytes()).hexdigest()


def store(path: Path, inputs: dict[str, Sums], made: Any) -> None:
    """Write a file as `qwen35 calibrate` does."""
    hashes = {name: [hashed(matrix) for matrix in one.both] for name, one in inputs.items()}
    with path.open("wb") as file:
        file.write(hessian_head({name: one.about for name, one in inputs.items()}, hashes, made))
        for one in inputs.values():
            for matrix in one.both:
                file.writelines(row.data for row in triangle_rows(matrix))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the Hessians of a small model."""
    made = {"geometry": GEOMETRY, "files": FILES}
    layer = {
        "mlp.gate_proj": sums(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
        "experts": sums((f"{LAYER}.mlp.experts.gate_up_proj", 4), columns=600, seed=2),
    }
    (tmp_path / HESSIANS).mkdir()
    store(tmp_path / HESSIANS / FILES[0], layer, made)
    store(tmp_path / HESSIANS / HEAD_FILE, {"lm_head": sums("lm_head.weight")}, made)
    return tmp_path


def test_weights_find_the_hessian_of_what_they_read(folder: Path) -> None:
    for opened in (open_hessians(folder), open_hessians(folder / HESSIANS)):
        found = opened.of("model.layers.0.mlp.up_proj.weight")  # another prefix, the same weight
        assert found is not None
        assert found is opened.of(f"{LAYER}.mlp.gate_proj.weight")
        assert (found.columns, found.tokens, found.held_out_tokens) == (3, 7, 5)
        np.testing.assert_array_equal(found.fit, gram(3, 0))
        np.testing.assert_array_equal(found.held_out, gram(3, 1))
        assert opened.of(f"{LAYER}.mlp.down_proj.weight") is None


def test_experts_are_found_in_stacks_and_alone(folder: Path) -> None:
    opened = open_hessians(folder)
    found = opened.of(f"{LAYER}.mlp.experts.gate_up_proj", 4)
    assert found is not None
    np.testing.assert_array_equal(found.fit, gram(600, 2))  # wider than a block of the mirror
    assert opened.of(f"{LAYER}.mlp.experts.4.up_proj.weight") is found
    assert opened.of(f"{LAYER}.mlp.experts.3.up_proj.weight") is None


def test_a_hash_tells_values_apart(folder: Path, tmp_path: Path) -> None:
    before = open_hessians(folder).sha256
    assert before == open_hessians(folder).sha256
    made = {"geometry": GEOMETRY, "files": FILES}
    store(folder / HESSIANS / HEAD_FILE, {"lm_head": sums("lm_head.weight", seed=9)}, made)
    assert open_hessians(folder).sha256 != before


def test_another_model_is_refused(folder: Path) -> None:
    opened = open_hessians(folder)
    opened.check(GEOMETRY)
    with pytest.raises(InputError, match=r"of a model with hidden 3, expected hidden 4; these are"):
        opened.check({"layers": 1, "hidden": 4})
    items = inventory(open_folder(ASSET))
    with pytest.raises(InputError, match=r"layer-0000.* 3 columns for .*these are Hessians of an"):
        opened.check(GEOMETRY, items)


# --- damage


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], data: bytes = b"") -> None:
    """Change a file's header."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (data or raw[8 + length :]))


def read_all(folder: Path) -> None:
    """Read what some weights find."""
    opened = open_hessians(folder)
    for name in (f"{LAYER}.mlp.up_proj.weight", "lm_head.weight"):
        found = opened.of(name)
        assert found is not None
        assert len(found.fit) == len(found.held_out)


def refusal(folder: Path) -> str:
    """Return the sentence that refuses a folder."""
    with pytest.raises(InputError) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


ANY_JSON: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**40,
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    [None, 1],
)


@pytest.mark.parametrize("place", ["", "tokens", "held_out_tokens", "sha256", "weights"])
@pytest.mark.parametrize("value", ANY_JSON, ids=repr)
def test_any_json_in_the_table_of_inputs_is_one_sentence(
    folder: Path, place: str, value: object
) -> None:
    def change(header: dict[str, Any]) -> None:
        inputs = json.loads(header["__metadata__"]["inputs"])
        if place:
            inputs["lm_head"][place] = value
        else:
            inputs["lm_head"] = value
        header["__metadata__"]["inputs"] = json.dumps(inputs)

    rewritten(folder / HESSIANS / HEAD_FILE, change)
    assert refusal(folder).startswith(HEAD_FILE)


@pytest.mark.parametrize("key", ["qwen35.hessians", "calibration", "inputs"])
@pytest.mark.parametrize("value", ANY_JSON, ids=repr)
def test_any_json_in_the_metadata_is_one_sentence(folder: Path, key: str, value: object) -> None:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"][key] = json.dumps(value)

    rewritten(folder / HESSIANS / HEAD_FILE, change)
    assert refusal(folder)


@pytest.mark.parametrize("key", ["geometry", "files"])
@pytest.mark.parametrize("value", [*ANY_JSON, ["../x"], [HEAD_FILE, HEAD_FILE]], ids=repr)
def test_any_json_in_the_provenance_is_one_sentence(folder: Path, key: str, value: object) -> None:
    def change(header: dict[str, Any]) -> None:
        made = {"geometry": GEOMETRY, "files": FILES, key: value}
        header["__metadata__"]["calibration"] = json.dumps(made)

    rewritten(folder / HESSIANS / HEAD_FILE, change)
    assert refusal(folder)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((np.nan, 0, 0, 1, 0, 1), "holds NaN or infinity"),
        ((1, np.inf, 0, 1, 0, 1), "holds NaN or infinity"),
        ((1, 0, 0, -1, 0, 1), "a sum of squares is negative"),
        ((1, 0, 0, 3e38, 0, 1), "a sum of squares is above 1e+37"),
        ((4, 0, 0, 1, 2.1, 4), "sums of products that no inputs have"),
    ],
)
def test_numbers_that_are_no_sums_are_refused(
    folder: Path, values: tuple[float, ...], sentence: str
) -> None:
    matrix = np.zeros((3, 3), np.float32)
    matrix[np.triu_indices(3)] = values
    broken = Sums(MeasuredInput(3, 7, 5, ("lm_head.weight",)), (gram(3, 0), matrix))
    made = {"geometry": GEOMETRY, "files": FILES}
    store(folder / HESSIANS / HEAD_FILE, {"lm_head": broken}, made)
    assert refusal(folder).startswith(f"{HEAD_FILE}, lm_head.held_out: {sentence}; the file is")


def test_squares_too_small_for_float32_are_no_damage(folder: Path) -> None:
    x = np.array([[1e-25, 1, 1e-25], [2e-25, 3, 2e-25]], np.float32)
    sums = Sums(MeasuredInput(3, 7, 5, ("lm_head.weight",)), (x.T @ x, x.T @ x))
    made = {"geometry": GEOMETRY, "files": FILES}
    store(folder / HESSIANS / HEAD_FILE, {"lm_head": sums}, made)
    read_all(folder)


def test_one_changed_bit_is_told(folder: Path) -> None:
    path = folder / HESSIANS / HEAD_FILE
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "not what its header says it holds (SHA-256)" in refusal(folder)


def test_a_file_cut_short_or_gone_is_told(folder: Path) -> None:
    path = folder / HESSIANS / FILES[0]
    path.write_bytes(path.read_bytes()[:-4])
    assert "the file is truncated" in refusal(folder)
    path.unlink()
    assert f"no {FILES[0]} in it" in refusal(folder)
    (folder / HESSIANS / HEAD_FILE).unlink()
    assert "expected a folder written by qwen35 calibrate --hessian" in refusal(folder)


def test_a_file_cut_short_after_it_was_opened_is_told(folder: Path) -> None:
    found = open_hessians(folder).of("lm_head.weight")
    assert found is not None
    path = folder / HESSIANS / HEAD_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="lm_head.held_out: truncated"):
        _ = found.held_out


def test_a_size_that_is_no_triangle_is_told(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["lm_head.fit"] = {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}
        header["lm_head.held_out"] = {"dtype": "F32", "shape": [7], "data_offsets": [20, 48]}

    rewritten(folder / HESSIANS / HEAD_FILE, change)
    assert "lm_head: F32 [5], expected a triangle" in refusal(folder)


def test_a_file_of_another_calibration_is_told(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        made = {"geometry": GEOMETRY, "files": FILES, "tokens": 8}
        header["__metadata__"]["calibration"] = json.dumps(made)

    rewritten(folder / HESSIANS / FILES[0], change)
    assert "not of the calibration of head.safetensors" in refusal(folder)
