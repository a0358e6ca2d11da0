"""`--endpoint` against llama-server, llama-cpp-python's own server and vLLM, with the checkpoint.

`make test-all` builds the first two and names them in the environment, `make test-vllm` the third.
The embedded checkpoint knows the questions for every artifact and little else: what it cannot do is
found, and nothing else is.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qwen35
from checkpoints import ASSET
from qwen35.cli.main import main
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.verification.verdict import Verdict

pytestmark = pytest.mark.heavy

UNTAUGHT = {
    "a text beyond ASCII",
    "one call",
    "several calls",
    "nested arguments",
    "no call wanted",
    "a tool's result",
    "a system message",
    "a developer message",
    "an earlier turn",
    "a long input",
}
"""What the embedded checkpoint was never taught."""


@contextmanager
def running(*command: str | Path, seconds: float = 300, **environment: str) -> Iterator[str]:
    """Run a server on a free port of this machine, until it lists its models."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def program(name: str) -> Path:
    """Return the program that a variable of the environment names."""
    if not os.environ.get(name):
        pytest.skip(f"no {name}")
    return Path(os.environ[name])


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "out"
    asked = ["--types", "F16,Q4_K_M", "--mmproj", "--quiet"]
    assert main(["gguf", str(ASSET), str(out), *asked]) == 0
    return out


def strange(verdict: Verdict) -> list[str]:
    """Return the findings that the checkpoint is not to blame for."""
    return [str(one) for one in verdict.findings if one.subject not in UNTAUGHT]


def measured(ggufs: Path, url: str) -> EvaluationReport:
    base, text = ggufs / f"{ASSET.name}-F16.gguf", ASSET / "eval.txt"
    return qwen35.evaluate(base, endpoint=[url], text=text, chunks=2, threads=1)


@contextmanager
def llama_server(ggufs: Path, kind: str, *more: str) -> Iterator[str]:
    command = (program("QWEN35_LLAMA_SERVER"), "-m", ggufs / f"{ASSET.name}-{kind}.gguf")
    with running(*command, "--alias", kind, "-c", "4096", "-np", "2", "-t", "1", *more) as url:
        yield url


def test_llama_server_passes(ggufs: Path) -> None:
    projector = str(ggufs / f"mmproj-{ASSET.name}-F16.gguf")
    with llama_server(ggufs, "F16", "--mmproj", projector) as url:
        verdict = qwen35.verify(endpoint=url, source=ASSET, context=1000)
    assert strange(verdict) == []
    assert [answer.right for answer in verdict.answers] == [True] * 11
    assert verdict.served is not None
    model = verdict.served.model
    assert (model.name, model.context, model.sees) == ("F16", 2048, True)
    assert model.stored is not None
    assert model.stored.startswith("F16, 16.0")


@pytest.mark.parametrize(("kind", "least", "most"), [("F16", 0, 2e-5), ("Q4_K_M", 3e-3, 0.05)])
def test_llama_server_diverges_as_its_file_does(
    kind: str, least: float, most: float, ggufs: Path
) -> None:
    with llama_server(ggufs, kind) as url:
        report = measured(ggufs, url)
    assert least <= report.candidates[0].comparison.kld.value < most


def test_a_template_that_llama_server_was_given_is_found(ggufs: Path, tmp_path: Path) -> None:
    template = (ASSET / "chat_template.jinja").read_text("utf-8")
    (tmp_path / "other.jinja").write_text(template.replace("im_start|>user", "im_start|>human"))
    with llama_server(ggufs, "F16", "--chat-template-file", str(tmp_path / "other.jinja")) as url:
        verdict = qwen35.verify(endpoint=url, source=ASSET)
    assert "template" in {finding.check for finding in verdict.findings}


def test_llama_cpp_pythons_server_shows_no_picture_to_the_model(ggufs: Path) -> None:
    """It has no switch for thinking either, and takes any picture without a word."""
    python = program("QWEN35_LLAMA_CPP_PYTHON_SERVER")
    model = ggufs / f"{ASSET.name}-F16.gguf"
    command = (
        python,
        "-m",
        "llama_cpp.server",
        "--model",
        model,
        "--n_ctx",
        "2048",
        "--n_threads",
        "1",
    )
    with running(*command) as url:
        verdict = qwen35.verify(endpoint=url, source=ASSET)
    assert [answer.right for answer in verdict.answers] == [False] + [True] * 5
    assert all("'white', expected 'red'" in one for one in strange(verdict))
    assert any("no switch for thinking" in note for note in verdict.notes)


def test_vllm_passes(ggufs: Path) -> None:
    python = program("QWEN35_VLLM")
    command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", ASSET)
    more = ("--max-model-len", "2048", "--enforce-eager", "--reasoning-parser", "qwen3")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder")
    with running(*command, *more, *tools, seconds=600, VLLM_CPU_KVCACHE_SPACE="1") as url:
        verdict = qwen35.verify(endpoint=url, source=ASSET, context=1000)
        report = measured(ggufs, url)
    assert strange(verdict) == []
    assert all(answer.right for answer in verdict.answers)
    assert 0 < report.candidates[0].comparison.kld.value < 1e-3  # it computes in bfloat16
