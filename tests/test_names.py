"""Names tell things apart: classes, modules, and modules from public functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen35

SOURCE = Path(qwen35.__file__).parent
PARTS = frozenset({"arrays", "codec", "config", "judge", "kernels", "layout", "stored"})
"""Modules that every codec may have, in its folder; `codecs/codec.py` is the protocol of them."""

TRICKS = ("__class__", "__dict__", "modules")
"""Attributes by which a package could put something else in place of a module of it."""


def problems(source: Path) -> list[str]:
    """Return what is wrong with the names in a package."""
    trees = {p.relative_to(source): ast.parse(p.read_text("utf-8")) for p in source.rglob("*.py")}
    return [
        *_shared_classes(trees),
        *_shared_modules(trees),
        *_like_functions(trees),
        *_tricks(trees),
    ]


def _shared_classes(trees: dict[Path, ast.Module]) -> Iterator[str]:
    found = defaultdict(list)
    for path, tree in sorted(trees.items()):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(f"{path}:{node.lineno}")
    for name, places in found.items():
        if len(places) > 1:
            yield f"classes {name}: {', '.join(places)}"


def _shared_modules(trees: dict[Path, ast.Module]) -> Iterator[str]:
    found = defaultdict(list)
    for path in sorted(trees):
        if path.stem == "__init__" or (path.stem in PARTS and path.parts[0] == "codecs"):
            continue
        found[path.stem].append(str(path))
    for name, places in found.items():
        if len(places) > 1 or name in PARTS:
            yield f"modules {name}: {', '.join(places)}"


def _like_functions(trees: dict[Path, ast.Module]) -> Iterator[str]:
    functions = _functions(trees[Path("__init__.py")])
    for path in sorted(trees):
        for name in {*path.parts[:-1], path.stem} & functions:
            yield f"{path}: {name} is a public function"


def _functions(tree: ast.Module) -> set[str]:
    """Return the functions that a package gives, by its `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return {name for name in names if name.islower() and name.isalpha()}
    return set()


def _tricks(trees: dict[Path, ast.Module]) -> Iterator[str]:
    for path, tree in sorted(trees.items()):
        if path.name != "__init__.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in TRICKS:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_names_tell_things_apart() -> None:
    assert problems(SOURCE) == []


SOUND = {
    "__init__.py": '__all__ = ["Error", "__version__", "plan"]\n',
    "errors.py": "class Error(Exception): ...\n",
    "codecs/__init__.py": "",
    "codecs/codec.py": "class Codec: ...\n",
    "codecs/int8/__init__.py": "",
    "codecs/int8/codec.py": "class Int8: ...\n",
    "planning/__init__.py": "",
    "planning/output_plan.py": "class Plan:\n    class Part: ...\n",
}
"""A made-up package, with nothing wrong."""

PLANTED = {
    "a class twice": ("errors.py", "class Plan: ...\n", "classes Plan: errors.py:1, "),
    "a private class twice": ("errors.py", "class _A: ...\nclass _A: ...\n", "classes _A: "),
    "a class in another": ("errors.py", "class Part: ...\n", "classes Part: "),
    "a module twice": ("codecs/errors.py", "", "modules errors: codecs/errors.py, errors.py"),
    "a part of no codec": ("planning/layout.py", "", "modules layout: planning/layout.py"),
    "a module like a function": ("planning/plan.py", "", "planning/plan.py: plan is a public"),
    "a folder like a function": ("plan/__init__.py", "", "plan/__init__.py: plan is a public"),
    "a trick": ("codecs/__init__.py", "import x\nx.__dict__['y'] = 1\n", "codecs/__init__.py:2: x"),
    "another": ("codecs/__init__.py", "import sys\nsys.modules['a'] = sys\n", "sys.modules"),
}


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_sound_names_pass(tmp_path: Path) -> None:
    assert problems(write_package(tmp_path, SOUND)) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    name, text, words = PLANTED[fault]
    [problem] = problems(write_package(tmp_path, {**SOUND, name: text}))
    assert words in problem


def test_public_functions_stay_what_they_are() -> None:
    """`import qwen35.planning` and the like put no module in place of a function."""
    script = (
        "import importlib, inspect, sys, qwen35\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "names = [name for name in qwen35.__all__ if name.islower() and name.isalpha()]\n"
        "print(*[name for name in names if not inspect.isfunction(getattr(qwen35, name))])\n"
    )
    rooms = [f"qwen35.{path.parent.name}" for path in sorted(SOURCE.glob("*/__init__.py"))]
    assert "qwen35.planning" in rooms
    done = subprocess.run(
        [sys.executable, "-c", script, *rooms], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"
