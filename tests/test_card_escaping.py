"""What files and manifests say reaches a model card as text, never as markup or a command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qwen35.display import printable
from qwen35.errors import InputError
from qwen35.publishing.markdown import as_code, as_text
from qwen35.publishing.repo_documents import documents

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")

EVIL = (
    'x" onload=alert(1)><script>alert(2)</script>\n---\nlicense: evil\n# pwned `code` | cell '
    "[a](javascript:alert(3)) ![b](http://c.d/e) <img src=x onerror=alert(4)>\n```bash\ncurl e|sh"
    "\n```"
)

PIECES = ["<", ">", "[a](javascript:b)", "![", "](", "|", "`", "\\", "\n", "<b>", "&lt;", "#", "*"]
PIECES += ["- ", "1. ", "~~~", "---", "$", "=", "http://a.b", "www.a.b", "a@b.c", "mailto:", "    "]
TEXT = st.lists(st.sampled_from([*PIECES, "word", " "]), max_size=12).map("".join)


def kinds(text: str) -> set[str]:
    """Return the kinds of Markdown elements in `text`."""
    tokens = MARKDOWN.parse(text)
    inner = (child for token in tokens for child in token.children or ())
    return {token.type for token in (*tokens, *inner)}


PARAGRAPH = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline"}
PARAGRAPH |= {"em_open", "em_close", "strong_open", "strong_close"}


@given(TEXT)
def test_text_in_a_paragraph_makes_no_element(text: str) -> None:
    assert kinds(f"Note: {as_text(text)}.") <= PARAGRAPH
    assert kinds(as_text(text)) <= PARAGRAPH
    assert kinds(f"- {as_text(text)}") <= {*PARAGRAPH, *kinds("- a")}


@given(TEXT, TEXT)
def test_text_in_a_table_stays_in_its_cell(text: str, name: str) -> None:
    table = f"| a | b |\n|---|---|\n| {as_code(name)} | {as_text(text)} |\n| 1 | 2 |"
    tokens = MARKDOWN.parse(table)
    assert sum(token.type == "td_open" for token in tokens) == 4
    assert not kinds(table) & {"html_inline", "link_open", "image"}


@given(TEXT, TEXT)
def test_nothing_that_renderers_read_differently(text: str, name: str) -> None:
    """GitHub's and the Hub's renderers differ in what is before a bar, and make links of words."""
    assert not set("|`") & set(re.sub("`[^`]*`", "", as_text(text) + as_code(name)))
    assert "|" not in as_text(text) + as_code(name)
    for token in MARKDOWN.parse(f"Note: {as_text(text)}.")[1].children or ():
        if token.type == "text":
            assert not re.search(r"://|www\.|mailto:|[^@ ]@[^@ ]", token.content)


@given(TEXT.filter(lambda text: "`" not in text))
def test_code_shows_what_it_was_given(text: str) -> None:
    shown = MARKDOWN.parse(f"Note: {as_code(text)}.")[1].children or []
    assert "".join(token.content for token in shown) == f"Note: {printable(text)}."


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = EVIL

    return edit


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "recipe's name": _set("recipe", "name"),
    "reason": _set("recipe", "rules", -1, 2),
    "notes": lambda m: m.__setitem__("notes", [EVIL, f"`{EVIL}"]),
    "file": lambda m: m["files"].__setitem__(EVIL, {"size": 1, "sha256": "0" * 64}),
    "version": _set("tool", "qwen35"),
    "repository": lambda m: m.__setitem__("source", {"repo": EVIL, "revision": "a" * 40}),
    "revision": lambda m: m.__setitem__("source", {"repo": "a/b", "revision": EVIL}),
    "amendment": lambda m: m.__setitem__(
        "amended", [{"files": ["chat_template.jinja"], "time": EVIL, "why": EVIL}]
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_hostile_manifest(
    edit: Callable[[dict[str, Any]], None], nf4_artifact: Path, tmp_path: Path
) -> None:
    card = _card(nf4_artifact, tmp_path / "copy", edit, {})
    if card is not None:
        _assert_harmless(card)


@pytest.mark.parametrize("where", ["columns", "rows", "text", "candidates", "tokens"])
def test_hostile_report(where: str, nf4_artifact: Path, tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "table": {"columns": ["a", "b"], "rows": [[1, 2]]},
        "base": {"name": "c", "stored": "BF16", "engine": "d"},
        "tokens": {"chunks": 1, "context": 2},
        "text": {"name": "e"},
        "candidates": [{"name": "f"}],
    }
    if where in report["table"]:
        report["table"][where] = [EVIL, EVIL] if where == "columns" else [[EVIL, EVIL]]
    elif where == "tokens":
        report["tokens"]["chunks"], report["base"]["name"] = "`", EVIL
    else:
        report[where] = {"name": EVIL} if where == "text" else [{"name": EVIL}, {"name": "f"}]
    card = _card(nf4_artifact, tmp_path / "copy", lambda _: None, {"report.json": report})
    assert card is not None
    _assert_harmless(card)


def _card(
    artifact: Path, copy: Path, edit: Callable[[dict[str, Any]], None], files: dict[str, Any]
) -> str | None:
    """Return the card of an edited artifact; None if its manifest is refused."""
    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / "qwen35.json").read_text())
    edit(manifest)
    (copy / "qwen35.json").write_text(json.dumps(manifest))
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content))
    try:
        return documents(copy, "me/model")["README.md"].decode()
    except InputError as error:
        if error.subject != "qwen35.json":
            raise
        return None


FOLDS = ("<details>", "</details>", r"<summary>All (\d+ files|that was measured)</summary>")
"""The elements that a card has of its own."""


def _assert_harmless(card: str) -> None:
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "evil" not in front
    for tag in FOLDS:
        body = re.sub(f"^{tag}$", "", body, flags=re.MULTILINE)
    assert not kinds(body) & {"html_block", "html_inline", "image"}
    tokens = [child for token in MARKDOWN.parse(body) for child in token.children or ()]
    links = [str(token.attrs["href"]) for token in tokens if token.type == "link_open"]
    assert all(link.startswith(("https://huggingface.co/", "qwen35.json")) for link in links)
    fences = [token.content for token in MARKDOWN.parse(body) if token.type == "fence"]
    assert not any("curl" in fence for fence in fences)
    headings = [token.content for token in MARKDOWN.parse(body) if token.type == "inline"]
    assert not any(line == "pwned" for line in headings)
