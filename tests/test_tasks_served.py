"""`evaluate --tasks`: what counts as right, and the statistics of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from scipy.stats import binomtest

from fake_server import FakeServer, asks, serving, when
from pages import ROOT
from qwen35.api.evaluate_api import evaluate_tasks
from qwen35.cli.main import main
from qwen35.errors import EndpointError, InputError, UsageError
from qwen35.evaluation.task_accuracy import Accuracy, PairedAccuracy
from qwen35.evaluation.task_file import ServedTask, read_tasks

TASKS: list[dict[str, Any]] = [
    {"prompt": "What is the capital of France?", "pattern": "(?i)paris"},
    {"prompt": "What is 2 + 2? Answer in one word.", "exact": "four"},
    {"prompt": "What is my number?", "number": 41.05, "tolerance": 0.1, "id": "mine"},
    {"prompt": "What is my number, by letter?", "choices": ["3", "41"], "choice": "B"},
]


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_two_servers_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(tmp_path, *TASKS))
    right = FakeServer(change=when(asks("letter"), content="I think B."))
    wrong = FakeServer(change=when(asks("2 + 2"), content="Five", reasoning="four"))
    with serving(right), serving(wrong):
        asked = ["--tasks", file, "--endpoint", right.url, "--endpoint", wrong.url]
        assert main(["evaluate", *asked, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert main(["evaluate", *asked]) == 0
    schema = json.loads((ROOT / "docs" / "schemas" / "evaluate.json").read_text("utf-8"))
    jsonschema.validate(told, schema)
    assert [model["right"] for model in told["models"]] == [[True] * 4, [True, False, True, False]]
    [pair] = told["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["probability"]) == (2, 0, 0.5)
    assert told["names"] == ["1", "2", "mine", "4"]
    shown = capsys.readouterr().out
    assert "4 of 4" in shown
    assert "-50.0% (-99.0% to -1.0%), 0 tasks gained, 2 lost, p = 0.5" in shown


def test_a_task_without_an_answer_is_wrong(tmp_path: Path) -> None:
    file = written(tmp_path, *TASKS[:2])
    fails = FakeServer(change=when(asks("2 + 2"), status=500, raw=b"no"))
    with serving(fails):
        report = evaluate_tasks(file, endpoint=[fails.url])
        assert report.models[0].right == (True, False)
        assert report.models[0].failed == {"2": "HTTP 500 (no)"}
        assert "note: tiny at 127.0.0.1" in report.text()
        with pytest.raises(EndpointError, match="answers no task"):
            evaluate_tasks(written(tmp_path, TASKS[1]), endpoint=[fails.url])


@pytest.mark.parametrize(
    ("check", "expect", "answer", "right"),
    [
        ("exact", "Paris", " paris.\n", True),
        ("exact", "Paris", "In Paris", False),
        ("number", "1234.5", "First 7, so 1,234.5 in all.", True),
        ("number", "4", "none", False),
        ("number", "0.001", "it is 1e-3", True),
        ("pattern", "^a+$", "aaaa", True),
        ("pattern", "(a+)+b", "a" * 10_000, False),
        ("choice", "B", "**B**", True),
        ("choice", "B", "A or B? The answer is A", False),
        ("choice", "B", "Bern", False),
    ],
)
def test_answers_are_judged(check: str, expect: str, answer: str, right: bool) -> None:
    assert ServedTask("1", "?", check, expect).is_right(answer) is right


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", "tasks.jsonl: 0 tasks, expected 1 to 100000, a JSON object a line"),
        ("{", "tasks.jsonl, line 1: not JSON"),
        ("[]", "tasks.jsonl, line 1: no prompt"),
        ('{"prompt": 7, "exact": "x"}', "no prompt"),
        ('{"prompt": "x"}', "0 checks, expected one of exact, number, pattern, choice"),
        ('{"prompt": "x", "exact": "x", "number": 1}', "2 checks"),
        ('{"prompt": "x", "code": "x"}', "unknown key 'code'"),
        ('{"prompt": "x", "number": "4"}', "number '4', expected a number"),
        ('{"prompt": "x", "exact": [1]}', r"exact '\[1\]', expected a text"),
        ('{"prompt": "x", "pattern": "(?=a)"}', "pattern '.*, expected RE2"),
        ('{"prompt": "x", "choices": ["a"], "choice": "B"}', "choice 'B', expected a letter of 1"),
    ],
)
def test_what_is_no_task_is_refused(line: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(line)
    with pytest.raises(InputError, match=found):
        read_tasks(tmp_path / "tasks.jsonl")


def test_intervals_are_those_of_scipy() -> None:
    for right, count in ((0, 5), (5, 5), (37, 50), (1, 1000)):
        model = Accuracy("a", None, (True,) * right + (False,) * (count - right), {})
        theirs = binomtest(right, count).proportion_ci(method="wilson")
        assert model.interval == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    for lost, gained in ((0, 0), (3, 1), (10, 30), (700, 800)):
        pair = PairedAccuracy("a", "b", lost, gained, 2000)
        theirs = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert pair.probability == pytest.approx(theirs)


def test_tasks_need_a_server_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(written(tmp_path, *TASKS))
    with pytest.raises(UsageError, match="--tasks: needs --endpoint"):
        evaluate_tasks(file, endpoint=[])
    for more, found in (
        (["x"], "BASE: is not for --tasks; leave it out"),
        (["--speed"], "--speed: is not for --tasks"),
        (["--dry-run"], "--dry-run: is not for --tasks"),
    ):
        assert main(["evaluate", *more, "--tasks", file, "--endpoint", "http://127.0.0.1:9"]) == 2
        assert found in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "BASE: missing" in capsys.readouterr().err
