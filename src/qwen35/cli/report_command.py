"""Rank the candidates of one or more evaluations, and say which to pick.

Reads what evaluate --report wrote, and prints a verdict and a table, closest first. Several reports
must be of the same text and base. --output writes a page with charts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.report_api import report
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import keywords
from qwen35.display import counted, printable
from qwen35.table import table_lines

if TYPE_CHECKING:
    from qwen35.reporting.ranking import Ranking

EXAMPLES = {
    "which candidate to pick, of one evaluation": "qwen35 report REPORT",
    "several evaluations of the same text on one page": (
        "qwen35 report gguf-report fp8-report nf4-report --output comparison"
    ),
    "the smallest within another loss": "qwen35 report REPORT --loss 0.03",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "reports",
        metavar="REPORT",
        nargs="+",
        help="folder that evaluate --report wrote, or its report.json",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="write report.html into DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace the report.html in DIR")
    parser.add_argument(
        "--loss",
        metavar="NATS",
        type=_loss,
        help="mean divergence to accept in the verdict (default: 0.01)",
    )


def _loss(text: str) -> float:
    """Parse a divergence; argparse prints the error."""
    try:
        return float(text)
    except ValueError as error:
        expected = "a number of nats such as 0.03"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}") from error


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.reporting.report_files import HTML_NAME

    ranking = report(**keywords(args))
    output.data(_text(ranking, output.width), ranking.to_json())
    if args.output is not None:
        output.info(f"{args.output / HTML_NAME}: written")
    return 0


def _text(ranking: Ranking, width: int | None) -> str:
    base = ranking.base
    lines = [
        f"{base.base}, {base.stored} in {base.engine}: {counted(base.chunks, 'chunk')} of "
        f"{base.context} tokens, {base.scored} scored",
        *(
            f"{line.title}: {line.name and f'{line.name}. '}{line.reason}"
            for line in ranking.advice
        ),
    ]
    if not ranking.models:
        return "\n".join(map(printable, [*lines, f"perplexity {base.perplexity:.4f}"]))
    columns = ["closest first", "size", "mean KLD", "±", "same top", "perplexity"]
    table = table_lines(columns, [row.cells for row in ranking.models], width)
    return "\n".join(map(printable, [*lines, "", *table]))
