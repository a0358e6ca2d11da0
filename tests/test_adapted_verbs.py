"""Verbs that open a base with adapters: what they find is what they find of the merged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qwen35
from adapters import make_adapter
from checkpoints import ASSET
from qwen35.api.run_api import RunOptions, prepare
from qwen35.checkpoint.adapter_files import open_adapters
from qwen35.checkpoint.open import fetch
from qwen35.errors import InputError, OutputError, UsageError
from qwen35.pipeline.run_file import read_run_file
from qwen35.planning.activations import PROVENANCE
from qwen35.planning.merged_source import with_adapters
from qwen35.tuning.space import ChoiceSpace

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedding, which the head is tied to, and of queries."""
    return make_adapter("embedding", tmp_path_factory.mktemp("adapters") / "mine")


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / ASSET.name
    qwen35.merge(ASSET, adapter, out, threads=1)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ASSET / "eval.txt").read_text()[:6000])
    return path


def test_statistics_are_those_of_the_merged_model(
    adapter: Path, merged: Path, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"text": text, "context": 64, "windows": 4, "device": "cpu"}
    qwen35.calibrate(ASSET, output=tmp_path / "one", adapter=[adapter], threads=1, **options)
    qwen35.calibrate(merged, output=tmp_path / "two", threads=1, **options)
    one, two = (
        json.loads((tmp_path / name / "activation-stats.json").read_bytes())
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(one[key] == two[key] for key in one.keys() - {PROVENANCE})
    assert len(one) > 1
    source = json.loads((tmp_path / "one" / "qwen35.json").read_bytes())["source"]
    assert [row["name"] for row in source["adapters"]] == ["mine"]


def test_an_interrupted_calibration_is_not_resumed_with_another_adapter(
    adapter: Path, text: Path, tmp_path: Path
) -> None:
    from qwen35.api.calibrate_api import planned
    from qwen35.calibration.calibration_plan import CalibrationRequest
    from qwen35.calibration.states import CalibrationFolder, work_folder

    options: dict[str, Any] = {"text": text, "context": 64, "chunks": 4}
    plan = planned(ASSET, **options, request=CalibrationRequest(), token=None)
    with CalibrationFolder(work_folder(tmp_path / "out"), plan.digest, restart=False):
        pass
    with pytest.raises(OutputError, match="holds an interrupted run of another plan"):
        qwen35.calibrate(ASSET, output=tmp_path / "out", adapter=[adapter], **options)


def test_the_base_is_measured_with_its_adapters(
    adapter: Path, merged: Path, text: Path, tmp_path: Path
) -> None:
    """The reference is the merged model: nothing diverges from it, in either engine much."""
    gguf = tmp_path / "gguf"
    qwen35.gguf(ASSET, gguf, types="F16", adapter=[adapter], threads=1)
    options: dict[str, Any] = {"text": text, "context": 64, "chunks": 2, "threads": 1}
    options |= {"device": "cpu", "cache": tmp_path / "cache"}
    report = qwen35.evaluate(ASSET, [merged, gguf], adapter=[adapter], **options)
    same, f16 = (row.comparison.kld.value for row in report.candidates)
    assert abs(same) < 1e-9
    assert f16 < 1e-4
    assert report.base.name == f"{ASSET.name} + mine"
    assert not report.findings
    again = qwen35.evaluate(ASSET, [merged], adapter=[adapter], **options)
    assert again.reference == "compact file"
    with pytest.raises(InputError, match=r"cache: adapters \[.*, expected None; it was made from"):
        qwen35.evaluate(ASSET, [merged], **options)
    with pytest.raises(InputError, match=r"cache: adapters \[.*, expected \[.*0.5"):
        qwen35.evaluate(ASSET, [merged], adapter=[f"{adapter}=0.5"], **options)
    del options["cache"]
    every: dict[bool, list[float]] = {}
    for streamed in (False, True):
        options["streamed"] = streamed
        report = qwen35.evaluate(ASSET, [merged, ASSET, gguf], adapter=[adapter], **options)
        every[streamed] = [row.comparison.kld.value for row in report.candidates]
        assert abs(every[streamed][0]) < 1e-9
    assert every[True][1] == pytest.approx(every[False][1], rel=1e-4)
    assert every[True][1] > 100 * abs(every[True][2])
    file = gguf / f"{ASSET.name}-F16.gguf"
    with pytest.raises(UsageError, match="--adapter: given with a GGUF file as BASE; give the che"):
        qwen35.evaluate(file, adapter=[adapter], text=text)


def test_the_merged_model_is_tuned(adapter: Path, merged: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "nf4", "text": text, "size": "9bpw", "probes": 0}
    options |= {"threads": 1, "context": 64, "chunks": 1, "device": "cpu"}
    first, second = tmp_path / "one.toml", tmp_path / "two.toml"
    one = qwen35.tune(ASSET, output=first, adapter=[adapter], **options)
    two = qwen35.tune(merged, output=second, **options)
    assert one.measured.prices == two.measured.prices
    with pytest.raises(UsageError, match="measured with another model"):
        qwen35.tune(ASSET, output=first, overwrite=True, **options)
    checkpoint = with_adapters(fetch(str(ASSET)), open_adapters([adapter]))
    exact = Path(ChoiceSpace(checkpoint, "nf4", ("nf4", "plain")).reference(tmp_path))
    for path in merged.glob("*.safetensors"):
        assert (exact / path.name).read_bytes() == path.read_bytes()


def test_a_run_with_an_adapter(
    adapter: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    file = tmp_path / "run.toml"
    file.write_text(
        f"""model = {json.dumps(str(ASSET))}
out = "out"
adapters = ["mine=0.5"]
depth = "numbers"
[[artifact]]
recipe = "text-nf4"
[evaluate]
text = {json.dumps(str(text))}
chunks = 1
"""
    )
    result = qwen35.run(file, threads=1)
    assert result.passed, result.to_json()
    [made] = (tmp_path / "out").glob("*-bnb-4bit")
    qwen35.convert(
        ASSET, tmp_path / "again", recipe="text-nf4", adapter=[f"{adapter}=0.5"], threads=1
    )
    for path in made.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    card = (made / "README.md").read_text()
    assert "--adapter mine=0.5" in card
    assert "--adapter DIR" in card
    assert "merged with the adapter mine (weight 0.5)" in card
    again = qwen35.run(file, threads=1)
    assert {outcome.state for outcome in again.outcomes} <= {"kept", "skipped"}
    file.write_text(file.read_text().replace("mine=0.5", "mine"))
    job = read_run_file(file)
    assert prepare(job, RunOptions(), dry=True).forecast().to_json()["steps"][0]["note"] == ""
    (tmp_path / "mine" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model.safetensors in it"):
        qwen35.run(file)
    file.write_text('model = "x"\nout = "y"\npath = "A"\nadapters = "mine"\n')
    with pytest.raises(UsageError, match=r"run.toml: adapters: 'mine', expected a list of strings"):
        qwen35.run(file)
    with pytest.raises(UsageError, match="--adapter is for --path|--adapter: is for --path"):
        qwen35.run(file, adapter=[adapter])
