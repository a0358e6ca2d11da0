"""Results as notebooks show them, and arguments as people write them there."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import qwen35
from checkpoints import ASSET
from evaluating import gguf as gguf_in
from made_reports import ROWS, report_of
from qwen35.api.plan_api import types_that_fit
from qwen35.errors import Finding, InputError, UsageError
from qwen35.reporting.ranking import rank
from qwen35.reporting.reported import parse_report
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
    wrong: Any
    for wrong in ("lots", 4e9, True, ["4GB"]):
        with pytest.raises(
            UsageError, match="--memory: .*, expected bytes, or a size such as '4GB'"
        ):
            qwen35.convert(dense, out, recipe="nf4", memory=wrong, dry_run=True)
        with pytest.raises(UsageError, match="--memory"):
            qwen35.run(dense, out, path="A", memory=wrong)


def test_one_name_is_a_list_of_one(dense: Path, tmp_path: Path) -> None:
    listed = qwen35.plan(dense, recipe="nf4", keep=["self_attn"])
    assert qwen35.plan(dense, recipe="nf4", keep="self_attn").digest == listed.digest
    one = qwen35.plan(ASSET, types="Q8_0", tensor_type="attn_q=q6_K")
    assert one.digest == qwen35.plan(ASSET, types="Q8_0", tensor_type=["attn_q=q6_K"]).digest
    with pytest.raises(InputError, match=r"^nowhere: no such folder"):
        qwen35.plan(dense, recipe="bf16", adapter="nowhere")
