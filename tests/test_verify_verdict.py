"""Verdicts: exit codes, the model that is asked, and what is shown and printed as JSON."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen35.checkpoint.open import fetch
from qwen35.cli.main import main
from qwen35.errors import Finding, UsageError
from qwen35.verification.behaviour import NOT_ASKED, Answer
from qwen35.verification.opening import open_artifact
from qwen35.verification.questions import Question
from qwen35.verification.role_errors import RoleError
from qwen35.verification.verdict import Verdict, verify
from qwen35.verification.verdict_display import verdict_text
from verifying import rewrite
from watching import Watching, watched_pools

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 0), (["--depth", "numbers"], 0), (["--json"], 0)],
)
def test_exit_code_zero_on_a_good_artifact(
    arguments: list[str], code: int, nf4_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(nf4_artifact), "--quiet", *arguments]) == code
    out = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(out)["passed"] is True
    else:
        result = "weights read but not compared; --source MODEL compares them"
        if not arguments:
            result = "headers only, weights not read; --depth numbers reads them"
        assert out.endswith(f"\n\npassed: {result}\n")


def test_exit_code_one_and_two(
    broken_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(broken_nf4, lambda t: t.pop(f"{QKV}.absmax"))
    assert main(["verify", str(broken_nf4), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings[0]["subject"] == QKV
    (broken_nf4 / "model.safetensors").write_bytes(b"short")
    assert main(["verify", str(broken_nf4)]) == 1
    assert "FAILED: 1 finding\n" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify", "Qwen3.5-0.8B"]) == 2


class Spoken:
    """What stands in for a model in an engine: it answers everything with one word."""

    missing: tuple[str, ...] = ()
    decoded = False
    settled = 0
    thinking = (False, True)
    notes: tuple[str, ...] = ()
    model = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def __init__(self, folder: Path, **more: object) -> None:
        self.folder, self.more = folder, more
        self.vision = bool(more.get("vision"))

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        return "no"


def test_a_model_is_asked_when_nothing_was_found(
    nf4_artifact: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qwen35.verification.asking_engines.Asker", Spoken)
    verdict = verify(
        open_artifact(str(nf4_artifact)), source=fetch(str(dense)), depth="behaviour", threads=1
    )
    assert (verdict.name, verdict.kind, verdict.depth) == (str(nf4_artifact), "nf4", "behaviour")
    assert verdict.counts == {"weights": 103, "packed": 31, "files": 1}
    assert {row.storage for row in verdict.errors} == {"plain", "nf4"}
    assert len(verdict.answers) == len(verdict.findings) == 10
    assert {finding.check for finding in verdict.findings} == {"behaviour"}
    assert verdict.notes == ("asked in transformers, on the cpu",)
    broken = Path(shutil.copytree(nf4_artifact, tmp_path / "broken"))
    (broken / "config.json").write_text((broken / "config.json").read_text() + " ")
    found = verify(open_artifact(str(broken)), depth="behaviour", threads=1)
    assert found.answers == ()
    assert [finding.check for finding in found.findings] != ["behaviour"]
    assert found.notes == (NOT_ASKED,)


def test_vllm_is_asked_when_asked_for(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Spoken] = []

    def asker(folder: Path, **more: object) -> Spoken:
        made.append(Spoken(folder, **more))
        return made[-1]

    monkeypatch.setattr("qwen35.verification.asking_engines.check_vllm", lambda: None)
    monkeypatch.setattr("qwen35.verification.asking_engines.VllmAsker", asker)
    opened = open_artifact(str(dense))
    verdict = verify(opened, depth="behaviour", engine="vllm", threads=1)
    assert verdict.notes == ("asked in vLLM",)
    assert (made[0].folder, made[0].more) == (dense, {"vision": True})
    assert any(answer.question.image for answer in verdict.answers)

    def refuse() -> None:
        raise UsageError("--engine vllm", "not here")

    monkeypatch.setattr("qwen35.verification.asking_engines.check_vllm", refuse)
    assert verify(opened).passed
    with pytest.raises(UsageError, match="not here"):
        verify(opened, engine="vllm")


def test_all_of_a_check_is_told(nf4_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, progress and the memo reach the numbers; what is told comes back."""
    asked = watched_pools(monkeypatch, "qwen35.verification.numbers_check")
    progress = Watching()
    opened = fetch(str(nf4_artifact))
    subject = open_artifact(str(nf4_artifact), "numbers")
    verdict = verify(subject, depth="numbers", threads=3, progress=progress)
    assert (verdict.passed, verdict.errors) == (True, ())
    assert asked == [3]
    assert sorted(progress.steps) == sorted((w.nbytes, w.name) for w in opened.weights)
    assert progress.title == f"checking {nf4_artifact}"
    assert progress.done == progress.total


def test_a_verdict_is_plain_in_json() -> None:
    question = Question("2 + 2?", "4")
    verdict = Verdict(
        "some/model",
        "nf4",
        "behaviour",
        {"weights": 9},
        (RoleError("mlp.up_proj", "nf4", 4, 0.04, 4.0, 0.25),),
        (Finding("files", "b", "missing"),),
        (Answer(question, "4"),),
        ("a note",),
    )
    assert verdict.to_json() == {
        "artifact": "some/model",
        "kind": "nf4",
        "depth": "behaviour",
        "source": None,
        "passed": False,
        "result": "FAILED: 1 finding",
        "counts": {"weights": 9},
        "relative_error": [
            {
                "role": "mlp.up_proj",
                "storage": "nf4",
                "weights": 4,
                "relative": pytest.approx(0.1),
                "worst": 0.25,
            }
        ],
        "answers": [Answer(question, "4").to_json()],
        "findings": [{"check": "files", "subject": "b", "message": "missing"}],
        "notes": ["a note"],
        "not_compared": [],
        "not_detected": [],
    }


ASKED = Question("What is 2 + 2? " * 5, "4", thinking=True)


def test_a_verdict_is_shown_whole() -> None:
    verdict = Verdict(
        "some/model",
        "nf4",
        "behaviour",
        {"weights": 9, "packed": 5, "files": 2},
        (
            RoleError("norm", "plain", 3, 0.0, 1.0, 0.0),
            RoleError("lm_head", "plain", 2, 0.0, 1.0, 0.0),
            RoleError("mlp.up_proj", "nf4", 4, 0.04, 4.0, 0.25),
        ),
        (Finding("codes", "a.weight", "3 wrong"), Finding("files", "b", "missing")),
        (
            Answer(replace(ASKED, thinking=False), "4", "x.gguf"),
            Answer(ASKED, "so\n</think>\n\n4", "x.gguf"),
            Answer(ASKED, "no", "y.gguf"),
        ),
        ("a note",),
    )
    question = "What is 2 + 2? What is 2 + 2? What is 2 + 2? What is 2 + 2? "
    assert (
        verdict_text(verdict)
        == f"""\
some/model: nf4, 9 weights (5 packed) in 2 files, checked: behaviour
5 weights are exactly those of the source

  role                                 stored  count   rel. error        worst
  mlp.up_proj                             nf4      4     0.100000     0.250000

  asked                                                        thinking  answer
x.gguf
  {question}      off  right
  {question}       on  right
y.gguf
  {question}       on  WRONG

error: a.weight: 3 wrong [codes]
error: b: missing [files]
note: a note

FAILED: 2 findings"""
    )
    one = replace(verdict, findings=verdict.findings[:1], answers=(), errors=())
    assert verdict_text(one).splitlines()[1:] == [
        "",
        "error: a.weight: 3 wrong [codes]",
        "note: a note",
        "",
        "FAILED: 1 finding",
    ]
    alone = replace(one, findings=(), notes=(), answers=(Answer(ASKED, "no"),) * 2)
    assert verdict_text(alone).splitlines()[3:] == [
        f"  {question}       on  WRONG",
        f"  {question}       on  WRONG",
        "",
        "passed: weights read but not compared, 2 answers right",
    ]
    none = replace(one, findings=(), notes=(), errors=verdict.errors[:1], depth="numbers")
    told = replace(none, source="x", not_compared=("y",), not_detected=("z",))
    assert verdict_text(told).splitlines()[1:] == [
        "3 weights are exactly those of the source",
        "not compared: y",
        "not detected: z",
        "",
        "passed: weights and settings compared with the source; not loaded, --depth behaviour does",
    ]
