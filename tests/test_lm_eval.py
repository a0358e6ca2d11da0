"""Tasks of lm-eval: a tiny task of our own, asked of a fake server through lm-eval itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from fake_server import KEY, FakeServer, asks, serving, when
from pages import ROOT
from qwen35.cli.main import main
from qwen35.errors import extra_hint

Capture = pytest.CaptureFixture[str]

TASK = """
task: tiny_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 64, temperature: 0.0}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ROWS = [
    {"question": "What is the capital of France?", "answer": "It is Paris."},
    {"question": "What is 2 + 2? Answer in one word.", "answer": "Four"},
    {"question": "What is my number?", "answer": "42"},
]


def written(folder: Path, kind: str = "generate_until", metric: str = "exact_match") -> Path:
    tasks = folder / "tasks"
    tasks.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    text = TASK.format(data=data, kind=kind, metric=metric)
    choices = 'doc_to_choice: ["It is Paris.", "Four", "42"]\n' * (kind == "multiple_choice")
    (tasks / "tiny.yaml").write_text(text + choices)
    return tasks


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("QWEN35_API_KEY", KEY)


@pytest.mark.heavy
@pytest.mark.usefixtures("_offline")
def test_two_servers_on_a_task(tmp_path: Path, capsys: Capture) -> None:
    first = when(asks("capital"), content="It is Paris.")
    second = when(asks("2 + 2"), content="Five</think>Four")
    one = FakeServer(change=lambda asked, turn: second(asked, first(asked, turn)), key=KEY)
    other = FakeServer(key=KEY)
    asked = ["--lm-eval", "tiny_questions", "--include-path", str(written(tmp_path))]
    with serving(one), serving(other):
        servers = ["--endpoint", one.url, "--endpoint", other.url]
        assert main(["evaluate", *asked, *servers, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
    schema = json.loads((ROOT / "docs" / "schemas" / "evaluate.json").read_text("utf-8"))
    jsonschema.validate(told, schema)
    figures = [model["figures"][0] for model in told["models"]]
    assert {(one["task"], one["metric"]) for one in figures} == {
        ("tiny_questions", "exact_match,none")
    }
    assert figures[0]["value"] == pytest.approx(2 / 3)
    bodies = [body for path, body in one.heard if path.endswith("/chat/completions")]
    assert len(bodies) == 3
    assert bodies[0]["messages"][-1] == {"role": "user", "content": ROWS[0]["question"]}
    assert bodies[0]["stop"] == ["\n\n"]


@pytest.mark.heavy
@pytest.mark.usefixtures("_offline")
def test_tasks_that_cannot_be_run(tmp_path: Path, capsys: Capture) -> None:
    tasks = str(written(tmp_path, "multiple_choice", "acc"))
    with serving(FakeServer(key=KEY)) as fake:
        asked = ["evaluate", "--endpoint", fake.url, "--include-path", tasks, "--lm-eval"]
        assert main([*asked, "tiny_questions"]) == 2
        assert "tiny_questions compares log probabilities" in capsys.readouterr().err
        assert main([*asked, "no_such_task"]) == 2
        assert "--lm-eval: lm-eval cannot run no_such_task (" in capsys.readouterr().err


def test_what_is_missing_is_a_sentence(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    asked = ["evaluate", "--lm-eval", "x"]
    server = ["--endpoint", "http://127.0.0.1:1"]
    for more, found in (
        (server, f"--lm-eval: lm_eval is not installed; {extra_hint('lm-eval')}"),
        ([], "--lm-eval: no model to ask; name the server"),
        ([*server, "--speed"], "--speed: is not for --lm-eval; leave it out"),
        ([*server, "--include-path", "/nowhere"], "--include-path: /nowhere: no such folder"),
    ):
        assert main([*asked, *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {found}")
    assert main(["evaluate", "x", "--include-path", "y"]) == 2
    assert "--include-path: is for --lm-eval" in capsys.readouterr().err
