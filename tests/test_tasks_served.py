"""`evaluate --tasks`: what counts as right, and the statistics of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from scipy.stats import binomtest

from checkpoints import ASSET
from evaluating import gguf
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
        ("number", "-5", "It is \u22125.", True),
        ("number", "0.5", "It is .5", True),
        ("number", "5", "No.5", True),
        ("number", "3", "10-3", True),
        ("number", "-3", "(10) -3", True),
        ("number", "3", "1,2,3", True),
        ("number", "9007199254740993", "9007199254740993", True),
        ("number", "9007199254740993", "9007199254740992", False),
        ("number", "4", "1e999999999", False),
        ("number", "4", "4" * 500, False),
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
        ('{"prompt": "x", "exact": [1]}', "exact with a list, expected a text"),
        ('{"prompt": "x", "pattern": "(?=a)"}', "pattern '.*, expected RE2"),
        ('{"prompt": "x", "choices": ["a"], "choice": "B"}', "choice 'B', expected a letter of 1"),
        ('{"prompt": " ", "exact": "x"}', "no prompt"),
        ('{"prompt": "x", "exact": " . "}', "exact ' . ', expected a text"),
        ('{"prompt": "x", "exact": null}', "exact null, expected a text"),
        ('{"prompt": "x", "number": true}', "number True, expected a number"),
        ('{"prompt": "x", "number": 1, "tolerance": "1"}', "tolerance '1', expected a number, 0"),
        ('{"prompt": "x", "number": 1, "tolerance": -1}', "tolerance -1, expected a number, 0"),
        ('{"prompt": "x", "exact": "x", "tolerance": 1}', "tolerance with exact"),
        ('{"prompt": "x", "exact": "x", "choices": ["a"]}', "choices with exact"),
        ('{"prompt": "x", "pattern": "a*"}', "pattern 'a\\*' is found in an empty answer"),
        ('{"prompt": "x", "choices": null, "choice": "A"}', "choices that are no list of differe"),
        ('{"prompt": "x", "choices": ["a", null], "choice": "A"}', "choices that are no list of"),
        ('{"prompt": "x", "choices": ["a", "a"], "choice": "A"}', "choices that are no list of"),
        ('{"prompt": "x", "choices": ["a"], "choice": ["A"]}', "choice with a list, expected a l"),
        (
            json.dumps({"prompt": "x", "choices": [*"abcdefghijklmnopqrstuvwxyz0"], "choice": "A"}),
            "27 choices, expected at most 26",
        ),
        ('{"prompt": "x", "exact": "x", "id": [1]}', "id with a list, expected a text or a whole"),
        ('{"prompt": "x", "exact": "x", "id": 2}\n{"prompt": "y", "exact": "y"}', "id '2' is that"),
    ],
)
def test_what_is_no_task_is_refused(line: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(line)
    with pytest.raises(InputError, match=found):
        read_tasks(tmp_path / "tasks.jsonl")


def test_letters_are_those_of_the_choices(tmp_path: Path) -> None:
    row = {"prompt": "x", "choices": ["a", "b"], "choice": "B", "id": 7}
    [task] = read_tasks(written(tmp_path, row))
    assert task.name == "7"
    assert task.is_right("B, as I said.")


@pytest.mark.parametrize(
    ("content", "finish", "why"),
    [
        ("<think>four", "stop", "the reasoning does not end"),
        ("Perhaps four", "length", "does not end within 4096 tokens"),
        ("<think>five</think>four", "stop", ""),
        ("five</think>four", "stop", ""),
    ],
)
def test_unfinished_reasoning_is_not_judged(
    content: str, finish: str, why: str, tmp_path: Path
) -> None:
    change = when(lambda _: True, content=content, finish=finish)
    with serving(FakeServer(change=change)) as fake:
        file = written(tmp_path, {"prompt": "2 + 2?", "pattern": "four"})
        [model] = evaluate_tasks(file, endpoint=fake.url).models
    assert model.right == (not why,)
    assert model.failed == ({"1": why} if why else {})


def test_artifacts_are_asked_in_this_process(
    formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint in transformers, a file of it in llama.cpp, and a server: they agree."""
    out = gguf(formats, "F16")
    rows = [TASKS[0], {"prompt": "What is the capital of France?", "exact": "Rome"}]
    file = str(written(tmp_path, *rows))
    with serving() as fake:
        asked = ["--tasks", file, str(ASSET), out, "--endpoint", fake.url, "--threads", "1"]
        assert main(["evaluate", *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [model["server"] for model in told["models"]] == ["transformers", "llama.cpp", "vLLM"]
    assert [model["right"] for model in told["models"]] == [[True, False]] * 3
    assert [pair["difference"] for pair in told["pairs"]] == [0, 0]


@pytest.mark.sentences
def test_what_cannot_be_asked_tasks_is_a_sentence(formats: Path, tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "word " * 20_000, "exact": "x"})
    with pytest.raises(InputError, match="a prompt of .* tokens, expected at most 4096"):
        evaluate_tasks(file, models=gguf(formats, "F16"), threads=1)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate_tasks(file, models=tmp_path / "nowhere")


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
    with pytest.raises(UsageError, match="--tasks: no model to ask; name an artifact"):
        evaluate_tasks(file, endpoint=[])
    for more, found in (
        (["--speed"], "--speed: is not for --tasks"),
        (["--dry-run"], "--dry-run: is not for --tasks"),
    ):
        assert main(["evaluate", *more, "--tasks", file, "--endpoint", "http://127.0.0.1:9"]) == 2
        assert found in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "BASE: missing" in capsys.readouterr().err
