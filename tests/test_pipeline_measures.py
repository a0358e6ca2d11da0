"""Runs that measure their artifacts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline_runs import EMBEDDING, GGUF, NF4, STEM, TEXT, Capture, go, manifest, write_source
from qwen35.checkpoint.source import Checkpoint
from qwen35.cli.main import main
from qwen35.errors import UsageError
from qwen35.evaluation.evaluation_job import EvaluationJob
from qwen35.evaluation.stream_plan import STREAMED
from qwen35.pipeline.run_request import MeasurementRequest

pytestmark = pytest.mark.usefixtures("own_cache")


class Measured:
    """An evaluation that notes what it was given and writes a report with a table."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(
        self,
        source: Checkpoint,
        compared: Sequence[Path],
        measurement: MeasurementRequest,
        folder: Path,
        **_: Any,
    ) -> None:
        self.calls.append([path.name for path in compared])
        folder.mkdir(parents=True, exist_ok=True)
        rows = [[path.name, 0.25] for path in compared]
        table = {"columns": ["candidate", "mean KLD"], "rows": rows}
        (folder / "report.json").write_text(json.dumps({"report": 1, "table": table}, indent=2))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    fake = Measured()
    monkeypatch.setattr("qwen35.pipeline.pipeline_run.measure", fake)
    return fake


def test_measures_reach_card_and_manifest(
    run_original: Path, run_out: Path, tmp_path: Path, capsys: Capture, measured: Measured
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    said = go(capsys, run_original, run_out, "--text", text)
    assert said.code == 0
    assert measured.calls == [[NF4, TEXT, f"{STEM}-F16.gguf", f"{STEM}-Q8_0.gguf"]]
    for name in (NF4, TEXT, GGUF):
        card = (run_out / name / "README.md").read_text()
        assert "## Measured" in card
        assert f"| {NF4} | 0.25 |" in card
        recorded = manifest(run_out / name)
        assert recorded["measures"]["columns"] == ["candidate", "mean KLD"]
        assert "report.json" in recorded["added"]
    said = go(capsys, run_original, run_out, "--text", text)
    assert said.states("evaluate") == {"": "kept"}
    assert set(said.states("document").values()) == {"kept"}
    text.write_text("Other text.")
    assert go(capsys, run_original, run_out, "--text", text).states("evaluate") == {"": "done"}
    assert len(measured.calls) == 2


def test_real_measures(run_original: Path, tmp_path: Path, capsys: Capture) -> None:
    """The text-only strip is the source's text model: no divergence; Q8_0 has a little."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) + " "[: i % 3] for i in range(700)))
    out = tmp_path / "out"
    said = go(capsys, run_original, out, "--text", text, "--chunks", 1, paths="B")
    assert said.code == 0, said.steps
    table = json.loads((out / "report" / "report.json").read_text())["table"]
    assert (out / "report" / "report.html").is_file()
    assert table["columns"][1:] == [TEXT, f"{STEM}-F16", f"{STEM}-Q8_0"]
    mean = {row[0]: row[1:] for row in table["rows"]}["Mean KLD"]
    strip, f16, q8 = (float(cell.split()[0]) for cell in mean)
    assert abs(strip) < 1e-6
    assert abs(f16) < 1e-5
    assert 0 < q8 < 1e-2
    assert "| Mean KLD |" in (out / GGUF / "README.md").read_text()
    assert go(capsys, run_original, out, "--text", text, "--chunks", 1, paths="B").states(
        "evaluate"
    ) == {"": "kept"}


def test_models_are_measured_layer_by_layer_where_that_is_asked_or_they_do_not_fit(
    run_original: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("the rain in a Model, seven times; " * 40)
    file, out = tmp_path / "run.toml", tmp_path / "out"
    head = f'model = "{run_original}"\nout = "out"\ndepth = "structure"\n'
    head += '[[gguf]]\ntypes = ["Q8_0"]\n[evaluate]\ntext = "text.txt"\nchunks = 1\n'

    def ran(asked: str, *flags: str) -> str:
        file.write_text(head + asked)
        capsys.readouterr()
        main(["run", str(file), "--json", "--quiet", *flags])
        steps = {row["step"]: row for row in json.loads(capsys.readouterr().out)["steps"]}
        return str(steps["evaluate"]["state"])

    assert ran('streamed = true\nsimulate = "llama.cpp"') == "done"
    report = json.loads((out / "report" / "report.json").read_text())
    assert [row["engine"] for row in report["candidates"]] == [STREAMED]
    assert [row["name"] for row in report["simulations"]] == [f"{STEM}-Q8_0 (inputs quantized)"]
    assert ran('streamed = true\nsimulate = "llama.cpp"') == "kept"
    jobs: list[EvaluationJob] = []

    def noted(job: EvaluationJob, **_: Any) -> None:
        jobs.append(job)
        raise UsageError("this test", "wants no more")

    monkeypatch.setattr("qwen35.evaluation.evaluation_run.run", noted)
    for flags in ([], ["--memory", "900MB"]):
        assert ran("", *flags) != "kept"
    assert [job.stream is not None for job in jobs] == [False, True]


def test_only_verified_artifacts_are_measured(
    tmp_path: Path, capsys: Capture, measured: Measured
) -> None:
    source = write_source(tmp_path / "source", **{EMBEDDING: 1e6})
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    said = go(capsys, source, tmp_path / "out", "--text", text)
    assert said.code == 1
    assert measured.calls == [[NF4, TEXT]]
    assert said.states("document") == {NF4: "done", TEXT: "done", GGUF: "stopped"}
