"""`merge --onto nf4`: adapters merged into the weights that they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qwen35
from adapters import make_adapter
from checkpoints import ASSET
from qwen35.api.calibrate_api import planned
from qwen35.api.run_api import RunOptions, job_for, prepare
from qwen35.calibration.calibration_plan import CalibrationRequest
from qwen35.errors import UsageError
from qwen35.pipeline.run_file import read_run_file
from qwen35.publishing.card_steps import adapter_options
from qwen35.tuning.tuning_job import prepare as tuning
from qwen35.tuning.tuning_request import TuningRequest
from running import load_all

pytestmark = [pytest.mark.sentences, pytest.mark.usefixtures("own_cache")]
_NOTHING = dict.fromkeys(
    (
        *("types", "imatrix", "codes", "hessian", "depth", "text", "chunks", "repo", "private"),
        "mtp_from",
    ),
    None,
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter("patterns", tmp_path_factory.mktemp("adapters") / "mine")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ASSET / "eval.txt").read_text()[:3000])
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / ASSET.name
    qwen35.convert(ASSET, out, recipe="nf4", threads=1)
    return out


def test_the_bytes_are_those_of_a_merge_into_the_packed_base(
    adapter: Path, packed: Path, tmp_path: Path
) -> None:
    qwen35.merge(packed, adapter, tmp_path / "two", threads=1)
    wanted = load_all(tmp_path / "two")
    for threads in (1, 3):
        out = tmp_path / f"one-{threads}"
        result = qwen35.merge(ASSET, adapter, out, onto="nf4", threads=threads)
        got = load_all(out)
        assert got.keys() == wanted.keys()
        assert all(value.equal(wanted[name]) for name, value in got.items())
        assert any("as nf4 holds them" in note for note in result.plan.notes)
    plain = tmp_path / "plain"
    qwen35.merge(ASSET, adapter, plain, threads=1)
    assert any(not value.equal(wanted[name]) for name, value in load_all(plain).items())


def test_other_outputs_are_those_of_the_merged_checkpoint(adapter: Path, tmp_path: Path) -> None:
    merged, out = tmp_path / ASSET.name, tmp_path / "gguf"
    qwen35.merge(ASSET, adapter, merged, onto="nf4", threads=1)
    qwen35.gguf(ASSET, out, types="Q8_0", adapter=[adapter], onto="nf4", threads=1)
    qwen35.gguf(merged, tmp_path / "again", types="Q8_0", threads=1)
    [one], [two] = ((tmp_path / name).glob("*.gguf") for name in ("gguf", "again"))
    assert one.read_bytes() == two.read_bytes()
    manifest = json.loads((out / "qwen35.json").read_bytes())
    [row] = manifest["source"]["adapters"]
    assert row["onto"] == "nf4"
    assert adapter_options(manifest) == [f"--adapter {adapter.name}", "--onto nf4"]
    assert qwen35.verify(out, source=ASSET, adapter=[adapter]).passed
    assert not qwen35.reproduce(out, source=ASSET, adapter=[adapter], threads=1).findings


def test_slices_round_in_the_same_way(adapter: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    qwen35.merge(ASSET, adapter, whole, onto="nf4", threads=1)
    for number in (1, 2):
        qwen35.convert(
            ASSET, out, recipe="bf16", adapter=[adapter], onto="nf4", slice=(number, 2), threads=1
        )
    qwen35.finalize(out)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_gguf_file_of_unquantized_weights_is_rounded_too(adapter: Path, tmp_path: Path) -> None:
    """Its value heads are in another order, and its norms have another value."""
    qwen35.gguf(ASSET, tmp_path / "gguf", types="F32,Q8_0", threads=1)
    exact, quantized = (tmp_path / f"gguf/{ASSET.name}-{kind}.gguf" for kind in ("F32", "Q8_0"))
    qwen35.convert(exact, tmp_path / "packed", recipe="nf4", threads=1)
    qwen35.merge(tmp_path / "packed", adapter, tmp_path / "two", threads=1)
    qwen35.merge(exact, adapter, tmp_path / "one", onto="nf4", threads=1)
    got, wanted = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    assert got.keys() == wanted.keys()
    assert all(value.equal(wanted[name]) for name, value in got.items())
    with pytest.raises(UsageError, match=r"--onto: given with a base that is quantized already; "):
        qwen35.merge(quantized, adapter, tmp_path / "out", onto="nf4")


def test_the_digest_depends_on_it(adapter: Path, tmp_path: Path) -> None:
    plans = [
        qwen35.merge(ASSET, adapter, tmp_path / "out", onto=onto, dry_run=True).plan
        for onto in (None, "nf4")
    ]
    assert plans[0].digest != plans[1].digest


def test_verbs_that_read_a_base_merge_onto_too(adapter: Path, text: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"adapter": [adapter], "onto": "nf4"}
    wanted = qwen35.merge(ASSET, adapter, tmp_path / "out", onto="nf4", dry_run=True).plan
    assert qwen35.plan(ASSET, recipe="bf16", **given).digest == wanted.digest
    calibration = planned(
        ASSET, text=text, context=64, chunks=1, request=CalibrationRequest(), token=None, **given
    )
    request = TuningRequest(str(ASSET), "nf4", text, size="9bpw", probes=0, chunks=1, **given)
    file = tmp_path / "run.toml"
    keys = [f"model = {json.dumps(str(ASSET))}", f"adapters = [{json.dumps(str(adapter))}]"]
    file.write_text("\n".join([*keys, 'out = "out"', 'path = "nf4"', 'onto = "nf4"', ""]))
    job = job_for([str(ASSET), "out"], path=["nf4"], **_NOTHING | given)
    sources = [prepare(one, RunOptions(), dry=True).source for one in (read_run_file(file), job)]
    for checkpoint in (calibration.checkpoint, tuning(request).checkpoint, *sources):
        assert checkpoint is not None
        assert len(checkpoint.rounded) > 1
    file.write_text('onto = "fp8"\nmodel = "x"\nout = "y"\npath = "nf4"\n')
    with pytest.raises(UsageError, match=r"run.toml: onto: 'fp8' is unknown, expected nf4"):
        qwen35.run(file)
    file.write_text('onto = "nf4"\nmodel = "x"\nout = "y"\npath = "nf4"\n')
    with pytest.raises(UsageError, match=r"run.toml: onto: given without adapters"):
        qwen35.run(file)


def test_the_reference_of_an_evaluation_is_merged_onto(
    adapter: Path, text: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    qwen35.merge(ASSET, adapter, merged, onto="nf4", threads=1)
    report = qwen35.evaluate(
        ASSET,
        [merged],
        adapter=[adapter],
        onto="nf4",
        text=text,
        context=64,
        chunks=1,
        device="cpu",
    )
    assert report.base.name == f"{ASSET.name} (as nf4) + {adapter.name}"
    assert abs(report.candidates[0].comparison.kld.value) < 1e-9


def test_what_cannot_be_merged_onto(adapter: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"--onto: given with a base that is quantized already; "):
        qwen35.merge(packed, adapter, out, onto="nf4")
    with pytest.raises(UsageError, match="--onto: given without an adapter; add --adapter DIR"):
        qwen35.convert(ASSET, out, onto="nf4")
    with pytest.raises(UsageError, match="--onto: 'fp8', expected nf4"):
        qwen35.merge(ASSET, adapter, out, onto="fp8")
    assert not out.exists()
