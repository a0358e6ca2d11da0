"""docs/jobs.md: each of its commands, as it stands there, on the embedded checkpoint.

Sections run in folders of their own, in which everything that the page names is there. Those that
run the model take longest, and so are heavy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import qwen35
from checkpoints import ASSET
from fake_server import FakeServer, serving
from lora_models import write_adapter
from pages import ROOT, tokens_of
from qwen35.cli.main import main

HUB_MODELS = ("Qwen/Qwen3.5-9B",)
CHEAPER = {
    "evaluate": ("--chunks", "1", "--context", "128"),
    "tune": ("--chunks", "1", "--context", "128", "--sample", "64", "--types", "q4_K,q8_0"),
    "calibrate": ("--context", "128"),
    "run": ("--chunks", "1", "--depth", "numbers", "--dry-run"),
}
"""What is added to the commands of a verb."""

CHANGED = {
    "--size 4.8GB": "--size 6MB",
    "--size 4.5bpw": "--size 6.5bpw",
    "--workers 4 --device cuda": "--workers 2 --dry-run",
    "--ray-address auto": "--ray-address auto --dry-run",
    "--slice 3/64": "--slice 1/1",
    "/shared/": "shared/",
}
"""What the checkpoint is too small for, or this machine; the other tests of it are elsewhere."""

ELSEWHERE = {"vllm serve OUT-fp8": "vllm", "qwen35 ui": "test_ui.py"}
"""Commands that run until they are stopped, and which tests run them."""


@dataclass(frozen=True)
class Job:
    """A section, and its commands."""

    title: str
    commands: tuple[str, ...]


def jobs() -> Iterator[Job]:
    """Yield the sections of the page that have commands."""
    page = (ROOT / "docs" / "jobs.md").read_text("utf-8")
    for section in page.split("\n## ... ")[1:]:
        fences = (token for token in tokens_of(section) if token.type == "fence")
        lines = "\n".join(token.content.replace("\\\n", " ") for token in fences).splitlines()
        commands = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
        if any(commands):
            yield Job(section.splitlines()[0], tuple(filter(None, commands)))


JOBS = list(jobs())
RUNS_THE_MODEL = re.compile(r"qwen35 (calibrate|evaluate|tune) ")
PARAMETERS = [
    pytest.param(
        job,
        id=job.title.replace(" ", "-"),
        marks=[pytest.mark.heavy] * any(map(RUNS_THE_MODEL.match, job.commands)),
    )
    for job in JOBS
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the page takes as given, by the names that it has there; only to be read."""
    folder = tmp_path_factory.mktemp("shelf")
    convert = partial(qwen35.convert, ASSET, threads=1)
    made = folder / "gguf"
    qwen35.gguf(ASSET, made, types=["Q4_K_M", "Q8_0"], threads=1)
    for name, kind in {"theirs-Q4_K_M": "Q4_K_M", "model-Q8_0": "Q8_0"}.items():
        (file,) = made.glob(f"*-{kind}.gguf")
        (folder / f"{name}.gguf").symlink_to(file)
    qwen35.gguf(ASSET, folder / "OUT-gguf", types=["Q8_0"], threads=1)
    convert(folder / "OUT-nf4", recipe="nf4")
    convert(folder / "OUT-fp8", recipe="fp8")
    convert(folder / "my-tune", recipe="bf16", mtp="drop")
    write_adapter(ASSET, folder / "my-adapter")
    (folder / "MODEL").symlink_to(ASSET)
    text = (ASSET / "eval.txt").read_text("utf-8")
    for number, name in enumerate(("text", "chats", "other")):
        (folder / f"{name}.txt").write_text(text[number * 10_000 :][:10_000], "utf-8")
    return folder


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which one does a job: what a command of it makes is not there yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "MODEL").symlink_to(ASSET)
    return tmp_path


def adapted(command: str) -> list[str]:
    """Return the words of a command, with this checkpoint for models of the Hub."""
    for name in HUB_MODELS:
        command = command.replace(name, "MODEL")
    for shown, here in CHANGED.items():
        command = command.replace(shown, here)
    words = shlex.split(command)[1:]
    more = CHEAPER.get(words[0], ()) if "--endpoint" not in words else ()
    return [*words, *more]


def clear_outputs(job: Job, desk: Path) -> None:
    """Take away what the job itself makes, where other jobs take it as given."""
    for command in job.commands:
        for word in shlex.split(command)[1:]:
            if word.startswith("OUT") and command.split()[1] in ("convert", "gguf"):
                (desk / word).unlink(missing_ok=True)


@pytest.mark.parametrize("job", PARAMETERS)
def test_a_job_is_done(job: Job, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clear_outputs(job, desk)
    with serving(FakeServer()) as fake:
        for command in job.commands:
            if command in ELSEWHERE:
                continue
            words = [word.replace("http://127.0.0.1:8000", fake.url) for word in adapted(command)]
            code = main(words)
            assert code == 0, (command, capsys.readouterr())


def test_each_job_is_run_or_says_where() -> None:
    every = [command for job in JOBS for command in job.commands]
    assert {command for command in every if not command.startswith("qwen35 ")} < set(ELSEWHERE)
    assert set(ELSEWHERE) < set(every)
    assert all(any(shown in command for command in every) for shown in (*CHANGED, *HUB_MODELS))
    assert all((Path(__file__).parent / test).exists() for test in ELSEWHERE.values())
