"""Unquantized files and the projector, byte for byte as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_gguf import CASES, GOLDEN, Case, converted, fingerprint, model_folder, weights_hash
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

RECORDED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def near(ours: list[int], theirs: list[int]) -> bool:
    """Whether floats given by their bits differ by one unit in the last place at most."""
    difference = np.subtract(np.array(ours, np.int64), np.array(theirs, np.int64))
    return len(ours) == len(theirs) and bool((np.abs(difference) <= 1).all())


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours["sha256"] == theirs["sha256"] and near(ours["ssm_a"], theirs["ssm_a"])


@pytest.mark.parametrize("model", sorted({case.model for case in CASES}))
def test_the_golden_hashes_are_of_these_weights(model: str, work: Path) -> None:
    found = weights_hash(model_folder(model, work))
    assert found == RECORDED["weights"][model], "the weights changed: run `make golden`"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_equal_to_the_converter(case: Case, work: Path, tmp_path: Path) -> None:
    plan = make_plan(
        open_folder(model_folder(case.model, work)),
        load_recipe("mix", "gguf"),
        types=() if case.mmproj or case.mtp == "alone" else (case.type,),
        projector=case.type if case.mmproj else None,
        drop_mtp=not case.mtp,
        mtp_file=case.type if case.mtp == "alone" else None,
    )
    (file,) = plan.files
    out = write(plan, tmp_path / "out", threads=1).out
    assert agree(fingerprint(out / file.name), RECORDED["files"][case.key])


def test_one_more_unit_in_the_last_place_is_seen() -> None:
    row = {"sha256": "x", "ssm_a": [5, 7]}
    assert agree(row, {"sha256": "x", "ssm_a": [6, 6]})
    assert not agree(row, {"sha256": "x", "ssm_a": [5, 9]})
    assert not agree(row, {"sha256": "y", "ssm_a": [5, 7]})


@pytest.mark.heavy
def test_the_golden_hashes_are_the_converters(tmp_path: Path) -> None:
    llama = os.environ.get("QWEN35_LLAMA_CPP")
    if llama is None:
        pytest.skip("needs the source of llama.cpp: make test-all")
    for case, path in converted(Path(llama), tmp_path):
        assert agree(fingerprint(path), RECORDED["files"][case.key]), case.key
