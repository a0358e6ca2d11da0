"""The architecture page: one line for each package, in the order of the import contract."""

from __future__ import annotations

import re
import tomllib
from itertools import chain

import qwen35
from pages import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
SOURCE = ROOT / "src" / "qwen35"
ROWS = re.findall(r"^\| `([\w/]+)` \| \S.* \|$", PAGE, re.MULTILINE)
ROW_COUNT = len(re.findall(r"^\| `", PAGE, re.MULTILINE))


def layers() -> list[list[str]]:
    """Return the layers of the import contract, top down."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    (contract,) = tools["importlinter"]["contracts"]
    return [layer.split(" | ") for layer in contract["layers"]]


def exists(name: str) -> bool:
    return (SOURCE / name / "__init__.py").is_file() or (SOURCE / f"{name}.py").is_file()


def test_each_package_of_the_contract_has_a_line_in_its_order() -> None:
    assert [name for name in ROWS if "/" not in name] == list(chain(*layers()))


def test_each_package_inside_another_has_a_line_below_it() -> None:
    inner = {path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.glob("*/*/__init__.py")}
    assert {name for name in ROWS if "/" in name} == inner
    parents = [name.partition("/")[0] for name in ROWS]
    assert [name for i, name in enumerate(parents) if name not in parents[:i]] == list(
        chain(*layers())
    )


def test_each_line_names_one_thing_that_exists() -> None:
    assert len(ROWS) == len(set(ROWS)) == ROW_COUNT
    assert [name for name in ROWS if not exists(name)] == []


def test_the_diagram_shows_the_contract() -> None:
    drawn = PAGE.partition("```text\n")[2].partition("```")[0]
    boxes = (line.rpartition("│")[0] for line in drawn.splitlines() if line.startswith("│"))
    shown = [[cell.strip() for cell in box.strip("│").split("│")] for box in boxes]
    assert shown == layers()


def test_modules_and_classes_named_on_the_page_exist() -> None:
    modules = set(re.findall(r"`(\w+/[\w/]+\.py)`", PAGE))
    assert len(modules) >= 10
    places = SOURCE, ROOT
    assert [m for m in modules if not any((place / m).is_file() for place in places)] == []
    text = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    defined = set(re.findall(r"^class (\w+)", text, re.MULTILINE))
    named = {
        "Encoding",
        "FolderReader",
        "Plan",
        "RangeReader",
        "Rows",
        "TensorFile",
        "TensorWriter",
    }
    assert all(name in PAGE for name in named)
    assert named <= defined


def test_the_package_is_the_one_described() -> None:
    assert SOURCE.samefile(next(iter(qwen35.__path__)))
