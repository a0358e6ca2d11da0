"""The README's results table, built from the figures that `make results` measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generating.markdown import table

__all__ = ["RESULTS", "results_lines", "with_results"]

RESULTS = Path(__file__).parents[1] / "results.json"
_BEGIN, _END = "<!-- results.json -->", "<!-- /results.json -->"


def with_results(readme: str) -> str:
    """Return the README with the table between its marks rebuilt."""
    lines = "\n".join(results_lines(json.loads(RESULTS.read_text("utf-8"))))
    marked = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if len(marked.findall(readme)) != 1:
        raise SystemExit(f"README.md: {_BEGIN} and {_END} must each occur once")
    return marked.sub(lambda _: f"{_BEGIN}\n{lines}{_END}", readme)


def results_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table."""
    base, tokens = results["base"], results["tokens"]
    yield (
        f"{tokens['scored']:,} tokens in {tokens['chunks']} chunks of {tokens['context']}; ± "
        "treats chunks as independent."
    )
    yield ""
    columns = ("format", "made by", "bytes of weights", "mean KLD", "same top token")
    rows = [[base["name"], "", f"{base['bytes']:,}", "", ""]]
    for row in results["rows"]:
        kld, top = row["kld"], row["same_top"]
        rows.append(
            [
                row["name"],
                f"`{row['verb']} --recipe {row['recipe']}`",
                f"{row['bytes']:,}",
                f"{kld['value']:.6f} ± {kld['block_error']:.6f}",
                f"{100 * top['value']:.2f} %",
            ]
        )
    yield from table(columns, rows)
