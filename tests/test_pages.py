"""Every block of the README, the tutorials and the explanations runs, and prints what they show."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pages import ROOT, PageError, blocks_of, check_page, fill, run_page

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    *sorted((ROOT / "docs" / "explanation").glob("*.md")),
]
PRINTS = "```bash\necho one; echo two\n```\nSome words.\n```text\none\n...\n```\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    text = page.read_text("utf-8")
    ran = check_page(text, tmp_path)
    assert ran == len(re.findall(r"^```(?:bash|python)$", text, re.MULTILINE))


def test_no_two_pages_write_one_folder() -> None:
    """Whoever follows one page after another would be told that it exists already."""
    writers: dict[str, list[str]] = {}
    for page in PAGES:
        blocks = "".join(block.content for block in blocks_of(page.read_text("utf-8")))
        for name in sorted(set(re.findall(r"\bbuild/([\w.-]+)", blocks))):
            if "." not in name:  # texts and recipes are written anew
                writers.setdefault(name, []).append(page.name)
    assert len(writers) > 20
    assert {name: pages for name, pages in writers.items() if len(pages) > 1} == {}


@pytest.mark.parametrize(
    "name",
    [
        "nf4-qlora",
        "adapter",
        "fp8-vllm",
        "gguf-llama-cpp",
        "calibrate",
        "refined",
        "tune",
        "publish",
    ],
)
def test_every_path_has_a_tutorial_that_runs(name: str) -> None:
    blocks = blocks_of((ROOT / "docs" / "tutorials" / f"{name}.md").read_text("utf-8"))
    assert sum(not block.external for block in blocks) >= 3
    assert any(block.shown for block in blocks if not block.external)


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def test_what_tutorials_import_is_what_setup_installs() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    recipe = re.search(r"^\$\(VENV\)/\.setup:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe
    extras = re.findall(r"'\.\[([a-z0-9,]+)\]'", recipe[1])
    assert len(extras) == 1
    assert "llama-cpp" not in extras[0]  # `make setup` compiles nothing
    extras = [f"{extras[0]},llama-cpp"]  # by `make llama-cpp`, where a page says so
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    rows = list(project["dependencies"])
    for extra in extras[0].split(","):
        rows += project["optional-dependencies"][extra]
    installed = {name_of(row) for row in rows} | {"qwen35"}
    owners = packages_distributions()
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        for block in blocks_of(page.read_text("utf-8")):
            for name in imported(block.content) if block.language == "python" else ():
                owning = {name_of(owner) for owner in owners.get(name, [name])}
                assert owning & installed, f"{page.name} imports {name}: not in `make setup`"


SHORTENED = "In what they print, `...` stands for lines left out here"
IN_LLAMA = re.compile(r"^from llama_cpp |^noise floor: .* in llama\.cpp", re.MULTILINE)


TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_say_what_is_shortened_and_what_they_need(page: Path) -> None:
    text = page.read_text("utf-8")
    words = " ".join(text.split())
    shown = [block.shown or "" for block in blocks_of(text)]
    assert SHORTENED in words or not any("..." in one for one in shown)
    assert "`make llama-cpp`" in words or not IN_LLAMA.search(text)


def imported(program: str) -> set[str]:
    """Return the modules that a program imports and that are not Python's, by their first name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


# --- the rules themselves


def test_what_is_shown_is_compared(tmp_path: Path) -> None:
    assert check_page(PRINTS, tmp_path) == 1


def test_another_output_fails(tmp_path: Path) -> None:
    with pytest.raises(PageError, match="and the page shows"):
        check_page(PRINTS.replace("text\none", "text\nthree"), tmp_path)


@pytest.mark.parametrize(
    "command", ["false", "exit 0", "nosuchcommand", "python -c 'raise ValueError'"]
)
def test_a_block_that_fails_or_is_not_reached_fails(command: str, tmp_path: Path) -> None:
    page = f"```bash\n{command}\n```\n{PRINTS}"
    with pytest.raises(PageError, match="failed or not reached"):
        run_page(blocks_of(page), tmp_path)


def test_blocks_share_a_shell_and_tagged_ones_are_left_out(tmp_path: Path) -> None:
    page = "```bash\na=1\n```\n```bash external\nfalse\n```\n```bash\necho $a\n```\n"
    page += "```python\nprint(2)\n```\n"
    blocks = blocks_of(page)
    assert [block.external for block in blocks] == [False, True, False, False]
    assert run_page(blocks, tmp_path) == ["", "1\n", "2\n"]


@pytest.mark.parametrize(
    "fence",
    [
        "```sh\ntrue\n```",
        "```bash extern\ntrue\n```",
        "```\ntrue\n```",
        "    true",
        "```text\na\n```",
    ],
)
def test_a_fence_cannot_hide(fence: str) -> None:
    with pytest.raises(PageError):
        blocks_of(f"words\n\n{fence}\n")


def test_pages_are_filled_with_what_is_printed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\necho a; echo $PWD/x\n```\n```text\nb\n```\n" + PRINTS)
    (tmp_path / "first").mkdir()
    fill(page, tmp_path / "first")
    assert page.read_text().startswith("```bash\necho a; echo $PWD/x\n```\n```text\na\n.../x\n")
    assert page.read_text().endswith(PRINTS)
