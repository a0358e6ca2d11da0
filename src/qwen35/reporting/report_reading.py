"""Finding and reading the reports of evaluations, which anybody may have written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.locations import expanded, read_bounded
from qwen35.errors import InputError
from qwen35.reporting.report_files import HTML_NAME, JSON_NAME
from qwen35.reporting.reported import ReadReport, parse_report

__all__ = ["read_reports"]

_MOST_BYTES = 2**24
_MOST_CANDIDATES = 256


def read_reports(places: Sequence[str]) -> list[tuple[str, ReadReport]]:
    """Read reports; return each with a name that no other has.

    Args:
        places: folders that `evaluate` wrote, or their report.json files.

    Raises:
        InputError: one is no report, is given twice, or they have too many candidates.
    """
    files = [_file_of(place) for place in places]
    counts = Counter(file.resolve() for file in files)
    for place, file in zip(places, files, strict=True):
        if counts[file.resolve()] > 1:
            raise InputError(place, "given twice")
    reports = []
    for place, file in zip(places, files, strict=True):
        content = strict_json(read_bounded(file, _MOST_BYTES), place, InputError)
        reports.append(parse_report(content, place))
    count = sum(len(report.candidates) for report in reports)
    if count > _MOST_CANDIDATES:
        raise InputError("reports", f"{count} candidates", expected=f"at most {_MOST_CANDIDATES}")
    return list(zip(_names(files), reports, strict=True))


def _file_of(place: str) -> Path:
    """Return the report.json of a place."""
    path = expanded(place)
    if path.name == HTML_NAME:  # the page beside it
        path = path.with_name(JSON_NAME)
    if not path.is_dir():
        if not path.exists():
            raise InputError(place, "no such file or folder")
        return path
    if (file := path / JSON_NAME).exists():
        return file
    inner = path / "report"
    hint = f"did you mean {inner}?" if (inner / JSON_NAME).is_file() else ""
    expected = "a folder that qwen35 evaluate --report wrote"
    raise InputError(place, f"no {JSON_NAME} in it", expected=expected, hint=hint)


def _names(files: Sequence[Path]) -> list[str]:
    """Return the folder of each, with those above it where several are called the same.

    >>> _names([Path("/a/x/report.json"), Path("/b/x/report.json"), Path("/b/y/other.json")])
    ['a/x', 'b/x', 'other']
    """
    parts = []
    for file in files:
        path = file.resolve()
        parts.append(
            path.parent.parts if path.name == JSON_NAME else (*path.parent.parts, path.stem)
        )
    names = [path[-1] for path in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        counts = Counter(names)
        names = [
            "/".join(path[-depth:]) if counts[name] > 1 else name
            for path, name in zip(parts, names, strict=True)
        ]
    return names
