"""Runs: what is made, what is done again and what is not, and what is never replaced."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hub_client import files_in
from patience import PATIENCE
from pipeline_runs import GGUF, NF4, STEM, TEXT, Capture, go, manifest, refused, spy
from qwen35.cli.console import Console
from qwen35.cli.main import main
from qwen35.pipeline import pipeline_run
from qwen35.pipeline.gates import artifact_gate
from qwen35.pipeline.run_state import STATE_NAME
from qwen35.sinks.staging import locked
from qwen35.verification import behaviour

pytestmark = pytest.mark.usefixtures("own_cache")

# --- a run that goes well


def test_each_artifact_is_whole(first_run: Path) -> None:
    out = first_run
    assert {path.name for path in out.iterdir()} == {NF4, TEXT, GGUF, STATE_NAME}
    for name in (NF4, TEXT, GGUF):
        said = manifest(out / name)
        assert said["verified"]["passed"] is True
        assert said["verified"]["depth"] == "numbers"
        assert said["verified"]["findings"] == []
        assert (out / name / "README.md").is_file()
        assert set(said["added"]) == {"README.md", *(["Modelfile"] if name == GGUF else [])}
    assert {path.name for path in (out / GGUF).glob("*.gguf")} == {
        f"{STEM}-F16.gguf",
        f"{STEM}-Q8_0.gguf",
    }
    assert (out / NF4 / "model.safetensors").is_file()


def test_artifacts_are_those_of_the_verbs(
    first_run: Path, run_original: Path, tmp_path: Path
) -> None:
    out = first_run
    assert main(["convert", str(run_original), str(tmp_path / "c"), "--recipe", "text-nf4"]) == 0
    types = ["--types", "F16,Q8_0"]
    assert main(["gguf", str(run_original), str(tmp_path / "g"), *types]) == 0
    for name, other in ((NF4, "c"), (GGUF, "g")):
        files = manifest(out / name)["files"]
        assert files == manifest(tmp_path / other)["files"]
        assert all(
            (out / name / file).read_bytes() == (tmp_path / other / file).read_bytes()
            for file in files
        )


def test_second_run_does_nothing(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_out.rglob("*")}
    made = spy(monkeypatch)
    # nothing is verified again
    monkeypatch.setattr(pipeline_run.PipelineRunner, "verdict_on", None)
    said = go(capsys, run_original, run_out)
    assert said.code == 0
    assert made == []
    for kind in ("make", "verify", "document"):
        assert set(said.states(kind).values()) == {"kept"}
    assert set(said.states("publish").values()) == {"skipped"}
    reasons = said.steps[f"publish {NF4}"]["reasons"]
    assert reasons == ["no repository was named to publish to"]
    assert {path: path.stat().st_mtime_ns for path in run_out.rglob("*")} == before


def test_a_terminal_shows_each_step_once(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where messages and data are on one screen; a pipe gets the whole list."""
    flags = ["--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    arguments = ["run", *flags, str(run_original), str(run_out)]
    told = {}
    for one_screen in (False, True):
        monkeypatch.setattr(Console, "one_screen", one_screen)
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert said.err.count(f"verify {NF4}") == 1
        told[one_screen] = said.out
    assert told[False].count(f"verify {NF4}") == 1
    assert told[True] == "all gates open\n"


def test_behaviour_is_asked_when_it_was_not(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights answer nothing rightly: gate 2 closes, and what passed before is no excuse."""
    short = tuple(replace(task, tokens=8) for task in behaviour.TASKS[-1:])
    monkeypatch.setattr(behaviour, "TASKS", short)
    made = spy(monkeypatch)
    said = go(capsys, run_original, run_out, "--depth", "behaviour")
    assert (said.code, made) == (1, [])
    closed = said.steps[f"verify {GGUF}"]
    assert (closed["state"], closed["gate"]) == ("closed", "verification")
    assert any("capital of France" in reason for reason in closed["reasons"])
    assert said.states("document")[GGUF] == "stopped"
    assert manifest(run_out / GGUF)["verified"]["passed"] is False


# --- what is missing or changed


def test_missing_artifact_alone_is_made(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(run_out / NF4)
    shutil.rmtree(run_out / NF4)
    made = spy(monkeypatch)
    said = go(capsys, run_original, run_out)
    assert (said.code, made) == (0, [NF4])
    assert said.states("verify") == {NF4: "done", TEXT: "kept", GGUF: "kept"}
    assert files_in(run_out / NF4) == before


def test_damaged_artifact_alone_is_made(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_out / GGUF / f"{STEM}-Q8_0.gguf"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    made = spy(monkeypatch)
    said = go(capsys, run_original, run_out)
    assert (said.code, made) == (0, [GGUF])
    assert path.read_bytes() == right


def test_other_options_remake_what_they_concern(
    run_original: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spy(monkeypatch)
    said = go(capsys, run_original, run_out, "--types", "Q6_K")
    assert (said.code, made) == (0, [GGUF])
    names = {path.name for path in (run_out / GGUF).glob("*.gguf")}
    assert names == {f"{STEM}-F16.gguf", f"{STEM}-Q6_K.gguf"}


def test_source_is_known_by_its_content(
    run_source: Path, run_out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere is the same source; one other bit of a weight is another."""
    made = spy(monkeypatch)
    assert go(capsys, run_source, run_out).code == 0
    assert made == []
    (shard,) = run_source.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1  # the least bit of a bfloat16: headers, and so plans, stay as they are
    shard.write_bytes(data)
    before = {name: manifest(run_out / name)["plan"] for name in (NF4, TEXT, GGUF)}
    assert go(capsys, run_source, run_out).code == 0
    assert made == [NF4, TEXT, GGUF]
    assert {name: manifest(run_out / name)["plan"] for name in (NF4, TEXT, GGUF)} == before


def test_interrupted_run_goes_on(
    run_original: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted(artifact: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen35.pipeline.pipeline_run.artifact_gate", interrupted)
    flags = ["--path", "A", "--depth", "numbers", str(run_original), str(out)]
    assert main(["run", *flags]) == 130
    monkeypatch.setattr("qwen35.pipeline.pipeline_run.artifact_gate", artifact_gate)
    made = spy(monkeypatch)
    said = go(capsys, run_original, out, paths="A")
    assert (said.code, made) == (0, [])
    assert said.states("make") == {NF4: "kept"}


# --- what is not ours


def test_folder_of_someone_else_is_not_replaced(
    run_original: Path, run_out: Path, capsys: Capture
) -> None:
    (run_out / STATE_NAME).unlink()
    before = files_in(run_out)
    assert "exists already; give --overwrite" in refused(capsys, run_original, run_out)
    assert files_in(run_out) == before
    assert go(capsys, run_original, run_out, "--overwrite").code == 0


def test_own_files_in_an_artifact_are_not_lost(
    run_original: Path, run_out: Path, capsys: Capture
) -> None:
    (run_out / NF4 / "notes.md").write_text("mine")
    assert go(capsys, run_original, run_out).code == 0  # nothing has to be made, so it may stay
    (run_out / NF4 / "config.json").write_text("{}")
    for more in ((), ("--overwrite",)):
        error = refused(capsys, run_original, run_out, *more)
        assert "holds files that qwen35 did not write: notes.md; move them away" in error
    assert (run_out / NF4 / "notes.md").read_text() == "mine"
    (run_out / NF4 / "notes.md").unlink()
    assert go(capsys, run_original, run_out).code == 0


def test_edited_card_is_kept_and_not_lost(
    run_original: Path, run_out: Path, capsys: Capture
) -> None:
    (run_out / NF4 / "README.md").write_text("my own words")
    said = go(capsys, run_original, run_out)
    assert said.code == 0
    assert (run_out / NF4 / "README.md").read_text() == "my own words"
    (run_out / NF4 / "config.json").unlink()
    assert "did not write: README.md" in refused(capsys, run_original, run_out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 9, "steps": {}}', '{"run":1,"steps":3}'])
def test_damaged_memory_makes_nothing_believed(
    run_original: Path, run_out: Path, capsys: Capture, text: str
) -> None:
    (run_out / STATE_NAME).write_text(text)
    assert "exists already" in refused(capsys, run_original, run_out)


def test_source_as_the_output_is_refused(run_source: Path, capsys: Capture) -> None:
    assert "holds a model that qwen35 did not write" in refused(capsys, run_source, run_source)
    assert not (run_source / STATE_NAME).exists()


def test_refused_run_leaves_no_folder(
    run_original: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("qwen35.sinks.staging.shutil.disk_usage", lambda _: full)
    assert "0.00 GB free on its disk, expected at least" in refused(
        capsys, run_original, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_second_run_at_once_is_refused(run_original: Path, run_out: Path, capsys: Capture) -> None:
    with locked(run_out / "qwen35-run"):
        assert "another run is writing it" in refused(capsys, run_original, run_out)


def test_runs_without_torch(run_original: Path, tmp_path: Path) -> None:
    arguments = ["run", "--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    arguments += [str(run_original), str(tmp_path / "out"), "--quiet"]
    code = (
        "import sys\nfrom qwen35.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
