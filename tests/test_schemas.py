"""`--json` of every verb, real output against the documented schemas."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from adapters import make_adapter
from checkpoints import ASSET
from evaluating import gguf as gguf_in
from hub_client import REPO, World
from qwen35.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "schemas"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")


def schema(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return parsed


def problems(name: str, value: object) -> list[str]:
    errors = Draft202012Validator(schema(name)).iter_errors(value)
    return [f"{error.json_path}: {error.message[:300]}" for error in errors]


@pytest.fixture
def held(capsys: Capture) -> Any:
    """Run a verb with --json and hold its output to a schema; returns the value."""

    def run(*words: object, code: int = 0, name: str = "") -> Any:
        capsys.readouterr()
        assert main([*map(str, words), "--json", "--quiet"]) == code, capsys.readouterr().err
        value = json.loads(capsys.readouterr().out)
        assert problems(name or str(words[0]), value) == []
        return value

    return run


# --- the schemas themselves


def test_every_verb_has_one_and_the_page_lists_it() -> None:
    assert set(NAMES) == {*VERBS, "error"}
    page = (ROOT / "docs" / "schemas.md").read_text()
    assert set(re.findall(r"\(schemas/(\w+)\.json\)", page)) == set(NAMES)


def open_objects(value: object, path: str = "$") -> list[str]:
    """Return objects of a schema that name keys but let others through."""
    found = []
    if isinstance(value, dict):
        if "properties" in value and value.get("additionalProperties") is not False:
            found.append(path)
        for key, part in value.items():
            found += open_objects(part, f"{path}.{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            found += open_objects(part, f"{path}[{i}]")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_schema_that_names_every_key(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))
    assert open_objects(schema(name)) == []
    assert problems(name, {"something": "else"})


# --- what the verbs print


def test_inspect(held: Any, formats: Path) -> None:
    held("inspect", ASSET)
    held("inspect", "Qwen3.5-35B-A3B")
    held("inspect", formats / "nf4")
    held("inspect", formats / "gguf")


def test_plan_and_convert(held: Any, dense: Path, tmp_path: Path) -> None:
    held("plan", "Qwen3.5-27B", "--recipe", "fp8")
    held("plan", "--roles")
    held("plan", "Qwen3.5-27B", "--types", "Q4_K_M")
    held("plan", ASSET, "--types", "Q4_K_M,F16", "--mmproj")
    held("plan", ASSET, "--fit", "1GB", "--mmproj")
    held("convert", dense, tmp_path / "a", "--recipe", "fp8", "--dry-run", name="plan")
    assert "report" in held("convert", dense, tmp_path / "a", "--recipe", "fp8")
    assert held("convert", dense, tmp_path / "b", "--recipe", "nf4")["nf4"] > 0


def test_merge(held: Any, tmp_path: Path) -> None:
    adapter = make_adapter("queries", tmp_path / "adapter")
    held("merge", ASSET, adapter, tmp_path / "out", "--dry-run", name="plan")
    assert held("merge", ASSET, adapter, tmp_path / "out")["bytes"] > 0
    alone = ("gguf", ASSET, tmp_path / "alone", "--adapter", adapter, "--adapter-only")
    held(*alone, "--dry-run", name="plan")
    assert held(*alone)["bytes"] > 0
    held("inspect", tmp_path / "alone")


def test_slices(held: Any, dense: Path, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        held("convert", dense, tmp_path / "out", "--recipe", "nf4", "--slice", part)
    assert held("finalize", tmp_path / "out")["nf4"] > 0
    held("convert", dense, tmp_path / "fp8", "--recipe", "fp8", "--slice", "1/1")
    assert held("finalize", tmp_path / "fp8")["report"]["verdict"] == "GOOD"
    held("gguf", ASSET, tmp_path / "gguf", "--types", "Q8_0", "--slice", "1/1")
    held("finalize", tmp_path / "gguf")


def test_gguf(held: Any, tmp_path: Path) -> None:
    asked = ("gguf", ASSET, tmp_path / "out", "--types", "Q8_0")
    held(*asked, "--dry-run")
    held(*asked, "--export", tmp_path / "types.txt")
    held(*asked)


def test_calibrate(held: Any, moe: Path, tmp_path: Path) -> None:
    asked = ("calibrate", ASSET, "--text", ASSET / "eval.txt", "--chunks", "1", "--context", "64")
    held(*asked, "--output", tmp_path / "out", "--dry-run")
    assert held(*asked, "--draft", "--output", tmp_path / "out")["draft"]["tokens"] == 63


def test_verify(held: Any, formats: Path, tmp_path: Path) -> None:
    held("verify", formats / "nf4", "--source", ASSET)
    held("verify", formats / "gguf", "--source", ASSET)
    broken = tmp_path / "broken"
    shutil.copytree(formats / "text", broken)
    (broken / "config.json").write_text("{}")
    held("verify", broken, code=1)


def test_answers(formats: Path) -> None:
    """The answers of depth behaviour, in the form of both engines."""
    from qwen35.verification.behaviour import IMAGE, Answer
    from qwen35.verification.questions import Question
    from qwen35.verification.verdict import Verdict

    answers = (Answer(IMAGE, "red"), Answer(Question("2 + 2?", "4"), "4", file="a.gguf"))
    counts = {"weights": 1, "packed": 0, "files": 1}
    verdict = Verdict("x", "plain", "behaviour", counts, (), (), answers)
    assert problems("verify", json.loads(json.dumps(verdict.to_json()))) == []


def test_evaluate(held: Any, formats: Path, tmp_path: Path) -> None:
    base, other = gguf_in(formats, "F16"), gguf_in(formats, "Q8_0")
    asked = ("--text", formats / "text.txt", "--chunks", "1", "--threads", "1")
    held("evaluate", base, other, *asked, "--dry-run")
    held("evaluate", base, other, *asked, "--report", tmp_path / "report")
    assert problems("evaluate", json.loads((tmp_path / "report/report.json").read_text())) == []
    held("evaluate", base, *asked)
    held("report", tmp_path / "report", "--output", tmp_path / "page")


def test_tune(held: Any, formats: Path, tmp_path: Path) -> None:
    asked = (
        "tune",
        ASSET,
        "--format",
        "gguf",
        "--size",
        "5bpw",
        "--chunks",
        "1",
        "--types",
        "q4_K,q6_K",
    )
    text = ("--text", formats / "text.txt", "--output", tmp_path / "t.toml")
    held(*asked, *text, "--dry-run")
    held(*asked, *text)


def test_run(held: Any, tmp_path: Path) -> None:
    asked = ("run", "--path", "A", ASSET, tmp_path / "made", "--depth", "numbers")
    held(*asked, "--dry-run")
    assert held(*asked)["passed"]
    held(*asked)


def test_reproduce(held: Any, formats: Path) -> None:
    assert held("reproduce", formats / "text", "--source", ASSET)["same"]


def test_amend(held: Any, formats: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(formats / "text", tmp_path / "out"))
    held("amend", out)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    assert held("amend", out, "--dry-run") == held("amend", out)
    (out / "config.json").write_text("{}")
    assert held("amend", out, code=1)["findings"]


def test_publish(world: World) -> None:
    for arguments in (["--mode", "check"], [], ["--mode", "diff"], ["--mode", "fetch"]):
        done = world.client.run("publish", world.folder, REPO, *arguments, "--json")
        assert done.code == 0, done.err
        assert problems("publish", done.json()) == []
    (world.folder / ".env").write_text("X=1")
    done = world.client.run("publish", world.folder, REPO, "--json")
    assert done.code == 1
    assert problems("publish", done.json()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "./nowhere"],
        ["run", "--path", "B", "--types", "Q9", "--device", "tpu", str(ASSET), "made"],
    ],
    ids=" ".join,
)
def test_errors(words: Sequence[str], held: Any, tmp_path: Path) -> None:
    held(*words, code=2, name="error")
