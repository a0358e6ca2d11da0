"""What a run is asked for: paths, the TOML file and its every problem, the graph."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_models import make_variant
from qwen35.checkpoint.open import describe
from qwen35.cli.main import main
from qwen35.errors import UsageError
from qwen35.pipeline.graph import GATES, make_graph
from qwen35.pipeline.planned_artifacts import plan_artifacts, sweep_memory, threads_within
from qwen35.pipeline.run_file import (
    ARTIFACT_KEYS,
    EVALUATE_KEYS,
    GGUF_KEYS,
    PUBLISH_KEYS,
    TOP_KEYS,
    read_run_file,
)
from qwen35.pipeline.run_request import (
    ArtifactRequest,
    MeasurementRequest,
    RunRequest,
    path_artifacts,
)
from qwen35.serving.endpoint import Endpoint
from running import run as converted

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("source"), "dense")


def job_of(tmp_path: Path, text: str) -> RunRequest:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return read_run_file(path)


def sentences(tmp_path: Path, text: str) -> list[str]:
    return [str(problem).removeprefix("run.toml: ") for problem in job_of(tmp_path, text).problems]


# --- paths


def test_paths_are_those_of_the_documents() -> None:
    assert [w.recipe for w in path_artifacts(["A"])] == ["text-nf4"]
    text, gguf = path_artifacts(["B"])
    assert text.recipe == "text"
    assert gguf.types == ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
    assert [w.recipe for w in path_artifacts(["fp8"])] == ["fp8"]


def test_path_b_always_makes_the_f16() -> None:
    assert path_artifacts(["B"], types=["Q4_K_M"])[1].types == ("F16", "Q4_K_M")
    assert path_artifacts(["B"], types=["Q4_K_M", "F16"])[1].types == ("F16", "Q4_K_M")


def test_several_paths_make_each_artifact_once() -> None:
    assert len(path_artifacts(["A", "B", "fp8", "A"])) == 4
    assert path_artifacts(["nf4", "gguf"]) == path_artifacts(["A", "B"])
    assert [one.recipe for one in path_artifacts(["int4", "nvfp4"])] == ["int4", "nvfp4"]


def test_unknown_path_and_types_without_b_are_refused() -> None:
    with pytest.raises(UsageError, match="path 'C': unknown, expected A, B, nf4, gguf, fp8"):
        path_artifacts(["C"])
    with pytest.raises(UsageError, match="types and imatrix: are for path B"):
        path_artifacts(["A"], types=["Q8_0"])


# --- the file


def test_file_is_read_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    job = job_of(
        tmp_path,
        """
        model = "model"
        out = "made"
        path = ["A", "B"]
        types = ["q4_k_m "]
        depth = "numbers"
        [[artifact]]
        recipe = "mine.toml"
        name = "own"
        repo = "them/own"
        calib_mode = "mse"
        mse_grid_size = 10
        activation_stats = "stats.json"
        keep = ["lm_head"]
        layout = "modelopt"
        activations = true
        kv_cache = "fp8"
        [[gguf]]
        types = ["Q8_0"]
        imatrix = "hf:owner/name/file"
        mmproj = true
        mtp = "separate"
        mtp_type = "BF16"
        split_max_size = "40G"
        [evaluate]
        text = "eval.txt"
        chunks = 3
        [publish]
        owner = "me"
        private = true
        """,
    )
    assert job.problems == ()
    assert (job.model, job.out) == (str(tmp_path / "model"), tmp_path / "made")
    assert (job.depth, job.owner, job.private) == ("numbers", "me", True)
    assert job.measurement == MeasurementRequest(tmp_path / "eval.txt", 3)
    nf4, text, gguf, own, more = job.artifacts
    assert (nf4.recipe, text.recipe, gguf.types) == ("text-nf4", "text", ("F16", "Q4_K_M"))
    assert (own.recipe, own.name, own.repo) == (str(tmp_path / "mine.toml"), "own", "them/own")
    assert str(own.scale_choice) == "mse(grid=10)"
    assert own.activation_stats == tmp_path / "stats.json"
    assert own.keep == ("lm_head",)
    assert (own.layout, own.activations, own.kv_cache) == ("modelopt", True, "fp8")
    assert (more.types, more.imatrix, more.mmproj) == (("Q8_0",), "hf:owner/name/file", True)
    assert (more.mtp, more.mtp_type, own.mtp) == ("separate", "BF16", None)
    assert more.split_max_size == 40 * 10**9


def test_hub_id_stays_one(tmp_path: Path) -> None:
    assert job_of(tmp_path, 'model = "me/x@v1"\nout = "o"\npath = "A"').model == "me/x@v1"


HEAD = 'model = "m"\nout = "o"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('out = "o"\npath = "A"', "model: is missing"),
        ('model = "m"\npath = "A"', "out: is missing"),
        (HEAD, "path: nothing to make; set path"),
        (HEAD + 'path = "C"', "path 'C': unknown, expected A, B, nf4, gguf, fp8"),
        (HEAD + "path = 1", "path: 1, expected a string or a list of strings"),
        (HEAD + 'path = ["A", 1]', "path: ['A', 1], expected a string or a list of strings"),
        (HEAD + 'path = "A"\ntypes = ["Q8_0"]', "types and imatrix: are for path B"),
        (
            HEAD + 'codes = "refined"\n[[artifact]]\nrecipe = "nf4"',
            "codes and hessian: are for the paths; set path, or give them in [[artifact]] or",
        ),
        (
            HEAD + 'path = "A"\ndepth = "deep"',
            "depth: 'deep' is unknown, expected structure, ",
        ),
        (HEAD + 'path = "A"\nmodle = "x"', "modle: unknown key, expected model, out, adapters"),
        (HEAD + 'path = "A"\n[evaluate]', "evaluate.text: is missing"),
        (HEAD + 'path = "A"\n[evaluate]\ntext = "t"\nchunks = -1', "evaluate.chunks: -1, expected"),
        (
            HEAD + 'path = "A"\n[evaluate]\ntext = "t"\nstreamed = true\nsimulate = "vllm"',
            "evaluate.simulate: 'vllm' is unknown, expected llama.cpp",
        ),
        (
            HEAD + 'path = "A"\n[evaluate]\ntext = "t"\nsimulate = "llama.cpp"',
            "evaluate.simulate: is for models that run layer by layer; set streamed = true",
        ),
        (HEAD + 'path = "A"\n[evaluate]\ntext = true', "evaluate.text: True, expected a string"),
        (HEAD + 'path = "A"\n[publish]\nowner = "a/b"', "publish.owner: 'a/b', expected a user"),
        (HEAD + 'path = "A"\n[publish]\nprivate = 1', "publish.private: 1, expected true or false"),
        (HEAD + "artifact = [1]", "artifact 1: not a table; write [[artifact]]"),
        (HEAD + "[[artifact]]", "artifact 1.recipe: is missing"),
        (HEAD + '[[artifact]]\nrecipe = "nf4"\nrms_factor = 3', "artifact 1: calib_mode: is mis"),
        (
            HEAD + '[[artifact]]\nrecipe = "fp8"\ncalib_mode = "best"',
            "artifact 1: --calib-mode: 'best', expected rms, max",
        ),
        (
            HEAD + '[[artifact]]\nrecipe = "nf4"\nname = "../up"',
            "artifact 1.name: '../up', expected a folder's plain name",
        ),
        (
            HEAD + '[[artifact]]\nrecipe = "nf4"\nrepo = "me/x@v1"',
            "artifact 1.repo: 'me/x@v1' is malformed, expected owner/name",
        ),
        (
            HEAD + '[[artifact]]\nrecipe = "nvfp4"\nlayout = ""',
            "artifact 1.layout: '' is unknown, expected compressed-tensors, gptq, modelopt",
        ),
        (
            HEAD + '[[artifact]]\nrecipe = "nvfp4"\nkv_cache = "fp4"',
            "artifact 1.kv_cache: 'fp4' is unknown, expected fp8",
        ),
        (HEAD + '[[artifact]]\nrecipe = "int5"', "artifact 1.recipe: 'int5' is unknown"),
        (HEAD + '[[gguf]]\ntypes = ["Q4_KM"]', "gguf 1.types: 'Q4_KM' is unknown"),
        (HEAD + "[[gguf]]", "gguf 1.types: is missing"),
        (HEAD + '[[gguf]]\ntypes = "Q8_0"', "gguf 1.types: 'Q8_0', expected a list of strings"),
        (HEAD + '[[gguf]]\ntypes = ["F16"]\nmmproj = 3', "gguf 1.mmproj: 3, expected true, f"),
        (HEAD + '[[gguf]]\ntypes = ["F16"]\nmmproj = "Q4_K"', "gguf 1: mmproj: 'Q4_K' is unknown"),
        (
            HEAD + '[[gguf]]\ntypes = ["F16"]\nsplit_max_size = "0"',
            "gguf 1.split_max_size: '0', expected a size such as \"40G\"",
        ),
        (
            HEAD + '[[gguf]]\ntypes = ["F16"]\nsplit_max_size = "large"',
            "gguf 1.split_max_size: 'large', expected a size such as \"40G\"",
        ),
        (
            HEAD + '[[gguf]]\ntypes = ["F16"]\nsplit_max_size = 5',
            "gguf 1.split_max_size: 5, expected a string",
        ),
    ],
)
def test_each_problem_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    (found,) = sentences(tmp_path, text)
    assert found.startswith(expected)


def test_all_problems_are_told_at_once(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.toml"
    path.write_text('out = "o"\npath = "C"\nx = 1\n[[gguf]]\ntypes = 1')
    assert main(["run", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: run.toml: ") for line in lines)
    assert main(["run", str(path), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert len(said["errors"]) == 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["model = ", "\x00", "a = 1\na = 2"])
def test_file_that_is_not_toml(tmp_path: Path, text: str, capsys: Capture) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert main(["run", str(path)]) == 2
    assert f"error: {path}: not valid TOML" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["run.toml", "x"], "run: run.toml x, expected one FILE.toml, or --path with MODEL and"),
        (["model"], "run: model, expected one FILE.toml"),
        (["run.toml", "--depth", "numbers"], "--depth: is for --path; with a run file, set"),
        (["run.toml", "--private"], "--private: is for --path"),
        (["--path", "A", "model"], "--path: given with 'model', expected MODEL and OUT"),
        (["--path", "B", "m", "o", "--repo", "me/x"], "--repo me/x: one repository for 2 artif"),
        (["--path", "A", "m", "o", "--repo", "a b"], "--repo: 'a b/name' is malformed"),
        (["--path", "A", "m", "o", "--types", "Q8_0"], "types and imatrix: are for path B"),
    ],
)
def test_flags_that_do_not_fit(arguments: list[str], found: str, capsys: Capture) -> None:
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {found}")


# --- what can only be seen with the checkpoint


def plan(source: Path, job: RunRequest) -> tuple[list[str], list[str]]:
    artifacts, problems = plan_artifacts(describe(str(source)), job)
    return [a.name for a in artifacts], [str(problem) for problem in problems]


def test_names_by_path(source: Path, tmp_path: Path) -> None:
    job = RunRequest(str(source), tmp_path, path_artifacts(["A", "B", "fp8"]), depth="numbers")
    names, problems = plan(source, job)
    assert problems == []
    stem = source.name
    assert names == [
        f"{stem}-text-bnb-4bit",
        f"{stem}-text",
        f"{stem}-text-GGUF",
        f"{stem}-FP8",
    ]


def test_everything_that_does_not_fit_is_told_at_once(source: Path, tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        f"""
        model = "{source}"
        out = "o"
        path = "A"
        [[artifact]]
        recipe = "nfx"
        [[artifact]]
        recipe = "text-nf4"
        [[artifact]]
        recipe = "fp8"
        repo = "me/x"
        [[artifact]]
        recipe = "text-fp8"
        repo = "me/x"
        [[gguf]]
        types = ["Q9"]
        [evaluate]
        text = "none.txt"
        """,
    )
    names, problems = plan(source, job)
    assert len(names) == 4
    starts = [
        "nfx: recipe 'nfx': not a built-in recipe",
        "gguf mix: types: 'Q9' is unknown, expected F32",
        f"{source.name}-text-bnb-4bit: two artifacts with this name",
        "me/x: two artifacts for this repository",
        f"{tmp_path / 'none.txt'}: cannot be read",
    ]
    assert [found[: len(start)] for found, start in zip(problems, starts, strict=True)] == starts


def test_missing_library_is_told_before_anything(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = __import__("importlib.util").util.find_spec
    gone = ("torch", "llama_cpp")
    fake = lambda name, *rest: None if name in gone else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", fake)
    _, problems = plan(source, RunRequest(str(source), tmp_path, path_artifacts(["A", "B"])))
    said = [found.partition(";")[0] for found in problems]
    assert said == [
        "depth behaviour: torch is not installed",
        "depth behaviour: llama_cpp is not installed",
    ]
    _, problems = plan(
        source, RunRequest(str(source), tmp_path, path_artifacts(["A"]), depth="numbers")
    )
    assert problems == []


def test_graph_has_the_gates_in_their_places(source: Path, tmp_path: Path) -> None:
    text_only, files = path_artifacts(["B"])
    wanted = (text_only, replace(files, endpoint=Endpoint("http://127.0.0.1:9")))
    job = RunRequest(
        str(source), tmp_path, wanted, measurement=MeasurementRequest(tmp_path), owner="me"
    )
    artifacts, _ = plan_artifacts(describe(str(source)), job)
    graph = {step.name: step for step in make_graph(job, artifacts)}
    text, gguf = (artifact.name for artifact in artifacts)
    assert graph[f"make {text}"].gates == ("artifact",)
    assert graph[f"make {gguf}"].gates == ("artifact", "quantization")
    assert graph[f"verify {gguf}"].needs == (f"make {gguf}",)
    assert graph[f"verify {gguf}"].gates == ("verification",)
    assert graph["evaluate"].any_need
    assert f"ask {text}" not in graph
    assert graph[f"ask {gguf}"].needs == (f"verify {gguf}",)
    assert graph[f"ask {gguf}"].gates == ("serving",)
    assert graph[f"document {text}"].needs == (f"verify {text}", "evaluate")
    assert graph[f"document {gguf}"].needs == (f"ask {gguf}", "evaluate")
    assert graph[f"publish {gguf}"].needs == (f"document {gguf}",)
    assert graph[f"publish {gguf}"].gates == ("publish",)
    assert {gate for step in graph.values() for gate in step.gates} == set(GATES)
    seen: set[str] = set()
    for name, step in graph.items():
        assert set(step.needs) <= seen
        seen.add(name)


def test_quantized_source_cannot_be_measured_against(source: Path, tmp_path: Path) -> None:
    nf4 = converted(source, tmp_path / "nf4").out
    (tmp_path / "text.txt").write_text("Some text.")
    measurement = MeasurementRequest(tmp_path / "text.txt")
    wanted = (ArtifactRequest("text"),)
    job = RunRequest(str(nf4), tmp_path / "out", wanted, depth="numbers", measurement=measurement)
    _, (problem,) = plan(nf4, job)
    assert "quantized, so there is no exact reference to measure against" in problem


def test_memory_takes_threads_away(source: Path, tmp_path: Path) -> None:
    job = RunRequest(str(source), tmp_path, path_artifacts(["A"]), depth="numbers")
    artifacts, _ = plan_artifacts(describe(str(source)), job)
    assert threads_within(artifacts, 8, None) == 8
    needed = artifacts[0].peak_memory(2)
    assert sweep_memory(artifacts * 2, 2) > needed
    assert threads_within(artifacts, 8, needed) == 2
    with pytest.raises(UsageError, match="too little"):
        threads_within(artifacts, 8, 1000)


# --- dry run


def test_dry_run_shows_the_graph_and_touches_nothing(
    source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    command = ["run", "--path", "B", str(source), str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--repo", "me"]) == 0
    text = capsys.readouterr().out
    for wanted in ("artifact gate, quantization gate", "disk: needs", "memory: about", "me/Tiny"):
        assert wanted in text
    assert main([*command, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    made = sum(artifact["bytes"] for artifact in said["artifacts"].values())
    assert said["disk_needed"] == made > 0
    assert said["disk_free"] > 0
    assert said["source_read_bytes"] < sum(
        row["read_bytes"] for row in said["steps"] if row["step"].startswith("make")
    )
    assert said["peak_memory"] >= max(row["memory"] for row in said["steps"])
    assert {row["note"] for row in said["steps"] if row["step"].startswith("publish")} == {
        "skipped: no repository was named"
    }
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before


def test_published_size_can_be_forecast(capsys: Capture, tmp_path: Path) -> None:
    command = ["run", "--path", "A", "--path", "fp8", "Qwen3.5-9B", str(tmp_path / "o"), "--json"]
    assert main([*command, "--dry-run", "--depth", "numbers"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["artifacts"]) == ["Qwen3.5-text-9B-bnb-4bit", "Qwen3.5-9B-FP8"]
    assert main(command[:-1]) == 2  # without weights there is nothing to run
    assert "without weights" in capsys.readouterr().err


# --- the files that we show


def test_file_in_the_documents_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "pipeline.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    job = job_of(tmp_path, shown)
    assert job.problems == ()
    assert len(job.artifacts) == 5
    assert all(
        key in text
        for key in (*TOP_KEYS, *ARTIFACT_KEYS, *GGUF_KEYS, *EVALUATE_KEYS, *PUBLISH_KEYS)
    )


def test_file_of_the_demo_is_one() -> None:
    job = read_run_file(ROOT / "demo" / "run.toml")
    assert job.problems == ()
    assert Path(job.model).is_dir()
    assert job.depth == "numbers"  # needs neither torch nor llama.cpp; demo.py asks and measures
