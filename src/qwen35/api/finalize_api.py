"""Put together what slices of a run have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen35.api.fp8_options import check_made
from qwen35.api.write_result import WriteResult
from qwen35.progress import Progress
from qwen35.threads import default_threads

__all__ = ["finalize"]


def finalize(
    out: str | Path, *, threads: int | None = None, progress: Progress | None = None
) -> WriteResult:
    """Check that every slice is complete, hash the files, and let the output appear.

    What comes out is what one run of `convert` or `gguf` writes. FP8 weights are judged by what the
    slices found when they compared them with the source; they are not read again.

    Args:
        out: the folder that the slices were for.
        threads: at most so many; all processors if None.
        progress: told of the bytes hashed.

    Raises:
        OutputError: a slice is missing or being run, or the output exists.
        InputError: the source or a slice has changed.
    """
    from qwen35.writing.slices import finalize as put_together

    plan, result = put_together(Path(out), threads=threads, progress=progress)
    used = threads or default_threads()
    made = WriteResult(
        result.out, plan, used, result.nbytes, result.hashes, compared=result.compared
    )
    if plan.settings is None or not made.compared:
        return made
    report = check_made(made, bands=None, samples=None, seed=0, progress=progress)
    return replace(made, report=report)
