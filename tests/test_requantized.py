"""Weights that are quantized a second time are told of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from checkpoints import ASSET
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import open_folder
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.evaluation.evaluation_table import notes
from qwen35.evaluation.models import open_base
from qwen35.planning.manifest import quantized_source
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from running import run

pytestmark = pytest.mark.sentences


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ASSET, tmp_path_factory.mktemp("nf4") / "out", "nf4").out


def again(count: int, label: str) -> str:
    return (
        f"{count} weights are {label} in the source and are quantized again: errors are measured "
        f"against what {label} decodes to, not against the original weights"
    )


def test_nf4_to_fp8(nf4: Path, tmp_path: Path) -> None:
    """12 of the 62 are too small for tiles and become bf16."""
    out = run(nf4, tmp_path / "out", "fp8").out
    manifest = json.loads((out / "qwen35.json").read_text())
    assert again(50, "NF4") in manifest["notes"]
    assert manifest["source"] == {"folder": nf4.name, "quantized": {"NF4": 62}}
    subject = open_artifact(str(out))
    told = "the source holds 62 weights in NF4: they are compared as they decode, not with the "
    verdict = verify(subject, source=fetch(str(nf4)), depth="numbers")
    assert [note for note in verdict.notes if note.startswith(told)] == [f"{told}original weights"]
    assert not any("decode" in note for note in verify(subject, depth="numbers").notes)


def test_a_base_of_decoded_weights_says_so(nf4: Path, tmp_path: Path) -> None:
    """The figures of `evaluate` are against what NF4 decodes to."""
    out = run(nf4, tmp_path / "out", "bf16").out
    base = open_base(str(out))
    assert base.decoded == {"NF4": 62}
    assert open_base(str(ASSET)).decoded == {}
    report = SimpleNamespace(
        findings=[],
        base=base,
        floors=[],
        candidates=[],
        simulations=[],
        served={},
        reference="run",
        stream=None,
    )
    assert notes(cast("EvaluationReport", report))[0] == (
        "the base was made from a source with 62 weights in NF4: figures compare with what they "
        "decode to, not with the original weights"
    )


@pytest.mark.parametrize("source", [None, 3, {}, {"quantized": []}, {"quantized": {"NF4": "x"}}])
def test_manifests_of_any_shape_are_read(source: object) -> None:
    assert quantized_source({"source": source}) == quantized_source(None) == {}


def test_quantized_to_gguf(nf4: Path, tmp_path: Path) -> None:
    fp8 = run(ASSET, tmp_path / "fp8", "fp8").out
    for source, text in ((nf4, again(62, "NF4")), (fp8, again(57, "FP8"))):
        for types, told in ((("F16", "Q4_K_M"), True), (("F16",), False)):
            plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=types)
            assert (text in plan.notes) is told


@pytest.mark.parametrize("recipe", ["nf4", "bf16", "text-nf4"])
def test_copied_and_restored_weights_are_not(recipe: str, nf4: Path) -> None:
    plan = make_plan(open_folder(nf4), load_recipe(recipe))
    assert not any("quantized again" in note for note in plan.notes)
    assert not any(
        "quantized again" in n for n in make_plan(open_folder(ASSET), load_recipe("fp8")).notes
    )
