"""Verbs that are killed before any of their writes: the same call ends the work, to the same end.

What `convert`, `gguf`, `finalize` and their workers leave is in `test_resume.py`, `test_slices.py`
and `test_workers.py`; a killed `verify` in `test_verify_memo.py`, `amend` in `test_amend.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from checkpoints import ASSET
from hub_client import CONTENT, REPO, World, environment, files_in
from qwen35.cli.main import main

PROGRAM = """
import os, signal, sys

at, log, *arguments = sys.argv[1:]
names = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
count = 0

def killed(event, values):
    global count
    if event == "open":
        if not isinstance(values[2], int) or not values[2] & (os.O_WRONLY | os.O_RDWR):
            return
    elif event not in names:
        return
    if values[0] == log or not str(values[0]).startswith(os.path.dirname(log)):
        return
    count += 1
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

from qwen35.cli.main import main

sys.addaudithook(killed)
code = main(arguments)
with open(log, "w") as file:
    file.write(str(count))
sys.exit(code)
"""


SIGNALLED = """
import os, signal, sys, time

from qwen35.cli.main import main
from qwen35.sinks.files import TensorFile

write = TensorFile.write

def signalled(*values):
    write(*values)
    if TensorFile.write is not write:
        TensorFile.write = write
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

TensorFile.write = signalled
sys.exit(main())
"""
"""The command, sent SIGTERM in the middle of its work, as from outside."""


def test_a_terminated_command_tidies_up_and_says_so(tmp_path: Path) -> None:
    artifact, temporary = str(tmp_path / "out"), tmp_path / "temporary"
    temporary.mkdir()
    assert main(["convert", str(ASSET), artifact, "--recipe", "text", "--quiet"]) == 0
    arguments = ["reproduce", artifact, "--source", str(ASSET)]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 143
    assert done.stderr.splitlines()[1:] == ["interrupted by SIGTERM"]
    assert not any(temporary.iterdir())


def run(arguments: list[str], log: Path, env: Mapping[str, str], at: int = 0) -> int:
    """Run a command, killed before its write number `at`; return its exit code."""
    command = [sys.executable, "-c", PROGRAM, str(at), str(log), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


def kills(log: Path, most: int) -> Iterator[int]:
    """Yield at most `most` numbers of writes, spread over those that a whole run made."""
    count = int(log.read_text())
    assert count > 1
    yield from sorted({1 + i * (count - 1) // (most - 1) for i in range(most)})


@pytest.mark.parametrize("mode", ["init", "pull"])
def test_a_killed_publish_ends_as_if_it_had_not_been(mode: str, world: World) -> None:
    env = environment(world.hub, world.tmp / "home")
    env["HF_TOKEN"] = world.hub.token or ""
    log = world.tmp / "log"
    new = {"config.json": b'{"model_type": "qwen3_5", "a": 1}', "deep/new.txt": b"new"}

    def command(number: int) -> tuple[list[str], Path]:
        folder = world.tmp / f"folder{number}"
        repo = f"{REPO}{number}"
        if mode == "pull":
            world.hub.repos[repo] = world.hub.repos[REPO]
        else:
            for name, content in CONTENT.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return ["publish", str(folder), repo, "--mode", mode], folder

    if mode == "pull":
        world.pushed()
        world.repo.put(new)
    whole = {**CONTENT, **new} if mode == "pull" else CONTENT
    for number in (-1, 0):  # caches are made by the first
        arguments, _ = command(number)
        assert run(arguments, log, env) == 0
    for number in kills(log, 4):
        arguments, folder = command(number)
        assert run(arguments, log, env, number) == -9
        assert run(arguments, log, env) == 0
        repo = world.hub.repos[arguments[2]]
        remote = {n: repo.read(n) for n in repo.files if n != ".gitattributes"}
        assert remote == whole
        assert files_in(folder) == whole


@pytest.mark.heavy
@pytest.mark.parametrize("probes", [0, 3])
def test_a_killed_tuning_ends_as_if_it_had_not_been(probes: int, tmp_path: Path) -> None:
    """The measurements are kept, and what was chosen is the same."""
    text = tmp_path / "text.txt"
    text.write_text((ASSET / "eval.txt").read_text()[:12_000])
    env = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"

    def command(number: int) -> list[str]:
        place = tmp_path / str(number)
        place.mkdir()
        budget = ["--format", "nf4", "--size", "9MB", "--text", str(text), "--chunks", "1"]
        outputs = ["--output", str(place / "r.toml"), "--report", str(place / "report")]
        return ["tune", str(ASSET), *budget, "--probes", str(probes), *outputs]

    assert run(command(0), log, env) == 0
    expected = chosen(tmp_path / "0")
    for number in kills(log, 6 if probes else 4):
        arguments = command(number)
        assert run(arguments, log, env, number) == -9
        if (tmp_path / str(number) / "r.toml").exists():  # an output like any other
            assert run(arguments, log, env) == 2
            arguments.append("--overwrite")
        assert run(arguments, log, env) == 0
        assert chosen(tmp_path / str(number)) == expected


@pytest.mark.parametrize("name", [".r.toml.part", ".r.json.part", "report/.tune.json.part"])
def test_a_link_where_tune_prepares_a_file_is_not_followed(name: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another's")
    (tmp_path / "report").mkdir()
    (tmp_path / name).symlink_to(other)
    budget = ["--format", "nf4", "--size", "9MB", "--text", str(ASSET / "eval.txt"), "--quiet"]
    outputs = ["--output", str(tmp_path / "r.toml"), "--report", str(tmp_path / "report")]
    assert main(["tune", str(ASSET), *budget, "--chunks", "1", "--context", "32", *outputs]) == 0
    assert other.read_text() == "another's"


def chosen(folder: Path) -> object:
    """Return what was tuned: every file but the page, in which times may be."""
    assert sorted(p.name for p in folder.iterdir()) == ["r.json", "r.toml", "report"]
    assert sorted(files_in(folder / "report")) == ["tune.html", "tune.json"]
    return [(folder / name).read_bytes() for name in ("r.json", "r.toml", "report/tune.json")]


@pytest.mark.heavy
def test_a_killed_evaluation_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ASSET / "eval.txt").read_text()[:12_000])
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"

    def command(number: int) -> list[str]:
        place = tmp_path / str(number)
        place.mkdir()
        report = ["--text", str(text), "--report", str(place / "report"), "--chunks", "2"]
        base = ["--kl-divergence-base", str(place / "base.kld")]
        return ["evaluate", str(ASSET), str(ASSET), *base, *report]

    expected = []
    arguments = command(0)
    for _ in range(2):  # the second time, the base's file is read, which holds 16 bits
        shutil.rmtree(tmp_path / "0" / "report", ignore_errors=True)
        assert run(arguments, log, env) == 0
        expected.append(figures(tmp_path / "0" / "report"))
    for number in kills(log, 6):
        arguments = command(number)
        assert run(arguments, log, env, number) == -9
        assert run(arguments, log, env) == 0
        assert figures(tmp_path / str(number) / "report") in expected


def figures(report: Path) -> object:
    """Return what a report measured, without times and places."""
    return json.loads((report / "report.json").read_text())["table"]
