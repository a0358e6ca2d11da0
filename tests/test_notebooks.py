"""Results as notebooks show them, and arguments as people write them there."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen35
from checkpoints import ASSET
from evaluating import gguf as gguf_in
from made_reports import ROWS, report_of
from qwen35.api.plan_api import types_that_fit
from qwen35.errors import Finding, InputError, UsageError
from qwen35.publishing.amendment import Amendment
from qwen35.reporting.ranking import rank
from qwen35.reporting.reported import parse_report
from qwen35.reproduction import Reproduction
from qwen35.verification.role_errors import RoleError
from qwen35.verification.verdict import Verdict

ROOT = Path(__file__).parent.parent


def html_of(result: Any) -> str:
    """What a notebook shows; its tags are balanced and hold no text of others unescaped."""
    html: str = result._repr_html_()
    for tag in ("table", "tr", "th", "td", "p"):
        assert html.count(f"<{tag}>") == html.count(f"</{tag}>")
    return html


def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell; the last expression of a cell is what a notebook shows."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    (tmp_path / "assets").symlink_to(ASSET.parent)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    names: dict[str, Any] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert [type(one).__name__ for one in shown] == [
        "Plan", "WriteResult", "Verdict", "EvaluationReport", "Ranking"
    ]  # fmt: skip
    assert all(html_of(one).count("<table>") for one in shown)
    assert "100%" in capsys.readouterr().err
    assert (tmp_path / "examples" / "notebook-out" / "report" / "report.html").is_file()


def test_a_plan_is_a_line_and_a_table() -> None:
    plan = qwen35.plan(ASSET, recipe="text-nf4")
    done = "156 weights in, 62 of them converted, 6.75 MB"
    assert repr(plan) == f"<Plan {ASSET} -> text-nf4: {done}>"
    html = html_of(plan)
    assert "<th>config.json</th><td>" in html
    assert html.count("<tr>") == len(list(plan.file_sizes())) + 1


def test_what_was_written(dense: Path, tmp_path: Path) -> None:
    dry = qwen35.convert(dense, tmp_path / "out", recipe="nf4", dry_run=True)
    assert repr(dry).startswith(f"<WriteResult {tmp_path / 'out'}: not written, ")
    assert "<th>config.json</th>" in html_of(dry)
    done = qwen35.convert(dense, tmp_path / "out", recipe="nf4")
    assert f": {len(done.hashes)} files, " in repr(done)
    assert done.hashes["config.json"] in html_of(done)


def test_a_verdict() -> None:
    error = RoleError("mlp.up_proj", "NF4", 3, 0.01, 1.0, 0.2)
    finding = Finding("config", "<b>", "a & b")
    counts = {"weights": 1, "packed": 1, "files": 1}
    good = Verdict("x", "nf4", "numbers", counts, (error,), (), source="s")
    assert repr(good).startswith(
        "<Verdict x: passed: weights and settings compared with the source"
    )
    assert "<th>mlp.up_proj</th><td>NF4</td><td>3</td><td>0.1</td><td>0.2</td>" in html_of(good)
    bad = Verdict("x", "nf4", "numbers", counts, (), (finding,))
    assert repr(bad) == "<Verdict x: FAILED: 1 finding>"
    assert "<th>config</th><td>&lt;b&gt;</td><td>a &amp; b</td>" in html_of(bad)


def test_an_evaluation_and_a_ranking(formats: Path) -> None:
    base, other = gguf_in(formats, "F16"), gguf_in(formats, "Q8_0")
    report = qwen35.evaluate(base, other, text=formats / "text.txt", chunks=1, threads=1)
    assert repr(report).startswith("<EvaluationReport qwen3.5-tiny-F16: qwen3.5-tiny-Q8_0 0.000")
    assert "<th>Mean KLD</th>" in html_of(report)
    ranking = rank([("", parse_report(report_of(ROWS[:2]), "r"))])
    assert repr(ranking).startswith("<Ranking m: Closest: Q8_0; Smallest within 0.01 nats: Q8_0; ")
    html = html_of(ranking)
    assert "<th>Closest</th><td>Q8_0</td>" in html
    assert "<th>2. nf4</th><td>700 B</td><td>0.0200</td>" in html


def test_sizes_are_texts_too(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for memory in ("4GB", 4 * 10**9):
        assert qwen35.convert(dense, out, recipe="nf4", memory=memory, dry_run=True).threads
    with pytest.raises(UsageError, match="--memory 1.00 kB: too little"):
        qwen35.convert(dense, out, recipe="nf4", memory="1kB", dry_run=True)
    split = qwen35.gguf(ASSET, out, types="F16", split_max_size="5MB", dry_run=True)
    assert len(split.plan.files) == 3
    fitting = types_that_fit(ASSET, "1GB").to_json()
    assert fitting == types_that_fit(ASSET, 10**9).to_json()
    for bare in (1, 2, 512, 999):
        expected = f"bytes, or a size such as '{bare}GB' or '{bare}MB'$"
        with pytest.raises(UsageError, match=f"^--split-max-size: {bare}, expected {expected}"):
            qwen35.gguf(ASSET, out, types="F16", split_max_size=bare, dry_run=True)
        with pytest.raises(UsageError, match=f"^--fit: {bare}, expected {expected}"):
            types_that_fit(ASSET, bare)
    wrong: Any
    for wrong in ("lots", 4e9, True, ["4GB"], 0, -1, "0GB", "-1GB", "0.0001kB", "1e400", "infGB"):
        with pytest.raises(
            UsageError, match="--memory: .*, expected bytes, or a size such as '4GB'"
        ):
            qwen35.convert(dense, out, recipe="nf4", memory=wrong, dry_run=True)
        with pytest.raises(UsageError, match="--memory"):
            qwen35.run(dense, out, path="A", memory=wrong)


def test_small_results_are_a_line() -> None:
    shown = repr(types_that_fit(ASSET, "1GB"))
    assert shown == f"<MemoryFit of {ASSET} in 1.00 GB: F32 is the largest that fits, 62.56 MB>"
    finding = Finding("bytes", "a", "differ")
    assert repr(Reproduction(("a", "b"), (), ())) == "<Reproduction of 2 files: the same bytes>"
    assert repr(Reproduction(("a",), (finding,), ())) == "<Reproduction of 1 file: 1 difference>"
    done = Amendment(Path("out"), "why", {"config.json": None, "x": None}, (), {}, {})
    assert repr(done) == "<Amendment of out: config.json, x>"
    assert repr(replace(done, findings=(finding,))) == "<Amendment of out: 1 finding>"


WRONG: dict[str, tuple[object, ...]] = {
    "int": ("2", 2.5, True, [2], b"2"),
    "float": ("2", True, [2]),
    "bool": ("no", 1, 0, []),
    "Sequence": (3, b"x", [3], [None], {"a": 1}, True, ["a\0b"]),
    "tuple[int, int]": ("1/2", [1, 2], (1,), (1, "2"), (1, 2, 3)),
    "str": (3, b"x", ["x"], 2.5, Path("x"), "a\0b", "\ud800"),
    "str | Path": (3, b"x", ["x"], True, {"a": 1}, np.arange(2), "a\0b", "\ud800", Path("a\0b")),
}
"""Values by the annotation that they do not fit."""

VERBS = ["amend", "calibrate", "convert", "evaluate", "finalize", "gguf", "merge", "plan"]
VERBS += ["inspect", "publish", "report", "reproduce", "run", "tune", "verify"]


@pytest.mark.parametrize("verb", VERBS)
def test_arguments_of_another_kind_are_refused_in_a_sentence(verb: str, tmp_path: Path) -> None:
    function, tried = getattr(qwen35, verb), 0
    parameters = signature(function).parameters
    named = {n: p for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}
    required: dict[str, Any] = {
        n: tmp_path if "Path" in str(p.annotation) else str(tmp_path)
        for n, p in named.items()
        if p.default is p.empty
    }
    for name, parameter in named.items():
        annotation = str(parameter.annotation)
        kinds = [kind for kind in WRONG if kind == annotation.removesuffix(" | None")]
        kinds += ["Sequence"] if "Sequence[" in annotation else []
        for value in (one for kind in kinds for one in WRONG[kind]):
            tried += 1
            with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')}: .*, expected "):
                function(**{**required, name: value})
    assert tried
    assert list(tmp_path.iterdir()) == []


def test_every_verb_checks_its_arguments() -> None:
    functions = {name for name in qwen35.__all__ if isfunction(getattr(qwen35, name))}
    assert functions == set(VERBS)


def test_secrets_of_another_kind_are_not_repeated() -> None:
    wrong: Any = b"hf_secret"
    with pytest.raises(UsageError, match="^--hf-token: of type bytes, expected a text$"):
        qwen35.plan(ASSET, hf_token=wrong)


def test_numbers_of_numpy_and_iterables_are_as_good(dense: Path, tmp_path: Path) -> None:
    given: Any = {"calib_mode": "rms", "rms_factor": 2.5, "verify_seed": 3, "memory": 4 * 10**9}
    numpy: Any = {"calib_mode": np.str_("rms"), "rms_factor": np.float32(2.5)}
    numpy |= {"verify_seed": np.int64(3), "memory": np.int64(4 * 10**9)}
    kept: Any = (role for role in ["self_attn"])
    for name, values, keep in (("a", given, ["self_attn"]), ("b", numpy, kept)):
        qwen35.convert(dense, tmp_path / name, recipe="fp8", keep=keep, threads=1, **values)
    a, b = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [one.read_bytes() for one in a] == [one.read_bytes() for one in b]
    assert len(a) > 1
    parts: Any = (np.int64(1), np.int64(2))
    qwen35.convert(dense, tmp_path / "c", recipe="nf4", slice=parts)
    true: Any = np.bool_(True)
    assert qwen35.plan(dense, drop_mtp=true).digest == qwen35.plan(dense, drop_mtp=True).digest


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["threads", "workers"])
def test_there_is_at_least_one_thread(name: str, value: int, dense: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"--{name}: {value}, expected 1 or more"):
        qwen35.convert(dense, tmp_path / "out", **given)


def test_one_name_is_a_list_of_one(dense: Path, tmp_path: Path) -> None:
    listed = qwen35.plan(dense, recipe="nf4", keep=["self_attn"])
    assert qwen35.plan(dense, recipe="nf4", keep="self_attn").digest == listed.digest
    one = qwen35.plan(ASSET, types="Q8_0", tensor_type="attn_q=q6_K")
    assert one.digest == qwen35.plan(ASSET, types="Q8_0", tensor_type=["attn_q=q6_K"]).digest
    with pytest.raises(InputError, match=r"^nowhere: no such folder"):
        qwen35.plan(dense, recipe="bf16", adapter="nowhere")
