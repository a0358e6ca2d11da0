"""Runs: what a closed gate stops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline_runs import (
    EMBEDDING,
    FP8,
    GATE_PROJ,
    GGUF,
    NF4,
    STEM,
    TEXT,
    Capture,
    Said,
    go,
    manifest,
    write_source,
)
from qwen35.checkpoint.open import fetch
from qwen35.cli.main import main
from qwen35.errors import Finding
from qwen35.pipeline import pipeline_run
from qwen35.pipeline.gates import artifact_gate, quantization_gate
from qwen35.pipeline.planned_artifacts import plan_artifacts
from qwen35.pipeline.run_request import RunRequest, path_artifacts
from qwen35.pipeline.run_state import STATE_NAME

pytestmark = pytest.mark.usefixtures("own_cache")


def test_artifact_gate_leaves_what_is_good(tmp_path: Path, capsys: Capture) -> None:
    """A weight beyond F16 stops the GGUF file; bf16 and NF4 hold it."""
    source = write_source(tmp_path / "source", **{EMBEDDING: 1e6})
    out = tmp_path / "out"
    said = go(capsys, source, out)
    assert said.code == 1
    closed = said.steps[f"make {GGUF}"]
    assert (closed["state"], closed["gate"]) == ("closed", "artifact")
    assert "a value beyond the range of f16" in closed["reasons"][0]
    assert said.states("make") == {NF4: "done", TEXT: "done", GGUF: "closed"}
    assert said.states("verify") == {NF4: "done", TEXT: "done", GGUF: "stopped"}
    assert said.states("document") == {NF4: "done", TEXT: "done", GGUF: "stopped"}
    stopped = said.steps[f"verify {GGUF}"]["reasons"]
    assert stopped == [f"the artifact gate of {GGUF} is closed"]
    assert {path.name for path in out.iterdir()} == {NF4, TEXT, STATE_NAME}
    again = go(capsys, source, out)
    assert again.states("make") == {NF4: "kept", TEXT: "kept", GGUF: "closed"}


def test_damaged_source_closes_every_artifact_gate(tmp_path: Path, capsys: Capture) -> None:
    source = write_source(tmp_path / "source", **{GATE_PROJ: float("nan")})
    said = go(capsys, source, tmp_path / "out")
    assert said.code == 1
    assert set(said.states("make").values()) == {"closed"}
    assert all("NaN" in said.steps[f"make {n}"]["reasons"][0] for n in (NF4, TEXT, GGUF))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [STATE_NAME]


def test_verification_gate_by_numbers(run_original: Path, tmp_path: Path, capsys: Capture) -> None:
    """FP8 scales so small that half of the weights saturate are found, and stop the rest."""
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{run_original}"\nout = "out"\npath = "A"\ndepth = "numbers"\n'
        '[[artifact]]\nrecipe = "fp8"\ncalib_mode = "rms"\nrms_factor = 0.5\n'
    )
    assert main(["run", str(file), "--json"]) == 1
    said = Said(1, json.loads(capsys.readouterr().out))
    closed = said.steps[f"verify {FP8}"]
    assert closed["gate"] == "verification"
    assert "weights saturate" in closed["reasons"][0]
    assert said.states("document") == {NF4: "done", FP8: "stopped"}
    recorded = manifest(tmp_path / "out" / FP8)["verified"]
    assert recorded["passed"] is False
    assert recorded["findings"] == closed["findings"]


def test_closed_verification_is_looked_at_again(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline_run.PipelineRunner.verdict_on
    finding = Finding("behaviour", "What is 2 + 2?", "'5', expected '4'")

    def wrong(self: pipeline_run.PipelineRunner, artifact: Any) -> Any:
        verdict = real(self, artifact)
        return replace(verdict, findings=(finding,)) if artifact.name == NF4 else verdict

    shutil.rmtree(run_out / NF4)
    (run_out / STATE_NAME).write_text(
        (run_out / STATE_NAME).read_text().replace(f"verify {NF4}", "verify gone")
    )
    monkeypatch.setattr(pipeline_run.PipelineRunner, "verdict_on", wrong)
    assert go(capsys, run_original, run_out).steps[f"verify {NF4}"]["state"] == "closed"
    monkeypatch.setattr(pipeline_run.PipelineRunner, "verdict_on", real)
    said = go(capsys, run_original, run_out)
    assert said.code == 0
    assert said.states("make") == {NF4: "kept", TEXT: "kept", GGUF: "kept"}
    assert said.states("verify") == {NF4: "done", TEXT: "kept", GGUF: "kept"}
    assert manifest(run_out / NF4)["verified"]["passed"] is True


@pytest.mark.parametrize(
    ("change", "gate", "reason"),
    [
        ("plan", "artifact", "qwen35.json: its plan differs from this run's"),
        ("manifest", "artifact", "qwen35.json: missing"),
        ("format", "artifact", "plain, expected nf4"),
        ("missing", "quantization", "F16.gguf: missing"),
        ("type", "quantization", "file type 7, expected 1"),
    ],
)
def test_gates_look_at_what_lies_there(
    change: str, gate: str, reason: str, run_original: Path, run_out: Path, capsys: Capture
) -> None:
    """Gates 1 and 3 themselves: the folder is changed after it was made, before they are asked."""
    job = RunRequest(
        str(run_original), run_out, path_artifacts(["A", "B"], types=["Q8_0"]), depth="numbers"
    )
    nf4, _, gguf = plan_artifacts(fetch(str(run_original)), job)[0]
    assert list(artifact_gate(nf4)) == list(artifact_gate(gguf)) == []
    assert list(quantization_gate(gguf)) == []
    f16, q8 = (run_out / GGUF / f"{STEM}-{kind}.gguf" for kind in ("F16", "Q8_0"))
    if change == "plan":
        path = run_out / NF4 / "qwen35.json"
        path.write_text(json.dumps({**manifest(run_out / NF4), "plan": "0"}))
    elif change == "manifest":
        (run_out / NF4 / "qwen35.json").unlink()
    elif change == "format":
        shutil.rmtree(run_out / NF4)
        shutil.copytree(run_out / TEXT, run_out / NF4)
    elif change == "missing":
        f16.unlink()
    else:
        shutil.copy(q8, f16)
    judged = artifact_gate(nf4) if gate == "artifact" else quantization_gate(gguf)
    assert any(reason in f"{f.subject}: {f.message}" for f in judged)
