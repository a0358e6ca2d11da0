"""Writing a report's files, each atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen35.checkpoint.header import json_bytes
from qwen35.errors import OutputError
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.reporting.evaluation_page import page
from qwen35.sinks.files import replace_file
from qwen35.sinks.staging import os_errors

__all__ = ["HTML_NAME", "JSON_NAME", "check_report", "write_files", "write_report"]

JSON_NAME = "report.json"
HTML_NAME = "report.html"

_MARKS = {
    JSON_NAME: b'{\n  "report": ',
    HTML_NAME: b": evaluation</title>",
    "tune.json": b'{\n  "model": ',
    "tune.html": b": tuning</title>",
}
"""What the beginning of a report's file holds: a file of this name without it is not ours."""

_HEAD = 4096


def check_report(
    folder: Path, *, overwrite: bool, names: Sequence[str] = (JSON_NAME, HTML_NAME)
) -> None:
    """Check that a report can be written, before any work.

    Args:
        folder: where to write it.
        overwrite: whether existing files may be replaced.
        names: the files.

    Raises:
        OutputError: `folder` is not a folder, or has a file that may not be replaced.
        UsageError: Matplotlib is not installed.
    """
    from qwen35.reporting.svg_figure import matplotlib_figure

    matplotlib_figure()  # raises if Matplotlib is missing, rather than after hours of work
    with os_errors(folder):
        if folder.exists() and not folder.is_dir():
            hint = "choose another name"
            raise OutputError(str(folder), "exists and is not a folder", hint=hint)
        existing = [name for name in names if (folder / name).exists()]
    if existing and not overwrite:
        raise OutputError(
            str(folder / existing[0]), "exists already", hint="give --overwrite to replace it"
        )
    for name in existing:
        if not _is_ours(folder / name):
            hint = "move it away or choose another folder"
            raise OutputError(str(folder / name), "was not written by qwen35", hint=hint)


def _is_ours(path: Path) -> bool:
    with os_errors(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return _MARKS[path.name] in file.read(_HEAD)


def write_report(report: EvaluationReport, folder: Path) -> None:
    """Write report.json and report.html into `folder`.

    Raises:
        OutputError: a file cannot be written.
    """
    value = report.to_json()
    write_files(folder, {JSON_NAME: json_bytes(value)})  # first: the page can be made of it again
    write_files(folder, {HTML_NAME: page(value).encode()})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into `folder`, each atomically.

    Raises:
        OutputError: a file cannot be written.
    """
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, content)
