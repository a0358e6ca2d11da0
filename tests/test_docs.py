"""Pages that are true: generated ones fresh, links alive, commands known, figures planned."""

from __future__ import annotations

import ast
import doctest
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it.token import Token

from pages import ROOT, tokens_of
from parsers import actions_of, shown_actions_of
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

sys.path.insert(0, str(ROOT / "docs"))
from generating import markdown
from generating.commands import old_commands, parsers

DOCS = ROOT / "docs"
TINY = ROOT / "assets" / "qwen3.5-tiny"
SKIPPED = ("build", "dist", "demo/out")
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
    and not str(page.relative_to(ROOT)).startswith(SKIPPED)
)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + "make docs-pages mends it"


def checks_of(module: Path) -> Iterator[str]:
    """Yield what the findings made in a module are called."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            makers = ("Finding", "ServerCheck", "_finding", "found")
            made = ast.unparse(node.func).rpartition(".")[2] in makers
            name = node.args[0]
            if made and isinstance(name, ast.Constant):
                yield str(name.value)
            if ast.unparse(node.func) == "result.differ" and isinstance(name, ast.Constant):
                yield str(name.value)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_CHECK":
            assert isinstance(node.value, ast.Constant)
            yield str(node.value.value)


def test_every_check_is_in_the_table() -> None:
    package = ROOT / "src" / "qwen35"
    rooms = ("verification", "codecs", "execution")
    modules = [module for room in rooms for module in (package / room).rglob("*.py")]
    pages = [(DOCS / page).read_text("utf-8") for page in ("verify.md", "endpoint.md")]
    tables = [re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) for page in pages]
    assert [len(told) for told in tables] == [len(set(told)) for told in tables]
    assert {*tables[0], *tables[1]} == {check for module in modules for check in checks_of(module)}


def test_every_command_has_a_section_with_every_option() -> None:
    commands = (DOCS / "reference" / "commands.md").read_text("utf-8")
    old = (DOCS / "reference" / "old-commands.md").read_text("utf-8")
    for page, found in ((commands, parsers()), (old, old_commands())):
        for name, parser in found.items():
            section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
            for action in shown_actions_of(parser)[1:]:
                spelled = ", ".join(action.option_strings) or action.metavar or action.dest
                assert str(spelled) in section, (name, spelled)


def test_examples_in_the_generator_are_true() -> None:
    assert doctest.testmod(markdown) == (0, 2)


# --- links


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    found: list[str] = []
    tokens = tokens_of(page.read_text("utf-8"))
    for before, token in pairwise(tokens):
        if before.type == "heading_open":
            text = "".join(child.content for child in token.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            again = sum(name == slug or name.startswith(f"{slug}-") for name in found)
            found.append(slug if slug not in found else f"{slug}-{again}")
    return frozenset(found)


def links(page: Path) -> Iterator[str]:
    for token in tokens_of(page.read_text("utf-8")):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                yield unquote(str(target))


def dead(page: Path, target: str) -> str:
    """Return what is wrong with a link, or nothing."""
    parts = urlsplit(target)
    if parts.scheme:
        host = parts.hostname or ""
        fine = parts.scheme == "https" and "." in host and not re.search(r"\s", target)
        return "" if fine else "not the form of an address"
    path = (page.parent / parts.path).resolve() if parts.path else page
    if not path.is_relative_to(ROOT.resolve()) or not path.exists():
        return "no such file"
    if parts.fragment and (path.suffix != ".md" or parts.fragment not in anchors(path)):
        return "no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = {target: dead(page, target) for target in links(page) if dead(page, target)}
    assert wrong == {}


@pytest.mark.parametrize(
    "target", ["nowhere.md", "../../etc/hosts", "#nothing", "http://example.org", "https://nodot/"]
)
def test_a_dead_link_is_found(target: str) -> None:
    assert dead(ROOT / "README.md", target)


@pytest.mark.parametrize("page", [p for p in PAGES if DOCS in p.parents], ids=named)
def test_pages_stay_within_the_documentation(page: Path) -> None:
    for target in links(page):
        if not urlsplit(target).scheme and (path := urlsplit(target).path):
            assert (page.parent / path).resolve().is_relative_to(DOCS), target


@pytest.mark.parametrize(
    ("link", "code"), [("#words", 0), ("#nothing", 1), ("nowhere.md", 1), ("index.md#nothing", 1)]
)
def test_the_generator_refuses_dead_links(link: str, code: int, tmp_path: Path) -> None:
    shutil.copy(DOCS / "conf.py", tmp_path)
    (tmp_path / "index.md").write_text(f"# Title\n\n## Words\n\n[a link]({link})\n")
    strict = ["--fail-on-warning", "--quiet", "--nitpicky"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *strict, str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr


# --- commands


def commands(tokens: list[Token]) -> Iterator[list[str]]:
    """Yield the words of every command of ours in code, spans and fences alike."""
    for token in tokens:
        if token.type in ("fence", "code_block"):
            whole = token.content.replace("\\\n", " ")
            lines = [line.partition(" #")[0] for line in whole.splitlines()]
        else:
            spans = [c.content for c in token.children or () if c.type == "code_inline"]
            lines = [" ".join(span.split()) for span in spans]
        for line in lines:
            for part in re.split(r"&&|\|\||[|;]|\$\(", line):
                words = part.strip().removeprefix("$ ").split()
                if words and re.fullmatch(r"qwen35(-[a-z0-9-]+)?", words[0]):
                    yield words


@cache
def options() -> dict[str, frozenset[str]]:
    known = {**parsers(), **old_commands()}
    return {
        name: frozenset(flag for action in actions_of(parser) for flag in action.option_strings)
        for name, parser in known.items()
    }


def unknown(words: list[str]) -> str:
    """Return what a command has that our parsers do not, or nothing."""
    own = words[1:2] if words[0] == "qwen35" else []
    if words[0] == "qwen35" and (not own or not re.fullmatch(r"[a-z]+", own[0])):
        return ""  # the name alone, or a placeholder
    name = " ".join([words[0], *own])
    if name not in options():
        return f"no command {name}"
    flags = {re.split(r"[=\]]", word)[0].strip("[]`'\"") for word in words if "--" in word[:3]}
    return ", ".join(sorted(flag for flag in flags if flag not in options()[name]))


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent != DOCS / "adr"], ids=named)
def test_commands_in_pages_exist(page: Path) -> None:
    every = list(commands(tokens_of(page.read_text("utf-8"))))
    wrong = {" ".join(words): unknown(words) for words in every if unknown(words)}
    assert wrong == {}


@pytest.mark.parametrize(
    "text", ["`qwen35 converts A B`", "```bash\nqwen35 convert A B \\\n  --recipes nf4\n```"]
)
def test_a_command_that_does_not_exist_is_found(text: str) -> None:
    (words,) = commands(tokens_of(text))
    assert unknown(words)


def test_migration_names_every_option_of_the_old_commands() -> None:
    text = (DOCS / "migration.md").read_text("utf-8")
    sections = {part.splitlines()[0]: part for part in re.split(r"^##+ ", text, flags=re.M)[1:]}
    for name, parser in old_commands().items():
        for action in actions_of(parser):
            spelled = [flag for flag in action.option_strings if flag not in ("-h", "--help")]
            if spelled and spelled[0] not in ("--json", "--quiet"):
                assert any(f"`{flag}" in sections[name] for flag in spelled), (name, spelled)


def test_what_migration_maps_to_exists() -> None:
    text = (DOCS / "migration.md").read_text("utf-8")
    ours = frozenset().union(*(options()[name] for name in parsers()))
    rows = re.findall(r"^\| .+ \| (.+) \|$", text, re.MULTILINE)
    told = {flag for cell in rows for flag in re.findall(r"`(--[a-z-]+)", cell)}
    assert len(told) >= 30
    assert told <= ours


# --- figures


def results() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((DOCS / "results.json").read_text("utf-8"))
    return parsed


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "text"
    write(make_plan(open_folder(TINY), load_recipe("text")), folder, threads=1)
    return folder


@pytest.mark.parametrize("row", [results()["base"], *results()["rows"]], ids=lambda r: r["name"])
def test_sizes_in_the_results_are_those_planned_today(row: dict[str, Any], text_only: Path) -> None:
    assert row["bytes"] == sum(row["files"].values())
    if row.get("verb") == "gguf":
        kind = row["name"].removeprefix("GGUF ").partition(",")[0]
        recipe = load_recipe(row["recipe"], "gguf")
        plan = make_plan(open_folder(TINY), recipe, types=(kind,))
        planned = {file.name: file.nbytes for file in plan.files}
    else:
        source = text_only if row.get("source") == "text" else TINY
        plan = make_plan(open_folder(source), load_recipe(row["recipe"]))
        planned = {file.name: file.nbytes for file in plan.files}
    assert row["files"] == planned


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_pictures_of_the_readme_are_there_and_small() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r'src(?:set)?="([^"]+)"', readme)
    assert named == [f"docs/pictures/report-{theme}.png" for theme in ("dark", "light")]
    for name in named:
        content = (ROOT / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) < 100_000


def told() -> Iterator[tuple[str, str]]:
    """Yield every file of documentation and code, by name."""
    for path in (*PAGES, *sorted((ROOT / "src").rglob("*.py")), *(ROOT / "src").rglob("*.jinja")):
        yield named(path), path.read_text("utf-8")


def test_nothing_is_installed_from_an_index_before_there_is_a_release() -> None:
    index = re.compile(r"pip install (-\S+ )*'?\"?qwen35\b(?! @)")
    assert [name for name, text in told() if index.search(text)] == []


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    known = set(project["optional-dependencies"]) | {"NAME"}
    wanted = re.compile(r"pip install '\.\[([^\]]+)\]'|extra_hint\([\"']([^\"']+)")
    for name, text in told():
        for several, one in wanted.findall(text):
            assert {one} - {""} | {*several.split(",")} - {"", "{extra}"} <= known, name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_not_wider_than_a_page(page: Path) -> None:
    fences = (t for t in tokens_of(page.read_text("utf-8")) if t.type == "fence")
    lines = (line for f in fences if f.info.startswith("bash") for line in f.content.splitlines())
    assert [line for line in lines if len(line) > 110] == []
