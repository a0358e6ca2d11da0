"""What came of writing an output, printed."""

from __future__ import annotations

from qwen35.api.write_result import WriteResult
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.display import size

__all__ = ["show"]


def show(made: WriteResult, output: Console, *, dry_run: bool = False) -> int:
    """Print what was written, or what would be; return the exit code."""
    plan, container = made.plan, made.plan.container
    if dry_run:
        output.data(container.text(plan, made.threads), container.json(plan, made.threads))
        return 0
    if made.part is not None:
        number, count = made.part
        text = f"slice {number}/{count}: {made.weights} weights, {size(made.nbytes)}"
        text = f"{text}; when all slices are done: qwen35 finalize {made.out}"
        output.data(text, made.to_json())
        return 0
    output.notes(plan.notes)
    text = f"{made.out}: {len(made.hashes) + 1} files, {size(made.nbytes)}"
    if packed := container.written_text(plan):
        text = f"{text}, {packed}"
    if made.report is not None:
        from qwen35.verification.fp8_display import report_text

        text = f"{report_text(made.report)}\n{text}"
    output.data(text, made.to_json())
    return 0 if made.passed else EXIT_FINDINGS
