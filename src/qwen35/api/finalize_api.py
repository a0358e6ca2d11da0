"""Complete an output from its slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.fp8_options import check_fp8_output
from qwen35.api.write_result import WriteResult
from qwen35.progress import Progress
from qwen35.threads import default_threads

__all__ = ["finalize"]


@plain_arguments
def finalize(
    out: str | Path, *, threads: int | None = None, progress: Progress | None = None
) -> WriteResult:
    """Check that every slice is complete, hash the files, and commit the output.

    The output equals that of a single run of `convert` or `gguf`. FP8 weights are judged by the
    slices' own comparisons with the source; they are not read again.

    Args:
        out: the output folder of the slices.
        threads: number of threads; all processors if None.
        progress: receives bytes hashed.

    Raises:
        OutputError: a slice is missing or still running, or the output exists.
        InputError: the source or a slice has changed.
    """
    from qwen35.writing.slices import finalize as complete

    plan, result = complete(Path(out), threads=threads, progress=progress)
    used = threads or default_threads()
    written = WriteResult(result.out, plan, used, result.nbytes, result.hashes)
    written = replace(written, compared=result.compared, refined=result.refined)
    if not plan.banded or not written.compared:
        return written
    report = check_fp8_output(written, bands=None, samples=None, seed=0, progress=progress)
    return replace(written, report=report)
