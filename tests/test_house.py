"""Tests stand alone, and look at the package as its users do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen35

TESTS = Path(__file__).parent
SOURCE = Path(qwen35.__file__).parent
ALLOWED = {
    ("parsers.py", "_actions"): "argparse's own: it has no public list of the flags of a parser",
    ("test_notebooks.py", "_repr_html_"): "IPython's own: what a notebook shows",
    ("conftest.py", "_keys"): "of the whole process: those of other tests are forgotten",
    ("test_foreign_code.py", "_attn_implementation"): "transformers' own: what a model was given",
}
"""File and private name to the reason why a test needs it."""


def parsed(folder: Path) -> dict[str, ast.Module]:
    """Return every module of a folder, by its path in it."""
    paths = sorted(folder.rglob("*.py"))
    return {p.relative_to(folder).as_posix(): ast.parse(p.read_text("utf-8")) for p in paths}


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that one imports, also in programs that it holds as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^\s*(?:from|import) (\w+)", node.value, re.MULTILINE)


def imported_tests(tests: Path) -> list[str]:
    """Return which modules import a test module."""
    return [
        f"{name} imports {module}"
        for name, tree in parsed(tests).items()
        for module in imports(tree)
        if module.startswith("test_")
    ]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(source: Path) -> set[str]:
    """Return the private names that a package defines, of whatever kind."""
    names: set[str] = set()
    for tree in parsed(source).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if private(name)}


def used(tree: ast.Module, package: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name of the package that a test module uses.

    They are imported, taken as attributes of other objects than `self`, named in text as in
    ``package.module._name``, or named to `getattr`, `setattr` and the like.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield from ((node.lineno, a.name) for a in node.names if private(a.name))
        elif isinstance(node, ast.Attribute) and node.attr in own:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            named = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, n) for n in named if isinstance(n, str) and n in own)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = re.findall(rf"\b{package}(?:\.\w+)*?\.(_[A-Za-z]\w*)", node.value)
            lines = re.findall(rf"^\s*from {package}[\w.]* import (.*)$", node.value, re.MULTILINE)
            names = [*dotted, *re.findall(r"\w+", " ".join(lines))]
            yield from ((node.lineno, name) for name in names if private(name))


def used_private_names(tests: Path, source: Path) -> list[tuple[str, int, str]]:
    """Return file, line and name of each private name of a package that its tests use."""
    own = private_names(source)
    return [
        (name, line, what)
        for name, tree in parsed(tests).items()
        for line, what in used(tree, source.name, own)
    ]


def test_no_test_module_is_imported() -> None:
    """What tests share lies in modules that are no tests, such as `running.py`."""
    assert imported_tests(TESTS) == []


def test_no_private_name_is_used_without_a_reason() -> None:
    found = used_private_names(TESTS, SOURCE)
    assert [one for one in found if (one[0], one[2]) not in ALLOWED] == []
    assert ALLOWED.keys() == {(file, name) for file, _, name in found}


PLANTED = {
    "import": "from made.room import _hidden\n",
    "attribute": "import made.room\nmade.room._hidden()\n",
    "of an instance": "def check(thing):\n    assert thing._held == 1\n",
    "text": 'PLACE = "made.room._hidden"\n',
    "text with more": 'PLACE = f"made.{1}"\nOTHER = "see made.room.Thing._held"\n',
    "setattr": "def check(patch, thing):\n    patch.setattr(thing, '_held', 2)\n",
    "a program": 'PROGRAM = """\nfrom made.room import shown, _hidden\n"""\n',
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A made-up package with private names."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "room.py").write_text(
        "def _hidden(): ...\ndef shown(): ...\n"
        "class Thing:\n    def __init__(self):\n        self._held = 1\n"
    )
    (tmp_path / "tests").mkdir()
    return tmp_path / "made"


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_private_name_is_found(kind: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_it.py").write_text(PLANTED[kind])
    [(file, _, name)] = used_private_names(tmp_path / "tests", made)
    assert (file, name) in (("test_it.py", "_hidden"), ("test_it.py", "_held"))


def test_own_private_names_are_fine(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_it.py").write_text(
        "from made.room import shown\n_own = 1\n"
        "class Fake:\n    def __init__(self):\n        self._held = 1\n"
    )
    assert used_private_names(tmp_path / "tests", made) == []


@pytest.mark.parametrize(
    "text", ["from {} import x\n", "import {}\n", 'PROGRAM = """\nimport {}\n"""\n']
)
def test_a_planted_import_of_a_test_is_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "test_b.py").write_text(text.format("test_a"))
    assert imported_tests(tmp_path) == ["test_b.py imports test_a"]
