"""Markdown pages as programs: the fences of a page, run in order in one shell.

    python tests/pages.py PAGE...

writes into the pages what their blocks print, where they show something else.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

import qwen35
from patience import PATIENCE

ROOT = Path(__file__).parent.parent
RUN = ("bash", "python")
DATA = ("json", "toml")
OUTPUT = "text"
EXTERNAL = "external"
_CHECKER = doctest.OutputChecker()
_ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fence that is run, or that says it is not.

    Args:
        line: number of its first line in the page.
        language: one of `RUN`.
        content: what is in it.
        external: whether it is tagged.
        shown: what the page says it prints; None if it does not say.
        shown_at: number of the line where that begins.
    """

    line: int
    language: str
    content: str
    external: bool
    shown: str | None = None
    shown_at: int = 0

    def agrees(self, printed: str) -> bool:
        """Whether this is what the page shows; ``...`` stands for anything, spaces are alike."""
        return self.shown is None or _CHECKER.check_output(self.shown, printed, _ALIKE)


class PageError(Exception):
    """A page that breaks the rules, or did not do what it says."""


def tokens_of(text: str) -> list[Token]:
    """Return all tokens of a Markdown text, those in lists and quotes too."""
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks_of(text: str) -> list[Block]:
    """Return the fences of a page that are programs, each with the output that follows it.

    Raises:
        PageError: a fence has a language or a tag that is not known here, or hides.
    """
    found: list[Block] = []
    for token in tokens_of(text):
        if token.type == "code_block":
            assert token.map is not None
            raise PageError(f"line {token.map[0] + 1}: code by indentation; use a fence")
        if token.type == "fence":
            _add(found, token)
    return found


def _add(found: list[Block], token: Token) -> None:
    assert token.map is not None
    line = token.map[0] + 1
    language, *tags = token.info.split() or [""]
    if language in RUN and tags in ([], [EXTERNAL]):
        found.append(Block(line, language, token.content, bool(tags)))
    elif language == OUTPUT and not tags:
        if not found or found[-1].shown is not None:
            raise PageError(f"line {line}: output of no block")
        found[-1] = replace(found[-1], shown=token.content, shown_at=line + 1)
    elif language not in DATA or tags:
        raise PageError(f"line {line}: a fence called {token.info!r}")


def run_page(blocks: Sequence[Block], folder: Path) -> list[str]:
    """Run the blocks that are not external in one shell; return what each printed to stdout.

    Args:
        blocks: of a page.
        folder: an empty one: the shell begins in ``clone`` in it, where ``assets`` lies.

    Raises:
        PageError: a block failed, or was not reached.
    """
    wanted = [block for block in blocks if not block.external]
    clone = folder / "clone"
    clone.mkdir()
    (clone / "assets").symlink_to(ROOT / "assets")
    script = folder / "page.sh"
    script.write_text("\n".join(_script(wanted, folder)) + "\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    source = str(Path(qwen35.__file__).parent.parent)
    kept = {name: v for name, v in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=clone,
        env=kept | {"PATH": path, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    printed = []
    for number, block in enumerate(wanted):
        if not (folder / f"{number}.done").exists():
            said = _read(folder / f"{number}.err") or done.stderr
            raise PageError(f"line {block.line}: failed or not reached\n{said[-3000:]}")
        printed.append(_read(folder / f"{number}.out"))
    return printed


def check_page(text: str, folder: Path) -> int:
    """Run a page in an empty folder, hold what it prints against what it shows; count its blocks.

    Raises:
        PageError: something failed, or printed something else.
    """
    blocks = blocks_of(text)
    printed = run_page(blocks, folder)
    ran = [block for block in blocks if not block.external]
    for block, said in zip(ran, printed, strict=True):
        if not block.agrees(said):
            found = f"line {block.line} prints\n{said}\nand the page shows\n{block.shown}"
            raise PageError(found)
    return len(printed)


def _script(blocks: Sequence[Block], folder: Path) -> Iterator[str]:
    yield "set -euo pipefail"
    for number, block in enumerate(blocks):
        yield f"exec > {folder}/{number}.out 2> {folder}/{number}.err"
        if block.language == "python":
            yield f"python - <<'END OF BLOCK'\n{block.content}END OF BLOCK"
        else:
            yield block.content
        yield f": > {folder}/{number}.done"


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def fill(page: Path, folder: Path) -> None:
    """Write into a page what its blocks print, where it shows something else."""
    text = page.read_text("utf-8")
    blocks = blocks_of(text)
    printed = run_page(blocks, folder)
    lines = text.splitlines(keepends=True)
    ran = [block for block in blocks if not block.external]
    for block, said in reversed(list(zip(ran, printed, strict=True))):
        if not block.agrees(said):
            assert block.shown is not None
            first = block.shown_at - 1
            lines[first : first + len(block.shown.splitlines())] = [_portable(said, folder)]
            print(f"{page}:{block.shown_at}: written")
    page.write_text("".join(lines), "utf-8")


def _portable(said: str, folder: Path) -> str:
    """Put dots for what depends on the machine: its folders, and the size of our versions."""
    said = said.replace(f"{folder.resolve()}/clone/", ".../")
    return re.sub(r"^((?:qwen35\.json|total) +)[\d,]+$", r"\1...", said, flags=re.MULTILINE)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            fill(Path(name), Path(scratch))
