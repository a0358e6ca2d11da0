"""A verdict as text, 80 columns wide."""

from __future__ import annotations

from qwen35.display import printable
from qwen35.verification.verdict import Verdict

__all__ = ["verdict_text"]


def verdict_text(verdict: Verdict) -> str:
    """Render a verdict."""
    lines = [_head(verdict)]
    inexact = [row for row in verdict.errors if row.squared]
    if verdict.errors:
        exact = sum(row.count for row in verdict.errors if not row.squared)
        lines.append(f"{exact} weights are exactly those of the source")
    width = max([6, *(len(row.storage) for row in inexact)])
    if inexact:
        head = f"{'  role':<38} {'stored':>{width}} {'count':>6} {'rel. error':>12} {'worst':>12}"
        lines += ["", head]
    for row in inexact:
        values = f"{row.relative:>12.6f} {row.worst:>12.6f}"
        lines.append(f"  {row.role:<36} {row.storage:>{width}} {row.count:>6} {values}")
    if verdict.answers:
        lines += ["", f"{'  asked':<62} {'thinking':>8}  answer"]
    file = ""
    for answer in verdict.answers:
        if answer.file != file:
            lines.append(answer.file)
        file = answer.file
        thinking = "on" if answer.question.thinking else "off"
        mark = "right" if answer.right else "WRONG"
        lines.append(f"  {answer.question.prompt[:60]:<60} {thinking:>8}  {mark}")
    if verdict.served is not None:
        lines += ["", *(f"  asked: {subject}" for subject in verdict.served.asked)]
    if verdict.findings:
        lines.append("")
        lines += [f"error: {f.subject}: {f.message} [{f.check}]" for f in verdict.findings]
    lines += [f"note: {note}" for note in verdict.notes]
    lines += [f"not compared: {what}" for what in verdict.not_compared]
    lines += [f"not detected: {what}" for what in verdict.not_detected]
    lines += ["", verdict.result]
    return "\n".join(lines)


def _head(verdict: Verdict) -> str:
    if verdict.served is not None:
        return (
            f"{printable(verdict.name)} at {verdict.served.url}: {verdict.served.model.described}"
        )
    counts = verdict.counts
    return (
        f"{verdict.name}: {verdict.kind}, {counts['weights']} weights "
        f"({counts['packed']} packed) in {counts['files']} files, checked: {verdict.depth}"
    )
