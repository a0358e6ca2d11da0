"""`import qwen35`: the verbs of the command line, with their names, flags and results."""

from __future__ import annotations

import argparse
import doctest
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import pytest

import qwen35
from checkpoints import ASSET
from evaluating import gguf as gguf_in
from hub_client import REPO, World
from parsers import actions_of
from qwen35.api.run_api import RunResult
from qwen35.api.write_result import WriteResult
from qwen35.calibration.calibration_run import CalibrationResult
from qwen35.cli.main import VERBS, main, parser_of
from qwen35.errors import InputError, OutputError, UsageError
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.planning.output_plan import Plan
from qwen35.reproduction import Reproduction
from qwen35.tuning.tuning_job import TuningResult
from qwen35.verification.verdict import Verdict

FUNCTIONS = [verb for verb in VERBS if verb != "ui"]
"""A page is no function: it calls them."""

TERMINAL = {"json", "quiet"}
"""How results are shown: a program has the results."""

ONLY_FLAGS = {
    # a table (ROLES); `types_that_fit` of its module; and peak memory, which is shown
    "plan": {"roles", "fit", "context", "threads", "memory"},
    "calibrate": {"dry_run"},
    "evaluate": {"dry_run", "tasks", "lm_eval", "include_path"},
    "run": {"dry_run"},
    "tune": {"dry_run"},
}
"""Flags that are no keywords: a dry run of these gives no result of the kind, nor do tasks."""

ONLY_KEYWORDS = {"run": {"tell"}, "verify": {"questions"}}


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_flags_are_keywords(verb: str) -> None:
    flags = {a.dest for a in actions_of(parser_of(verb)) if a.dest != argparse.SUPPRESS} - {"help"}
    keywords = set(inspect.signature(getattr(qwen35, verb)).parameters)
    assert flags - TERMINAL - ONLY_FLAGS.get(verb, set()) == (
        keywords - {"progress"} - ONLY_KEYWORDS.get(verb, set())
    )


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_defaults_are_the_flags(verb: str) -> None:
    flags = {action.dest: action.default for action in actions_of(parser_of(verb))}
    for name, parameter in inspect.signature(getattr(qwen35, verb)).parameters.items():
        if parameter.default is inspect.Parameter.empty or name not in flags:
            continue
        empty: list[object] = [None, (), [], False]
        same = flags[name] == parameter.default
        assert same or (flags[name] in empty and parameter.default in empty), name


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_every_verb_says_what_it_takes_and_raises(verb: str) -> None:
    function = getattr(qwen35, verb)
    text = inspect.getdoc(function) or ""
    for name in inspect.signature(function).parameters:
        assert f"{name}: " in text, name
    assert "Raises:" in text


def test_public_names_are_the_verbs() -> None:
    assert qwen35.__all__ == sorted(qwen35.__all__)
    assert set(FUNCTIONS) == {name for name in qwen35.__all__ if name.islower()} - {"__version__"}
    assert dir(qwen35) == sorted([*qwen35.__all__, "errors"])
    for name in qwen35.__all__:
        assert getattr(qwen35, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qwen35.__getattr__("nonsense")


def test_verbs_are_functions_of_their_own_modules() -> None:
    for verb in FUNCTIONS:
        function = getattr(qwen35, verb)
        assert inspect.isfunction(function), verb
        assert function.__name__ == verb
        assert function.__module__ == f"qwen35.api.{verb}_api"
        assert "Args:" in (function.__doc__ or "")
        assert set(vars(function)) <= {"__wrapped__"}, "a function has no attributes of a module"


def test_it_is_typed() -> None:
    """Types that mypy checks where this file is checked; here only that they are at hand."""

    def never(model: str, out: Path) -> None:
        assert_type(qwen35.plan(model), Plan)
        assert_type(qwen35.convert(model, out, recipe="fp8"), WriteResult)
        assert_type(qwen35.gguf(model, out, types=["F16"]), WriteResult)
        assert_type(qwen35.verify(out, source=model), Verdict)
        assert_type(qwen35.evaluate(model, [out], text="x"), EvaluationReport)
        assert_type(qwen35.calibrate(model, text="x", output=out), CalibrationResult)
        assert_type(qwen35.tune(model, format="gguf", text="x", output=out), TuningResult)
        assert_type(qwen35.run(model, out, path="A"), RunResult)
        assert_type(qwen35.reproduce(out), Reproduction)

    assert callable(never)
    assert (Path(qwen35.__file__).parent / "py.typed").is_file()


def test_chunks_of_text_have_one_name_and_the_former_one_still_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = ASSET / "eval.txt"
    for verb in ("calibrate", "evaluate", "run", "tune"):
        flags = [a for a in actions_of(parser_of(verb)) if a.option_strings]
        names = {a.option_strings[-1]: (a.dest, a.help) for a in flags}
        assert names["--chunks"][0] == "chunks"
        assert names["--windows"] == ("chunks", argparse.SUPPRESS)
    command = ["calibrate", str(ASSET), "--text", str(text), "--output", str(tmp_path / "out")]
    assert main([*command, "--windows", "3", "--dry-run"]) == 0
    assert "3 chunks of 512 tokens" in capsys.readouterr().out
    given: Any = {"text": tmp_path / "none", "output": tmp_path / "out"}
    with pytest.raises(UsageError, match=r"^--chunks: 'x', expected a whole number$"):
        qwen35.calibrate(ASSET, **given, windows="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="windows"):
        qwen35.calibrate(ASSET, **given, windows=1, chunks=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="windows"):
        qwen35.convert(ASSET, tmp_path / "out", windows=1)  # type: ignore[call-arg]


# --- what they return


def test_convert_verify_and_reproduce(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = qwen35.convert(dense, out, recipe="fp8", dry_run=True)
    assert not out.exists()
    assert (dry.hashes, dry.report) == ({}, None)
    made = qwen35.convert(dense, out, recipe="fp8", threads=1)
    assert made.plan.digest == dry.plan.digest
    assert made.nbytes == dry.nbytes == sum(path.stat().st_size for path in out.iterdir())
    assert made.report is not None
    assert made.passed
    assert made.threads == 1
    verdict = qwen35.verify(out, source=dense)
    assert verdict.passed
    assert verdict.depth == "numbers"
    again = qwen35.reproduce(out, source=dense)
    assert set(again.files) == set(made.hashes)
    assert again.findings == ()
    (out / "config.json").write_text("{}")
    assert not qwen35.verify(out).passed


def test_slices_come_to_what_one_run_writes(dense: Path, tmp_path: Path) -> None:
    whole = qwen35.convert(dense, tmp_path / "whole", threads=1)
    for number in (2, 1):
        part = qwen35.convert(dense, tmp_path / "sliced", slice=(number, 2), threads=1)
        assert (part.part, part.hashes) == ((number, 2), {})
        assert part.weights > 0
    assert not (tmp_path / "sliced").exists()
    assert qwen35.finalize(tmp_path / "sliced").hashes == whole.hashes
    with pytest.raises(UsageError, match="exclude each other"):
        qwen35.convert(dense, tmp_path / "x", slice=(1, 2), workers=2)
    with pytest.raises(UsageError, match="i from 1 to N"):
        qwen35.convert(dense, tmp_path / "x", slice=(3, 2))


def test_plan_is_what_convert_carries_out(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "text-nf4", "keep": ["self_attn"], "drop_mtp": True}
    plan = qwen35.plan(dense, **options)
    assert qwen35.convert(dense, tmp_path / "out", **options).plan.digest == plan.digest


def test_inspect_tells_checkpoints_from_gguf(formats: Path) -> None:
    found = qwen35.inspect(ASSET)
    assert isinstance(found, dict)
    assert found["shards"] == 1
    rows = qwen35.inspect(formats / "gguf")
    assert isinstance(rows, list)
    assert [row["file_type"] for row in rows] == ["F16", "Q4_K_M", "Q8_0"]


def test_gguf_by_names_or_text(dense: Path, tmp_path: Path) -> None:
    by_text = qwen35.gguf(ASSET, tmp_path / "o", types="q8_0, F16", dry_run=True)
    by_names = qwen35.gguf(ASSET, tmp_path / "o", types=["Q8_0", "F16"], dry_run=True)
    assert by_text.plan.digest == by_names.plan.digest
    lines = tmp_path / "types.txt"
    done = qwen35.gguf(ASSET, tmp_path / "o", types="Q4_K_M", export=lines)
    assert done.exported is not None
    assert done.exported[0] == lines
    assert len(lines.read_text().splitlines()) == len(done.exported[1])
    assert not (tmp_path / "o").exists()


def test_evaluate_returns_and_writes_the_report(formats: Path, tmp_path: Path) -> None:
    base, other = gguf_in(formats, "F16"), gguf_in(formats, "Q8_0")
    text, folder = formats / "text.txt", tmp_path / "report"
    report = qwen35.evaluate(base, [other], text=text, chunks=1, threads=1, report=folder)
    assert 0 < report.candidates[0].comparison.kld.value < 0.1
    written = json.loads((folder / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    with pytest.raises(OutputError):
        qwen35.evaluate(base, [other], text=text, report=folder)


def test_publish_and_what_it_refuses(world: World) -> None:
    done = world.client.run(world.folder, REPO, entry="api_publish:main")
    assert done.code == 0, done.err
    found = done.json()
    looked, pushed, again = found["said"]
    assert "commit" not in looked
    assert looked["operations"] == pushed["operations"]
    assert pushed["commit"] == again["commit"] == world.repo.head
    assert again["counters"] == {"to upload": 0, "to delete": 0, "unchanged": 5, "kept": 1}
    assert world.repo.titles[-1] == "By the API"
    assert found["text"] == f"{REPO}@{world.repo.head[:12]}: holds all of it, verified"
    assert found["refused"].startswith(".env: looks like an environment file")


# --- what they raise


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (lambda: qwen35.plan("Qwen3.5-0.8B", recipe="nf5"), UsageError, "not a built-in recipe"),
        (lambda: qwen35.inspect("./nowhere"), InputError, "no such folder"),
        (lambda: qwen35.convert("Qwen3.5-0.8B", "out"), UsageError, "without weights"),
        (lambda: qwen35.convert(ASSET, ASSET), OutputError, "are the same folder"),
        (lambda: qwen35.gguf(ASSET, "out", types="Q9"), UsageError, "'Q9' is unknown"),
        (lambda: qwen35.gguf(ASSET, "out", device="cuda"), UsageError, "encoded by the CPU"),
        (lambda: qwen35.verify(ASSET, engine="vllm"), UsageError, "not used at depth"),
        (lambda: qwen35.run("a", "b", path="A", chunks=1), UsageError, "needs --text"),
        (lambda: qwen35.run("a.toml", repo="x"), UsageError, "is for --path"),
        (lambda: qwen35.run(ASSET, "b", path="A", device="tpu"), UsageError, "unknown"),
        (lambda: qwen35.publish(ASSET, "x"), UsageError, "expected owner/name"),
        (lambda: qwen35.reproduce("./nowhere"), InputError, "no manifest"),
        (
            lambda: qwen35.tune(ASSET, format="gguf", text="x", output="x"),
            UsageError,
            "one of them",
        ),
    ],
)
def test_errors_are_ours_and_leave_nothing(
    act: Callable[[], object],
    kind: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        act()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_all_problems_of_a_run_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        qwen35.run(ASSET, "out", path=["B"], types="Q9", device="tpu")
    said = [str(refused.value), *getattr(refused.value, "__notes__", [])]
    assert len(said) == 2
    assert any("Q9" in line for line in said)
    assert any("tpu" in line for line in said)


# --- the page


def test_the_page_of_the_api_is_true() -> None:
    page = Path(__file__).parent.parent / "docs" / "api.md"
    done = doctest.testfile(str(page), module_relative=False)
    assert done.attempted >= 5
    assert done.failed == 0
    rows = re.findall(r"^\| `(\w+)\(.*\| `?(\w+)", page.read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(FUNCTIONS)
    for name, result in rows[1:]:
        hints = inspect.signature(getattr(qwen35, name)).return_annotation
        assert hints == result, name
