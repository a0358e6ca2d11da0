"""Tables between marks in pages written by hand, built from committed figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from generating.benchmarks import benchmark_tables, tuned_lines
from generating.results import results_lines

__all__ = ["with_tables"]

_MARKED = re.compile(r"<!-- (?P<name>\w+\.json(: \w+)?) -->.*?<!-- /(?P=name) -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?\w+\.json(: \w+)? -->")


def _tables() -> Mapping[str, Callable[[], Iterable[str]]]:
    named = {f"benchmarks.json: {name}": made for name, made in benchmark_tables().items()}
    return {"results.json": results_lines, "tune.json": tuned_lines, **named}


def with_tables(page: Path) -> str:
    """Return a page with the tables between its marks rebuilt."""
    text, tables = page.read_text("utf-8"), _tables()

    def rebuilt(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in tables:
            raise SystemExit(f"{page.name}: {name}: no such table; there are {', '.join(tables)}")
        lines = "\n".join(tables[name]())
        return f"<!-- {name} -->\n{lines}<!-- /{name} -->"

    if 2 * len(_MARKED.findall(text)) != len(_MARK.findall(text)):
        raise SystemExit(f"{page.name}: a mark without its other end")
    return _MARKED.sub(rebuilt, text)
