"""One core: nothing outside a codec's folder or its container asks which format something is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen35
from qwen35.codecs.registry import CODECS
from qwen35.planning.containers import CONTAINERS

SOURCE = Path(qwen35.__file__).parent
FOLDERS = [path.name for path in (SOURCE / "codecs").iterdir() if path.is_dir()]
OWN = (
    *(f"codecs/{name}/" for name in FOLDERS),
    "codecs/registry.py",
    "planning/safetensors_files/",
    "planning/gguf_files/",
)
"""The registry and the codecs, and the containers, each of which knows its own name."""

NAMES = {*CODECS, *CONTAINERS, *(codec.label for codec in CODECS.values())}
KINDS = ("Plan", "Container", "Codec", "Options", "GgufFile", "PlannedFile")


def modules() -> list[str]:
    found = (path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
    return sorted(name for name in found if not name.startswith(OWN))


def constants(node: ast.expr) -> Iterator[object]:
    """Yield the constants that something is compared with."""
    if isinstance(node, ast.Constant):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from constants(element)


def branches(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of what asks for a format by its name, or for the kind of a plan."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = {value for side in sides for value in constants(side)}
        elif isinstance(node, ast.MatchValue):
            named = set(constants(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            kinds = {getattr(part, "id", "") for part in ast.walk(node.args[1])}
            named = {"isinstance"} if any(kind.endswith(KINDS) for kind in kinds if kind) else set()
            if named:
                yield node.lineno, ast.unparse(node)
            continue
        else:
            continue
        if named & NAMES:
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("module", modules())
def test_nobody_else_asks_which_format_it_is(module: str) -> None:
    assert list(branches((SOURCE / module).read_text("utf-8"))) == []


def test_the_look_finds_what_it_is_for() -> None:
    found = [
        'if step.packing == "nf4": pass',
        'if kind in ("a", "gguf"): pass',
        'if "fp8" != storage: pass',
        "if isinstance(plan, GgufPlan): pass",
        "if isinstance(plan, Plan | str): pass",
        'match kind:\n    case "q4_K": pass',
    ]
    for source in found:
        assert len(list(branches(source))) == 1, source
    for source in ("if step.packing == name: pass", 'x = {"nf4": 1}', "isinstance(x, str)"):
        assert not list(branches(source)), source
