"""Write a report's files: each appears whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen35.checkpoint.header import json_bytes
from qwen35.errors import OutputError
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.reporting.evaluation_page import page
from qwen35.sinks.staging import os_errors

__all__ = ["HTML_NAME", "JSON_NAME", "check_report", "write_files", "write_report"]

JSON_NAME = "report.json"
HTML_NAME = "report.html"


def check_report(
    folder: Path, *, overwrite: bool, names: Sequence[str] = (JSON_NAME, HTML_NAME)
) -> None:
    """Refuse a place for a report before any work.

    Args:
        folder: the place.
        overwrite: whether files there may be replaced.
        names: the files.

    Raises:
        OutputError: it is no folder, or a report is in it and may not be replaced.
        UsageError: what draws the charts is not installed.
    """
    from qwen35.reporting.charts import matplotlib_figure

    matplotlib_figure()
    with os_errors(folder):
        if folder.exists() and not folder.is_dir():
            hint = "choose another name"
            raise OutputError(str(folder), "exists and is not a folder", hint=hint)
        taken = [name for name in names if (folder / name).exists()]
    if taken and not overwrite:
        raise OutputError(
            str(folder / taken[0]), "exists already", hint="give --overwrite to replace it"
        )


def write_report(report: EvaluationReport, folder: Path) -> None:
    """Write report.json and report.html into `folder`.

    Raises:
        OutputError: the disk refuses.
    """
    value = report.to_json()
    write_files(folder, {JSON_NAME: json_bytes(value), HTML_NAME: page(value).encode()})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into `folder`, each whole.

    Raises:
        OutputError: the disk refuses.
    """
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
