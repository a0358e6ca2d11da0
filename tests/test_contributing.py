"""CONTRIBUTING.md, followed to the letter on a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from checkpoints import ASSET

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<kind>\w+)\n(?P<body>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return the note before each block of a kind, and its text."""
    found = (match for match in BLOCK.finditer(TEXT) if match["kind"] == kind)
    return [(match["note"] or "", textwrap.dedent(match["body"])) for match in found]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with everything applied that is shown."""
    tree = tmp_path_factory.mktemp("contributed")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    for note, body in blocks("toml"):
        (tree / note.removeprefix("file: ")).write_text(body)
    for _, body in blocks("diff"):
        patch = tree / "shown.diff"
        patch.write_text(body)
        command = ["git", "apply", "--recount", "--unidiff-zero", "-C2", str(patch)]
        subprocess.run(command, cwd=tree, check=True, env={**os.environ, "GIT_DIR": "/dev/null"})
    return tree


def qwen35(tree: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen35.cli.main", *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_shown_change_is_of_a_file_that_is_there() -> None:
    assert len(blocks("toml")) == 1
    assert len(blocks("diff")) == 3
    for _, body in blocks("diff"):
        (name,) = re.findall(r"^\+\+\+ b/(\S+)$", body, re.MULTILINE)
        assert (ROOT / name).is_file()


def test_the_recipe_works_as_a_file(tree: Path) -> None:
    ((note, _),) = blocks("toml")
    recipe = tree / note.removeprefix("file: ")
    done = qwen35(tree, "plan", "Qwen3.5-0.8B", "--recipe", recipe)
    assert "72 weights in NF4" in done.stdout, done.stderr


def test_the_recipe_works_by_name(tree: Path) -> None:
    done = qwen35(tree, "plan", "Qwen3.5-0.8B", "--recipe", "text-nf4-mlp")
    assert "72 weights in NF4" in done.stdout, done.stderr
    assert "two thirds of a dense model, and the least sensitive" in done.stdout


def test_the_check_finds_its_fault_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert qwen35(tree, "convert", ASSET, good, "--recipe", "text", "--quiet").returncode == 0
    assert qwen35(tree, "verify", good).returncode == 0
    shutil.copytree(good, bad)
    (bad / "qwen35.json").unlink()
    config = json.loads((bad / "generation_config.json").read_text())
    (bad / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 10**9}))
    done = qwen35(tree, "verify", bad)
    assert done.returncode == 1
    found = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert found == [
        "error: generation_config.json: eos_token_id 1000000000 is beyond the vocabulary "
        "[generation]"
    ]


def test_the_family_member_is_planned(tree: Path) -> None:
    done = qwen35(tree, "plan", "Qwen3.9-4B", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["steps"]) == 738


def test_the_codec_says_what_it_writes() -> None:
    ((_, body),) = [block for block in blocks("python") if block[0] == "run"]
    exec(compile(body, "CONTRIBUTING.md", "exec"), {})


def test_all_files_named_are_there_and_all_that_know_a_codec_are_named() -> None:
    named = set(re.findall(r"`((?:src|tests|docs|benchmarks|verify)/[\w/.-]+)`", TEXT))
    made = {note.removeprefix("file: ") for note, _ in blocks("toml")}
    for name in named - made:
        base = ROOT / "src" / "qwen35" if name.startswith("verify/") else ROOT
        assert (base / name).exists(), name
    layers = ("checkpoint", "codecs", "model", "plan", "convert.py", "strips.py", "verify")
    known = re.compile(r"""[=!]= "(?:nf4|fp8)"|Literal\[[^\]]*"fp8\"""")
    folders = tuple(name for name in named if name.endswith("/"))
    for path in sorted((ROOT / "src" / "qwen35").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if path.relative_to(ROOT / "src" / "qwen35").parts[0] not in layers:
            continue
        own = path.name.startswith(("fp8", "nf4")) or path.name == "summary.py"
        if known.search(path.read_text()) and not own:
            assert name in named or name.startswith(folders), f"{name} is not in CONTRIBUTING.md"
