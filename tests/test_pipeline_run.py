"""Runs: what is made, what a closed gate stops, what is done again and what is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import layout_of, write_checkpoint
from gguf_models import exact_tensors, make_variant, sidecars, variant_config
from hub_client import World, files_in
from hub_store import Repo
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import Checkpoint
from qwen35.cli.main import main
from qwen35.errors import Finding
from qwen35.pipeline import pipeline_run
from qwen35.pipeline.gates import artifact_gate, quantization_gate
from qwen35.pipeline.make import make_artifacts
from qwen35.pipeline.planned_artifacts import plan_artifacts
from qwen35.pipeline.run_request import MeasurementRequest, RunRequest, path_artifacts
from qwen35.pipeline.run_state import STATE_NAME
from qwen35.sinks.staging import locked
from qwen35.verification import behaviour

Capture = pytest.CaptureFixture[str]
STEM = "Tiny-dense-1B"
NF4, TEXT, GGUF, FP8 = f"{STEM}-text-bnb-4bit", f"{STEM}-text", f"{STEM}-text-GGUF", f"{STEM}-FP8"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("source"), "dense")


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "source" / STEM))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def first(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of paths A and B that went well, to be copied."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        out = folder / "out"
        arguments = ["--path", "A", "--path", "B", "--types", "Q8_0", str(original), str(out)]
        assert main(["run", *arguments, "--depth", "numbers", "--quiet"]) == 0
    return out


@pytest.fixture
def out(first: Path, tmp_path: Path) -> Path:
    """A copy of that run, of the copied source."""
    return Path(shutil.copytree(first, tmp_path / "out"))


class Said:
    """What a run said.

    Args:
        code: exit code.
        report: parsed output.
    """

    def __init__(self, code: int, report: dict[str, Any]) -> None:
        self.code = code
        self.steps = {row["step"]: row for row in report["steps"]}

    def states(self, kind: str) -> dict[str, str]:
        """Return the state of each step of a kind, by artifact."""
        return {
            name.partition(" ")[2]: row["state"]
            for name, row in self.steps.items()
            if name.split()[0] == kind
        }


def go(capsys: Capture, source: Path, out: Path, *more: object, paths: str = "AB") -> Said:
    flags = [flag for path in paths for flag in ("--path", {"F": "fp8"}.get(path, path))]
    if "B" in paths and "--types" not in more:
        flags += ["--types", "Q8_0"]
    if "--depth" not in more:
        flags += ["--depth", "numbers"]
    capsys.readouterr()
    code = main(["run", *flags, str(source), str(out), "--json", *map(str, more)])
    return Said(code, json.loads(capsys.readouterr().out))


def refused(capsys: Capture, source: Path, out: Path, *more: str) -> str:
    flags = ["--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    capsys.readouterr()
    assert main(["run", *flags, str(source), str(out), *more]) == 2
    return capsys.readouterr().err


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names every artifact that is made from now on."""
    made: list[str] = []

    def counting(artifacts: Sequence[Any], **options: Any) -> Any:
        made.extend(artifact.name for artifact in artifacts)
        return make_artifacts(artifacts, **options)

    monkeypatch.setattr("qwen35.pipeline.pipeline_run.make_artifacts", counting)
    return made


def manifest(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "qwen35.json").read_text())
    return parsed


# --- a run that goes well


def test_each_artifact_is_whole(first: Path) -> None:
    out = first
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


def test_artifacts_are_those_of_the_verbs(first: Path, original: Path, tmp_path: Path) -> None:
    out = first
    assert main(["convert", str(original), str(tmp_path / "c"), "--recipe", "text-nf4"]) == 0
    types = ["--types", "F16,Q8_0"]
    assert main(["gguf", str(original), str(tmp_path / "g"), *types]) == 0
    for name, other in ((NF4, "c"), (GGUF, "g")):
        files = manifest(out / name)["files"]
        assert files == manifest(tmp_path / other)["files"]
        assert all(
            (out / name / file).read_bytes() == (tmp_path / other / file).read_bytes()
            for file in files
        )


def test_second_run_does_nothing(
    original: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    made = spy(monkeypatch)
    monkeypatch.setattr(pipeline_run.PipelineRunner, "_verdict", None)  # nothing is verified again
    said = go(capsys, original, out)
    assert said.code == 0
    assert made == []
    for kind in ("make", "verify", "document"):
        assert set(said.states(kind).values()) == {"kept"}
    assert set(said.states("publish").values()) == {"skipped"}
    reasons = said.steps[f"publish {NF4}"]["reasons"]
    assert reasons == ["no repository was named to publish to"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_behaviour_is_asked_when_it_was_not(
    original: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights answer nothing rightly: gate 2 closes, and what passed before is no excuse."""
    short = tuple(replace(task, tokens=8) for task in behaviour.TASKS[-1:])
    monkeypatch.setattr(behaviour, "TASKS", short)
    made = spy(monkeypatch)
    said = go(capsys, original, out, "--depth", "behaviour")
    assert (said.code, made) == (1, [])
    closed = said.steps[f"verify {GGUF}"]
    assert (closed["state"], closed["gate"]) == ("closed", "verification")
    assert any("capital of France" in reason for reason in closed["reasons"])
    assert said.states("document")[GGUF] == "stopped"
    assert manifest(out / GGUF)["verified"]["passed"] is False


# --- what is missing or changed


def test_missing_artifact_alone_is_made(
    original: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(out / NF4)
    shutil.rmtree(out / NF4)
    made = spy(monkeypatch)
    said = go(capsys, original, out)
    assert (said.code, made) == (0, [NF4])
    assert said.states("verify") == {NF4: "done", TEXT: "kept", GGUF: "kept"}
    assert files_in(out / NF4) == before


def test_damaged_artifact_alone_is_made(
    original: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = out / GGUF / f"{STEM}-Q8_0.gguf"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    made = spy(monkeypatch)
    said = go(capsys, original, out)
    assert (said.code, made) == (0, [GGUF])
    assert path.read_bytes() == right


def test_other_options_remake_what_they_concern(
    original: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spy(monkeypatch)
    said = go(capsys, original, out, "--types", "Q6_K")
    assert (said.code, made) == (0, [GGUF])
    names = {path.name for path in (out / GGUF).glob("*.gguf")}
    assert names == {f"{STEM}-F16.gguf", f"{STEM}-Q6_K.gguf"}


def test_source_is_known_by_its_content(
    source: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere is the same source; one other bit of a weight is another."""
    made = spy(monkeypatch)
    assert go(capsys, source, out).code == 0
    assert made == []
    (shard,) = source.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1  # the least bit of a bfloat16: headers, and so plans, stay as they are
    shard.write_bytes(data)
    before = {name: manifest(out / name)["plan"] for name in (NF4, TEXT, GGUF)}
    assert go(capsys, source, out).code == 0
    assert made == [NF4, TEXT, GGUF]
    assert {name: manifest(out / name)["plan"] for name in (NF4, TEXT, GGUF)} == before


def test_interrupted_run_goes_on(
    original: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted(artifact: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen35.pipeline.pipeline_run.artifact_gate", interrupted)
    flags = ["--path", "A", "--depth", "numbers", str(original), str(out)]
    assert main(["run", *flags]) == 130
    monkeypatch.setattr("qwen35.pipeline.pipeline_run.artifact_gate", artifact_gate)
    made = spy(monkeypatch)
    said = go(capsys, original, out, paths="A")
    assert (said.code, made) == (0, [])
    assert said.states("make") == {NF4: "kept"}


# --- what is not ours


def test_folder_of_someone_else_is_not_replaced(original: Path, out: Path, capsys: Capture) -> None:
    (out / STATE_NAME).unlink()
    before = files_in(out)
    assert "exists already; give --overwrite" in refused(capsys, original, out)
    assert files_in(out) == before
    assert go(capsys, original, out, "--overwrite").code == 0


def test_own_files_in_an_artifact_are_not_lost(original: Path, out: Path, capsys: Capture) -> None:
    (out / NF4 / "notes.md").write_text("mine")
    assert go(capsys, original, out).code == 0  # nothing has to be made, so it may stay
    (out / NF4 / "config.json").write_text("{}")
    error = refused(capsys, original, out)
    assert "holds notes.md, which this run did not write, and has to be made again" in error
    assert (out / NF4 / "notes.md").read_text() == "mine"
    assert go(capsys, original, out, "--overwrite").code == 0
    assert not (out / NF4 / "notes.md").exists()


def test_edited_card_is_kept_and_not_lost(original: Path, out: Path, capsys: Capture) -> None:
    (out / NF4 / "README.md").write_text("my own words")
    said = go(capsys, original, out)
    assert said.code == 0
    assert (out / NF4 / "README.md").read_text() == "my own words"
    (out / NF4 / "config.json").unlink()
    assert "holds README.md" in refused(capsys, original, out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 9, "steps": {}}', '{"run":1,"steps":3}'])
def test_damaged_memory_makes_nothing_believed(
    original: Path, out: Path, capsys: Capture, text: str
) -> None:
    (out / STATE_NAME).write_text(text)
    assert "exists already" in refused(capsys, original, out)


def test_source_within_the_output_is_refused(source: Path, capsys: Capture) -> None:
    error = refused(capsys, source, source)
    assert "overlaps the input" in error
    assert not (source / STATE_NAME).exists()


def test_refused_run_leaves_no_folder(
    original: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("qwen35.sinks.staging.shutil.disk_usage", lambda _: full)
    assert "0.00 GB free on its disk, expected at least" in refused(
        capsys, original, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_second_run_at_once_is_refused(original: Path, out: Path, capsys: Capture) -> None:
    with locked(out / "qwen35-run"):
        assert "another run is writing it" in refused(capsys, original, out)


# --- gates


def write_source(folder: Path, **changes: float) -> Path:
    """Write the checkpoint with the first weight of some tensors changed."""
    config = variant_config("dense")
    tensors = exact_tensors(config, layout_of(config), seed=5)
    for name, value in changes.items():
        tensors[name].view(-1)[0] = value
    return write_checkpoint(folder / STEM, config, tensors, sidecars=sidecars())


EMBEDDING = "model.language_model.embed_tokens.weight"
GATE_PROJ = "model.language_model.layers.0.mlp.gate_proj.weight"


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


def test_verification_gate_by_numbers(original: Path, tmp_path: Path, capsys: Capture) -> None:
    """FP8 scales so small that half of the weights saturate are found, and stop the rest."""
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{original}"\nout = "out"\npath = "A"\ndepth = "numbers"\n'
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
    original: Path, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline_run.PipelineRunner._verdict
    finding = Finding("behaviour", "What is 2 + 2?", "'5', expected '4'")

    def wrong(self: pipeline_run.PipelineRunner, artifact: Any) -> Any:
        verdict = real(self, artifact)
        return replace(verdict, findings=(finding,)) if artifact.name == NF4 else verdict

    shutil.rmtree(out / NF4)
    (out / STATE_NAME).write_text(
        (out / STATE_NAME).read_text().replace(f"verify {NF4}", "verify gone")
    )
    monkeypatch.setattr(pipeline_run.PipelineRunner, "_verdict", wrong)
    assert go(capsys, original, out).steps[f"verify {NF4}"]["state"] == "closed"
    monkeypatch.setattr(pipeline_run.PipelineRunner, "_verdict", real)
    said = go(capsys, original, out)
    assert said.code == 0
    assert said.states("make") == {NF4: "kept", TEXT: "kept", GGUF: "kept"}
    assert said.states("verify") == {NF4: "done", TEXT: "kept", GGUF: "kept"}
    assert manifest(out / NF4)["verified"]["passed"] is True


@pytest.mark.parametrize(
    ("change", "gate", "reason"),
    [
        ("plan", "artifact", "qwen35.json: of another plan than the one of this run"),
        ("manifest", "artifact", "qwen35.json: missing"),
        ("format", "artifact", "plain, expected nf4"),
        ("missing", "quantization", "F16.gguf: missing"),
        ("type", "quantization", "file type 7, expected 1"),
    ],
)
def test_gates_look_at_what_lies_there(
    change: str, gate: str, reason: str, original: Path, out: Path, capsys: Capture
) -> None:
    """Gates 1 and 3 themselves: the folder is changed after it was made, before they are asked."""
    job = RunRequest(
        str(original), out, path_artifacts(["A", "B"], types=["Q8_0"]), depth="numbers"
    )
    nf4, _, gguf = plan_artifacts(fetch(str(original)), job)[0]
    assert list(artifact_gate(nf4)) == list(artifact_gate(gguf)) == []
    assert list(quantization_gate(gguf)) == []
    f16, q8 = (out / GGUF / f"{STEM}-{kind}.gguf" for kind in ("F16", "Q8_0"))
    if change == "plan":
        path = out / NF4 / "qwen35.json"
        path.write_text(json.dumps({**manifest(out / NF4), "plan": "0"}))
    elif change == "manifest":
        (out / NF4 / "qwen35.json").unlink()
    elif change == "format":
        shutil.rmtree(out / NF4)
        shutil.copytree(out / TEXT, out / NF4)
    elif change == "missing":
        f16.unlink()
    else:
        shutil.copy(q8, f16)
    judged = artifact_gate(nf4) if gate == "artifact" else quantization_gate(gguf)
    assert any(reason in f"{f.subject}: {f.message}" for f in judged)


# --- evaluation


class Measured:
    """An evaluation that notes what it was given and writes a report with a table."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(
        self,
        source: Checkpoint,
        compared: Sequence[Path],
        measuring: MeasurementRequest,
        folder: Path,
        **_: Any,
    ) -> None:
        self.calls.append([path.name for path in compared])
        folder.mkdir(parents=True, exist_ok=True)
        rows = [[path.name, 0.25] for path in compared]
        table = {"columns": ["candidate", "mean KLD"], "rows": rows}
        (folder / "report.json").write_text(json.dumps({"table": table}))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    fake = Measured()
    monkeypatch.setattr("qwen35.pipeline.pipeline_run.measure", fake)
    return fake


def test_measures_reach_card_and_manifest(
    original: Path, out: Path, tmp_path: Path, capsys: Capture, measured: Measured
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    said = go(capsys, original, out, "--text", text)
    assert said.code == 0
    assert measured.calls == [[NF4, TEXT, f"{STEM}-F16.gguf", f"{STEM}-Q8_0.gguf"]]
    for name in (NF4, TEXT, GGUF):
        card = (out / name / "README.md").read_text()
        assert "## Measured" in card
        assert f"| {NF4} | 0.25 |" in card
        recorded = manifest(out / name)
        assert recorded["measures"]["columns"] == ["candidate", "mean KLD"]
        assert "report.json" in recorded["added"]
    said = go(capsys, original, out, "--text", text)
    assert said.states("evaluate") == {"": "kept"}
    assert set(said.states("document").values()) == {"kept"}
    text.write_text("Other text.")
    assert go(capsys, original, out, "--text", text).states("evaluate") == {"": "done"}
    assert len(measured.calls) == 2


def test_real_measures(original: Path, tmp_path: Path, capsys: Capture) -> None:
    """The text-only strip is the source's text model: no divergence; Q8_0 has a little."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) + " "[: i % 3] for i in range(700)))
    out = tmp_path / "out"
    said = go(capsys, original, out, "--text", text, "--chunks", 1, paths="B")
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
    assert go(capsys, original, out, "--text", text, "--chunks", 1, paths="B").states(
        "evaluate"
    ) == {"": "kept"}


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


# --- publishing


def test_publishes_in_one_go_and_then_does_nothing(
    world: World, original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", "--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    command += [str(original), str(out), "--repo", "owner", "--json"]
    done = world.client.run(*command)
    assert done.code == 0, done.err
    states = {row["step"]: row for row in done.json()["steps"]}
    for name in (NF4, TEXT, GGUF):
        assert states[f"publish {name}"]["state"] == "done"
        repo = world.hub.repos[f"owner/{name}"]
        assert repo.refs["main"] == states[f"publish {name}"]["commit"]
        assert {n: repo.read(n) for n in repo.files if n != ".gitattributes"} == files_in(
            out / name
        )
        assert f"owner/{name}" in repo.read("README.md").decode()
    heads = {name: repo.refs["main"] for name, repo in world.hub.repos.items()}
    world.hub.requests.clear()
    again = world.client.run(*command)
    assert again.code == 0, again.err
    published = [r["state"] for r in again.json()["steps"] if r["step"].startswith("publish")]
    assert published == ["kept"] * 3
    assert {name: repo.refs["main"] for name, repo in world.hub.repos.items()} == heads
    assert {request.method for request in world.hub.requests} == {"GET"}


def test_publish_gate_stops_what_does_not_belong(
    world: World, original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", "--path", "A", str(original), str(out), "--depth", "numbers", "--json"]
    assert world.client.run(*command).code == 0
    (out / NF4 / "scratch.txt").write_text("not for others")
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.code == 1
    closed = done.json()["steps"][-1]
    assert (closed["gate"], closed["state"]) == ("publish", "closed")
    assert closed["reasons"] == ["scratch.txt: not a part of the artifact"]
    assert "owner/mine" not in world.hub.repos
    (out / NF4 / "scratch.txt").rename(out / NF4 / ".env")
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.json()["steps"][-1]["reasons"][0].startswith(".env: looks like")
    (out / NF4 / ".env").unlink()
    assert world.client.run(*command, "--repo", "owner/mine").code == 0


def test_publish_gate_deletes_nothing(world: World, original: Path, tmp_path: Path) -> None:
    world.hub.repos["owner/mine"] = Repo.create(tmp_path / "theirs")
    world.hub.repos["owner/mine"].put({"theirs.txt": b"keep me"})
    command = ["run", "--path", "A", str(original), str(tmp_path / "out"), "--depth", "numbers"]
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.code == 0, done.err
    assert world.hub.repos["owner/mine"].read("theirs.txt") == b"keep me"


def test_hub_that_fails_closes_the_gate_and_leaves_the_artifact(
    world: World, original: Path, tmp_path: Path
) -> None:
    world.client.token = "wrong"
    command = ["run", "--path", "A", str(original), str(tmp_path / "out"), "--depth", "numbers"]
    done = world.client.run(*command, "--repo", "owner/mine", "--json")
    assert done.code == 1
    assert done.json()["steps"][-1]["gate"] == "publish"
    assert "wrong" not in done.out + done.err
    assert manifest(tmp_path / "out" / NF4)["verified"]["passed"]


def test_no_token_is_told_before_anything(world: World, original: Path, tmp_path: Path) -> None:
    world.client.token = None
    command = ["run", "--path", "A", str(original), str(tmp_path / "out"), "--depth", "numbers"]
    done = world.client.run(*command, "--repo", "owner/mine")
    assert done.code == 2
    assert "no token to write there with" in done.err
    assert not (tmp_path / "out").exists()


def test_source_on_the_hub_is_known_by_its_commit(
    world: World, original: Path, tmp_path: Path
) -> None:
    world.hub.repos["owner/Tiny-dense-1B"] = Repo.of(original)
    out = tmp_path / "out"
    command = ["run", "--path", "A", "owner/Tiny-dense-1B", str(out), "--depth", "numbers"]
    forecast = world.client.run(*command, "--dry-run", "--json")
    assert forecast.code == 0, forecast.err
    assert not out.exists()
    done = world.client.run(*command, "--json")
    assert done.code == 0, done.err
    assert manifest(out / NF4)["source"]["repo"] == "owner/Tiny-dense-1B"
    said = [row["state"] for row in world.client.run(*command, "--json").json()["steps"]]
    assert said == ["kept", "kept", "kept", "skipped"]


def test_runs_without_torch(original: Path, tmp_path: Path) -> None:
    arguments = ["run", "--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    arguments += [str(original), str(tmp_path / "out"), "--quiet"]
    code = (
        "import sys\nfrom qwen35.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
