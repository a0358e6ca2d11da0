"""A diff as a table and as counters."""

from __future__ import annotations

from collections.abc import Iterator

from qwen35.display import printable, size
from qwen35.publishing.diff import ATTRIBUTES, Diff, Kind, Operation

__all__ = ["counters", "diff_text", "findings_text"]

_STATUS: dict[Kind, str] = {
    "same": "unchanged",
    "upload": "to upload",
    "delete": "to delete",
    "download": "to download",
    "remove": "to remove",
}
_COUNTED: dict[str, tuple[Kind, ...]] = {
    "push": ("upload", "delete", "same"),
    "pull": ("download", "remove", "same"),
}
_SHA256_DIGITS = 64


def counters(diff: Diff) -> dict[str, int]:
    """Return the number of files to upload, to delete and so on."""
    counted = {_STATUS[kind]: len(diff.of(kind)) for kind in _COUNTED[diff.direction]}
    kept = len(diff.of("keep"))
    return counted | ({"kept": kept} if kept else {})


def diff_text(diff: Diff) -> str:
    """Return the table FILE, SIZE, STATUS and the counters below it."""
    rows = [(printable(op.path), size(op.size), _status(diff, op)) for op in diff.operations]
    width = max([4, *(len(name) for name, _, _ in rows)])
    lines = [f"{'FILE':<{width}}  {'SIZE':>10}  STATUS"]
    lines += [f"{name:<{width}}  {size:>10}  {status}" for name, size, status in rows]
    summary = " / ".join(f"{count} {name}" for name, count in counters(diff).items())
    if diff.base is None:
        summary += f"\n{diff.repo} does not exist yet, or this token does not see it"
    return "\n".join([*lines, "", summary])


def findings_text(diff: Diff) -> Iterator[str]:
    """Yield a line for each finding that stops the sync."""
    for finding in diff.findings:
        yield f"STOPPED {printable(finding.subject)}: {finding.message}"


def _status(diff: Diff, op: Operation) -> str:
    if op.kind == "keep":
        side = "repository" if diff.direction == "push" else "folder"
        return "the Hub's own, kept" if op.path == ATTRIBUTES else f"only in the {side}, kept"
    large = op.remote is not None and len(op.remote) == _SHA256_DIGITS
    return _STATUS[op.kind] + (f" {str(op.remote)[:8]}" if op.kind == "same" and large else "")
