"""CONTRIBUTING.md, followed to the letter on a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from checkpoints import ASSET
from limits import Ended, Limited, limited
from patience import PATIENCE
from qwen35.cli.main import main

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


@dataclass(frozen=True)
class Tree:
    """A copy of the package, and a process that runs its command."""

    folder: Path
    commands: Limited

    def qwen35(self, *arguments: Any) -> Ended:
        return self.commands.run([str(argument) for argument in arguments], self.folder)


_VERBS = ("plan", "convert", "gguf", "verify")
_MODULES = (*(f"qwen35.cli.{verb}_command" for verb in _VERBS), "qwen35.codecs.compiled")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """A copy of the package with everything applied that is shown."""
    tree = tmp_path_factory.mktemp("contributed")
    ignored = shutil.ignore_patterns("*.egg-info")
    for name in ("src", "docs", "tests"):  # with what is compiled already, and holds for copies
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ASSET, tree / "assets" / "qwen3.5-tiny")
    for kind in ("toml", "python"):
        for note, body in blocks(kind):
            if note.startswith("file: "):
                file = tree / note.removeprefix("file: ")
                file.parent.mkdir(exist_ok=True)
                file.write_text(body)
    for _, body in blocks("diff"):
        apply_diff(tree, body)
    with limited(*_MODULES, seconds=PATIENCE, PYTHONPATH=str(tree / "src")) as commands:
        yield Tree(tree, commands)


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


def changed(body: str) -> str:
    """Return the file that a diff changes."""
    (name,) = re.findall(r"^\+\+\+ b/(\S+)$", body, re.MULTILINE)
    return str(name)


def files(kind: str) -> list[str]:
    """Return the files that blocks of a kind are."""
    notes = [note for note, _ in blocks(kind)]
    return [note.removeprefix("file: ") for note in notes if note.startswith("file: ")]


def test_every_shown_change_is_of_a_file_that_is_there() -> None:
    assert len(blocks("toml")) == 2
    assert len(blocks("diff")) == 8
    for _, body in blocks("diff"):
        assert (ROOT / changed(body)).is_file()


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def test_a_codec_changes_three_files_that_are_there_already() -> None:
    told = section("Add a codec")
    changes = re.findall(r"^ *\+\+\+ b/(\S+)$", told, re.MULTILINE)
    assert changes == [REGISTRY, "docs/recipes.md", "docs/architecture.md"]
    made = re.findall(r"<!-- file: (\S+) -->", told)
    assert made
    for name in made:
        assert not (ROOT / name).exists()
        assert name.startswith("src/qwen35/codecs/int8/") or name.endswith("/int8.toml")


REGISTRY = "src/qwen35/codecs/registry.py"
LISTED = "        Nf4(),\n        Fp8(),\n        *MLX,\n        *GGML,\n    )\n}\n"
NEIGHBOURS = {
    "as it is": LISTED,
    "before": LISTED.replace("        Nf4(),\n", "        Mine(),\n        Nf4(),\n"),
    "in the very place": LISTED.replace("        *MLX", "        Mine(),\n        *MLX"),
    "after": LISTED.replace("    )\n", "        Mine(),\n    )\n"),
    "elsewhere": "        # one\n" * 30 + LISTED,
}


def registry_diff() -> str:
    (found,) = [body for _, body in blocks("diff") if changed(body) == REGISTRY]
    head, _, row = re.split(r"^(?=@@ )", found, flags=re.MULTILINE)
    return head + row


@pytest.mark.parametrize("change", NEIGHBOURS)
def test_a_line_of_a_contributor_beside_an_example_is_no_hindrance(
    change: str, tmp_path: Path
) -> None:
    file = tmp_path / REGISTRY
    file.parent.mkdir(parents=True)
    file.write_text(f"CODECS = {{\n    (\n{NEIGHBOURS[change]}")
    apply_diff(tmp_path, registry_diff())
    added = "        Int8(),\n"
    assert file.read_text().count(added) == 1
    assert file.read_text().replace(added, "") == f"CODECS = {{\n    (\n{NEIGHBOURS[change]}"


def test_an_example_whose_place_is_gone_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / REGISTRY
    file.parent.mkdir(parents=True)
    file.write_text("CODECS = {\n    one,\n    two,\n}\n")
    words = (
        r"the example in CONTRIBUTING\.md no longer applies to src/qwen35/codecs/registry\.py: "
        "bring its diff up to date"
    )
    with pytest.raises(pytest.fail.Exception, match=words):
        apply_diff(tmp_path, registry_diff())


def test_what_is_shown_passes_the_linter(tree: Tree) -> None:
    """Whoever follows the page runs it next."""
    diffs = {changed(body) for _, body in blocks("diff")}
    names = sorted(name for name in {*files("python"), *diffs} if name.endswith(".py"))
    for command in (("check",), ("format", "--check")):
        done = run(tree.folder, "ruff", *command, *names)
        assert done.returncode == 0, done.stdout


def test_what_is_shown_passes_the_guards(tree: Tree) -> None:
    """Names, the map of the code and the one core, which `make check` looks at."""
    guards = [f"tests/test_{name}.py" for name in ("architecture", "names", "one_core")]
    done = run(tree.folder, "pytest", "-q", "-p", "no:cacheprovider", *guards)
    assert done.returncode == 0, done.stdout


RECIPE = "src/qwen35/planning/recipes/text-nf4-mlp.toml"
MODELS = {"Qwen3.5-0.8B": 72, "Qwen3.5-35B-A3B": 160}
"""Model to the weights that the recipe packs: three in a dense layer, four in one of a mixture."""


@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_works_as_a_file(tree: Tree, model: str) -> None:
    done = tree.qwen35("plan", model, "--recipe", tree.folder / RECIPE)
    assert f"{MODELS[model]} weights in NF4" in done.printed, done.said


@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_works_by_name(tree: Tree, model: str) -> None:
    done = tree.qwen35("plan", model, "--recipe", "text-nf4-mlp")
    assert f"{MODELS[model]} weights in NF4" in done.printed, done.said
    assert "copy: linear attention stays as it is" in done.printed


def test_the_check_finds_its_fault_and_nothing_else(tree: Tree, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert tree.qwen35("convert", ASSET, good, "--recipe", "text", "--quiet").code == 0
    assert tree.qwen35("verify", good).code == 0
    shutil.copytree(good, bad)
    (bad / "qwen35.json").unlink()
    config = json.loads((bad / "generation_config.json").read_text())
    (bad / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 10**9}))
    done = tree.qwen35("verify", bad)
    assert done.code == 1
    found = [line for line in done.printed.splitlines() if line.startswith("error: ")]
    assert found == [
        "error: generation_config.json: eos_token_id 1000000000 is beyond the vocabulary "
        "[generation]"
    ]


def test_the_shown_test_of_the_check_passes_with_it_and_fails_without(
    tree: Tree, tmp_path: Path
) -> None:
    (name,) = [name for name in files("python") if name.startswith("tests/")]
    done = run(tree.folder, "pytest", "-q", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    without = Path(shutil.copytree(tree.folder, tmp_path / "without"))
    checks = without / "src" / "qwen35" / "verification" / "safetensors_subject.py"
    call = "        yield from self._generation_findings()\n"
    assert checks.read_text().count(call) == 1
    checks.write_text(checks.read_text().replace(call, ""))
    done = run(without, "pytest", "-q", name)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr


def test_the_family_member_is_planned(tree: Tree) -> None:
    done = tree.qwen35("plan", "Qwen3.9-4B", "--json")
    assert done.code == 0, done.said
    assert len(json.loads(done.printed)["steps"]) == 738


@pytest.fixture(scope="module")
def int8(tree: Tree) -> Path:
    """What the shown commands made of the embedded checkpoint, each of them without a fault."""
    (commands,) = [body for _, body in blocks("bash") if "--recipe int8" in body]
    for command in commands.splitlines():
        words = command.removeprefix("qwen35 ").split()
        done = tree.qwen35(*words)
        assert done.code == 0, command + "\n" + done.printed + done.said
    return tree.folder / "build" / "int8"


def test_what_holds_for_all_recipes_and_codecs_holds_with_more_of_them(tree: Tree) -> None:
    chosen = ("tests/test_recipe.py", "tests/test_one_core.py")
    done = run(tree.folder, "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_codec_is_converted_verified_and_evaluated(tree: Tree, int8: Path) -> None:
    manifest = json.loads((int8 / "qwen35.json").read_text())
    packed = [t for file in manifest["tensors"].values() for t in file.values() if t[:2] == "I8"]
    assert len(packed) > 10
    done = tree.qwen35("verify", int8, "--source", ASSET, "--json", "--depth", "numbers")
    found = json.loads(done.printed)
    assert (found["passed"], found["kind"]) == (True, "int8")
    assert found["counts"]["packed"] == len(packed)
    errors = {row["role"]: row for row in found["relative_error"] if row["storage"] == "int8"}
    assert all(0 < row["relative"] < 0.05 for row in errors.values()), errors
    assert sum(row["weights"] for row in errors.values()) == len(packed)
    text = ASSET / "eval.txt"
    done = tree.qwen35("evaluate", ASSET, int8, "--text", text, "--chunks", "1", "--json")
    (row,) = json.loads(done.printed)["candidates"]
    assert row["stored"] == "INT8"
    assert 0 < row["figures"]["kld"]["value"] < 0.01


def test_the_codec_judges_what_is_not_the_nearest(tree: Tree, int8: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(int8, tmp_path / "broken"))
    (broken / "qwen35.json").unlink()
    data = load_file(broken / "model.safetensors")
    name = next(name for name, values in data.items() if values.dtype == torch.int8)
    data[name] = data[name] ^ 64
    save_file(data, broken / "model.safetensors", {"format": "pt"})
    done = tree.qwen35("verify", broken, "--source", ASSET, "--depth", "numbers")
    assert done.code == 1
    assert f"error: {name}: " in done.printed
    assert "are not the nearest [codes]" in done.printed


def spoiled(int8: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy with other tensors; what its codec says nothing of itself is refused for it."""
    broken = Path(shutil.copytree(int8, folder))
    (broken / "qwen35.json").unlink()
    data = load_file(broken / "model.safetensors")
    change(data)
    save_file(data, broken / "model.safetensors", {"format": "pt"})
    return broken


SCALE = "model.language_model.layers.0.mlp.up_proj.weight.scale"


def test_a_nan_is_found_and_never_written(tree: Tree, int8: Path, tmp_path: Path) -> None:
    def change(data: dict[str, torch.Tensor]) -> None:
        data[SCALE][3] = torch.nan

    broken = spoiled(int8, tmp_path / "broken", change)
    for source in ([], ["--source", ASSET]):
        done = tree.qwen35("verify", broken, *source, "--depth", "numbers")
        assert done.code == 1
        assert "holds NaN or infinity" in done.printed
        assert "[decode]" in done.printed
    done = tree.qwen35("convert", broken, tmp_path / "out", "--recipe", "bf16")
    assert done.code == 2
    assert "holds NaN or infinity" in done.said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [lambda t: t[:7].clone(), lambda t: t.to(torch.int32)])
def test_a_companion_that_is_none_is_refused(
    tree: Tree, int8: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    broken = spoiled(
        int8, tmp_path / "broken", lambda data: data.update({SCALE: change(data[SCALE])})
    )
    done = tree.qwen35("verify", broken, "--source", ASSET, "--depth", "numbers")
    assert done.code == 1
    assert f"error: {SCALE}: " in done.printed
    assert tree.qwen35("convert", broken, tmp_path / "out", "--recipe", "bf16").code == 2


def test_a_list_that_names_what_is_packed_is_found(tree: Tree, int8: Path, tmp_path: Path) -> None:
    broken = spoiled(int8, tmp_path / "broken", lambda _: None)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ignore"][0] = SCALE.removesuffix(".weight.scale")
    (broken / "config.json").write_text(json.dumps(config))
    done = tree.qwen35("verify", broken)
    assert done.code == 1
    assert "in ignore, but packed [skip-list]" in done.printed
    assert "not packed, and missing from ignore [skip-list]" in done.printed


def test_the_json_of_a_codec_more_keeps_to_the_schemas(
    tree: Tree, int8: Path, tmp_path: Path
) -> None:
    for name, words in {
        "plan": ("plan", ASSET, "--recipe", "int8"),
        "convert": ("convert", ASSET, tmp_path / "out", "--recipe", "int8", "--quiet"),
        "verify": ("verify", int8),
    }.items():
        done = tree.qwen35(*words, "--json")
        schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text())
        Draft202012Validator(schema).validate(json.loads(done.printed))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_codec_is_written_alike_by_workers(
    tree: Tree, int8: Path, tmp_path: Path, workers: str
) -> None:
    out = tmp_path / "out"
    made = tree.qwen35("convert", ASSET, out, "--recipe", "int8", "--workers", workers, "--quiet")
    assert made.code == 0, made.said
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in int8.iterdir()
    }


def test_the_codec_is_a_source_of_all_else(tree: Tree, int8: Path, tmp_path: Path) -> None:
    values, gguf = tmp_path / "values", tmp_path / "gguf"
    for arguments in (
        ("convert", int8, values, "--recipe", "bf16"),
        ("verify", values, "--source", int8, "--depth", "numbers"),
        ("gguf", int8, gguf, "--types", "Q8_0"),
        ("verify", gguf, "--source", int8, "--depth", "numbers"),
    ):
        done = tree.qwen35(*arguments, "--quiet")
        assert done.code == 0, done.printed + done.said


def test_the_codec_is_tuned(tree: Tree, tmp_path: Path) -> None:
    asked = ["--format", "int8", "--size", "12bpw", "--probes", "0", "--context", "128"]
    text = ["--text", ASSET / "eval.txt", "--chunks", "1", "--output", tmp_path / "tuned.toml"]
    done = tree.qwen35("tune", ASSET, *asked, *text, "--quiet")
    assert done.code == 0, done.printed + done.said
    assert 'format = "int8"' in (tmp_path / "tuned.toml").read_text()


def test_the_document_is_planned_written_and_verified(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = tree.qwen35("plan", ASSET, "--recipe", "nf4", "--json")
    documents = json.loads(planned.printed)["documents"]
    made = tree.qwen35("convert", ASSET, out, "--recipe", "nf4", "--quiet")
    assert made.code == 0, made.said
    lines = (out / "modules.txt").read_text()
    assert documents["modules.txt"] == lines
    assert "model.language_model.layers.0.mlp.gate_proj nf4\n" in lines
    assert "modules.txt" in json.loads((out / "qwen35.json").read_text())["files"]
    assert tree.qwen35("verify", out, "--source", ASSET).code == 0
    (out / "modules.txt").write_text("")
    assert "modules.txt: 0 bytes, expected" in tree.qwen35("verify", out).printed


def test_the_transform_is_written_and_verified(tree: Tree, tmp_path: Path) -> None:
    twice, once = tmp_path / "twice", tmp_path / "once"
    made = tree.qwen35("gguf", ASSET, twice, "--types", "F16", "--quiet")
    assert made.code == 0, made.said
    checked = tree.qwen35("verify", twice, "--source", ASSET, "--depth", "numbers")
    assert checked.code == 0, checked.printed
    assert main(["gguf", str(ASSET), str(once), "--types", "F16", "--quiet"]) == 0
    name = "blk.0.ssm_norm.weight"
    read = [{t.name: t.data for t in gguf_tensors(out)}[name] for out in (twice, once)]
    assert np.array_equal(read[0], 2 * read[1])
    whole = ["--source", str(ASSET), "--depth", "numbers", "--quiet"]
    assert main(["verify", str(once), *whole]) == 0
    assert main(["verify", str(twice), *whole]) == 1


def gguf_tensors(folder: Path) -> list[Any]:
    (file,) = folder.glob("*.gguf")
    return list(GGUFReader(file).tensors)


def test_all_files_named_are_there() -> None:
    named = set(re.findall(r"`((?:src|tests|docs|benchmarks|verification)/[\w/.-]+)`", TEXT))
    for name in named - set(files("toml")) - set(files("python")):
        base = ROOT / "src" / "qwen35" if name.startswith("verification/") else ROOT
        assert (base / name).exists(), name


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (targets,) = re.findall(r"^\.PHONY: help (.+)$", makefile, re.MULTILINE)
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = [re.fullmatch(r"make (\S+)  +\S.*", line) for line in done.stdout.splitlines()]
    assert sorted(found[1] for found in told if found) == sorted(targets.split())
    assert all(told)
