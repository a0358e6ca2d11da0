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
    (tree / "tests").mkdir()
    for kind in ("toml", "python"):
        for note, body in blocks(kind):
            if note.startswith("file: "):
                (tree / note.removeprefix("file: ")).write_text(body)
    for _, body in blocks("diff"):
        apply_diff(tree, body)
    return tree


def apply_diff(tree: Path, body: str) -> None:
    """Apply a shown diff, hunk by hunk, where at least the lines on one side of it are left.

    What is there already, because somebody followed the page in earnest, is left as it is.
    """
    head, *hunks = re.split(r"^(?=@@ )", body, flags=re.MULTILINE)
    (name,) = re.findall(r"^\+\+\+ b/(\S+)$", head, re.MULTILINE)
    for hunk in hunks:
        title, *lines = hunk.splitlines(keepends=True)
        if "".join(line[1:] for line in lines if line[0] == "+") in (tree / name).read_text():
            continue
        changed = [i for i, line in enumerate(lines) if line[:1] in "+-"]
        first, last = changed[0], changed[-1] + 1
        tried = (lines, lines[first:], lines[:last])  # all, what follows, what comes before
        if not any(git_applies(tree, head + title + "".join(part)) for part in tried):
            pytest.fail(
                f"the example in CONTRIBUTING.md no longer applies to {name}: bring its diff up to "
                f"date\n\n{hunk}",
                pytrace=False,
            )


def git_applies(tree: Path, patch: str) -> bool:
    """Apply a patch of one hunk, if git finds where."""
    done = subprocess.run(
        ["git", "apply", "--recount", "--unidiff-zero", "-C1", "-"],
        cwd=tree,
        env={**os.environ, "GIT_DIR": "/dev/null"},
        input=patch,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0


def run(tree: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(tree / "src"), str(ROOT / "tests")))
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def qwen35(tree: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(tree, "qwen35.cli.main", *arguments)


def test_every_shown_change_is_of_a_file_that_is_there() -> None:
    assert len(blocks("toml")) == 1
    assert len(blocks("diff")) == 3
    for _, body in blocks("diff"):
        (name,) = re.findall(r"^\+\+\+ b/(\S+)$", body, re.MULTILINE)
        assert (ROOT / name).is_file()


LISTED = '    "text",\n    "text-nf4",\n    "fp8",\n    "fp8-conservative",\n'
NEIGHBOURS = {
    "as it is": LISTED,
    "before": '    "text",\n    "mine",\n    "text-nf4",\n    "fp8",\n    "fp8-conservative",\n',
    "in the very place": LISTED.replace('    "fp8",\n', '    "mine",\n    "fp8",\n'),
    "after": LISTED.replace('    "fp8-', '    "mine",\n    "fp8-'),
    "elsewhere": "    # one\n" * 30 + LISTED,
}


@pytest.mark.parametrize("change", NEIGHBOURS)
def test_a_line_of_a_contributor_beside_an_example_is_no_hindrance(
    change: str, tmp_path: Path
) -> None:
    file = tmp_path / "src" / "qwen35" / "plan" / "recipe.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"BUILT_IN = (\n{NEIGHBOURS[change]})\n")
    apply_diff(tmp_path, blocks("diff")[0][1])
    added = '    "text-nf4-mlp",\n'
    assert file.read_text().count(added) == 1
    assert file.read_text().replace(added, "") == f"BUILT_IN = (\n{NEIGHBOURS[change]})\n"


def test_an_example_whose_place_is_gone_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "src" / "qwen35" / "plan" / "recipe.py"
    file.parent.mkdir(parents=True)
    file.write_text('BUILT_IN = (\n    "one",\n    "two",\n)\n')
    words = (
        r"the example in CONTRIBUTING\.md no longer applies to src/qwen35/plan/recipe\.py: "
        "bring its diff up to date"
    )
    with pytest.raises(pytest.fail.Exception, match=words):
        apply_diff(tmp_path, blocks("diff")[0][1])


MODELS = {"Qwen3.5-0.8B": 72, "Qwen3.5-35B-A3B": 160}
"""Model to the weights that the recipe packs: three in a dense layer, four in one of a mixture."""


@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_works_as_a_file(tree: Path, model: str) -> None:
    ((note, _),) = blocks("toml")
    recipe = tree / note.removeprefix("file: ")
    done = qwen35(tree, "plan", model, "--recipe", recipe)
    assert f"{MODELS[model]} weights in NF4" in done.stdout, done.stderr


@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_works_by_name(tree: Path, model: str) -> None:
    done = qwen35(tree, "plan", model, "--recipe", "text-nf4-mlp")
    assert f"{MODELS[model]} weights in NF4" in done.stdout, done.stderr
    assert "copy: linear attention stays as it is" in done.stdout


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


def test_the_shown_test_of_the_check_passes_with_it_and_fails_without(
    tree: Path, tmp_path: Path
) -> None:
    ((note, _),) = [block for block in blocks("python") if block[0].startswith("file: ")]
    name = note.removeprefix("file: ")
    done = run(tree, "pytest", "-q", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    without = Path(shutil.copytree(tree, tmp_path / "without"))
    structure = without / "src" / "qwen35" / "verify" / "structure.py"
    call = "    findings += _generation_findings(place, checkpoint)\n"
    assert structure.read_text().count(call) == 1
    structure.write_text(structure.read_text().replace(call, ""))
    done = run(without, "pytest", "-q", name)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr


def test_the_family_member_is_planned(tree: Path) -> None:
    done = qwen35(tree, "plan", "Qwen3.9-4B", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["steps"]) == 738


def test_the_codec_says_what_it_writes() -> None:
    ((_, body),) = [block for block in blocks("python") if block[0] == "run"]
    exec(compile(body, "CONTRIBUTING.md", "exec"), {})


def test_all_files_named_are_there_and_all_that_know_a_codec_are_named() -> None:
    named = set(re.findall(r"`((?:src|tests|docs|benchmarks|verify)/[\w/.-]+)`", TEXT))
    shown = [note for kind in ("toml", "python") for note, _ in blocks(kind)]
    made = {note.removeprefix("file: ") for note in shown if note.startswith("file: ")}
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


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (targets,) = re.findall(r"^\.PHONY: help (.+)$", makefile, re.MULTILINE)
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = [re.fullmatch(r"make (\S+)  +\S.*", line) for line in done.stdout.splitlines()]
    assert sorted(found[1] for found in told if found) == sorted(targets.split())
    assert all(told)
