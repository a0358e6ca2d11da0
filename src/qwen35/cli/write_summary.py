"""Print the result of writing an output."""

from __future__ import annotations

from qwen35.api.write_result import WriteResult
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.display import size
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import refined_text

__all__ = ["show", "show_plan"]


def show(result: WriteResult, output: Console, *, dry_run: bool = False) -> int:
    """Print what was or would be written; return the exit code."""
    plan, container = result.plan, result.plan.container
    if dry_run:
        output.notes(result.before)
        show_plan(plan, result.threads, output)
        return 0
    if result.part is not None:
        number, count = result.part
        text = f"slice {number}/{count}: {result.weights} weights, {size(result.nbytes)}"
        text = f"{text}; when all slices are done: qwen35 finalize {result.out}"
        output.data(text, result.to_json())
        return 0
    output.notes(plan.notes)
    text = f"{result.out}: {len(result.hashes) + 1} files, {size(result.nbytes)}"
    if packed := container.written_text(plan):
        text = f"{text}, {packed}"
    if result.report is not None:
        from qwen35.verification.fp8_display import report_text

        text = f"{report_text(result.report)}\n{text}"
    if refined := refined_text(plan, result.refined):
        text = f"{refined}\n{text}"
    output.data(text, result.to_json())
    return 0 if result.passed else EXIT_FINDINGS


def show_plan(plan: Plan, threads: int, output: Console) -> None:
    """Print a plan in the form that was asked for: for a large model, each takes a while."""
    if output.as_json:
        output.data("", plan.container.json(plan, threads))
    else:
        output.data(plan.container.text(plan, threads), None)
