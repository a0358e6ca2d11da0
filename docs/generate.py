"""Write the pages generated from the code, and the tables generated from committed figures.

Writes stale pages; with ``--check`` it only lists them, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from generating.commands import commands_page, old_commands_page
from generating.keys import gguf_keys_page, manifest_page
from generating.marked import with_tables
from generating.recipes import recipes_page, roles_page
from generating.runtime import runtime_page

ROOT = Path(__file__).parent.parent

MARKED = ("README.md", "docs/benchmarks.md")
"""Pages written by hand, with tables between marks."""

PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/commands.md": commands_page,
    "docs/reference/old-commands.md": old_commands_page,
    "docs/reference/recipes.md": recipes_page,
    "docs/reference/roles.md": roles_page,
    "docs/reference/gguf-keys.md": gguf_keys_page,
    "docs/reference/manifest.md": manifest_page,
    "docs/reference/runtime.md": runtime_page,
    **{page: partial(with_tables, ROOT / page) for page in MARKED},
}
"""Page to its generator."""


def stale() -> dict[Path, str]:
    """Return the outdated pages, with their current text."""
    current = {ROOT / name: make() for name, make in PAGES.items()}
    return {
        path: text
        for path, text in current.items()
        if not path.is_file() or path.read_text("utf-8") != text
    }


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    outdated = stale()
    for path, text in outdated.items():
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, "utf-8")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
