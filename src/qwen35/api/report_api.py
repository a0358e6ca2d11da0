"""Rank the candidates of one or more evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed

if TYPE_CHECKING:
    from qwen35.reporting.ranking import Ranking

__all__ = ["report"]


@plain_arguments
def report(
    reports: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    loss: float | None = None,
) -> Ranking:
    """Rank the candidates of reports of the same text and base; write one page about all.

    Args:
        reports: folders that `evaluate` wrote with `report`, or their report.json files.
        output: folder to write report.html to.
        overwrite: replace an existing report.html.
        loss: mean divergence to accept in the verdict, in nats; 0.01 if None.

    Raises:
        InputError: a file is no report, or the reports cannot be compared.
        UsageError: no report is given, the loss is not a positive number, or Matplotlib is not
            installed.
        OutputError: the page exists, or cannot be written.
    """
    from math import isfinite

    from qwen35.errors import UsageError
    from qwen35.reporting.evaluation_page import ranking_page
    from qwen35.reporting.ranking import LOSS, rank
    from qwen35.reporting.report_files import HTML_NAME, check_report, write_files
    from qwen35.reporting.report_reading import read_reports

    if not (places := listed(reports)):
        raise UsageError("reports", "none given", expected="folders that evaluate wrote")
    if loss is not None and not (isfinite(loss) and loss > 0):
        raise UsageError("--loss", f"{loss}", expected="a positive number of nats")
    if output is not None:
        check_report(Path(output), overwrite=overwrite, names=(HTML_NAME,))
    ranking = rank(read_reports([str(place) for place in places]), LOSS if loss is None else loss)
    if output is not None:
        write_files(Path(output), {HTML_NAME: ranking_page(ranking).encode()})
    return ranking
