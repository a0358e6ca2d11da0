"""Put together what the slices of a conversion have written."""

from __future__ import annotations

from pathlib import Path

from qwen35.api.convert import Converted
from qwen35.progress import Progress
from qwen35.threads import default_threads

__all__ = ["finalize"]


def finalize(
    out: str | Path, *, threads: int | None = None, progress: Progress | None = None
) -> Converted:
    """Check that every slice is complete, hash the files, and let the output appear.

    What comes out is what one run of `convert` writes.

    Args:
        out: the folder that the slices were for.
        threads: at most so many; all processors if None.
        progress: told of the bytes hashed.

    Raises:
        OutputError: a slice is missing or being run, or the output exists.
        InputError: the source or a slice has changed.
    """
    from qwen35.slices import finalize as carry_out

    plan, result = carry_out(Path(out), threads=threads, progress=progress)
    used = threads or default_threads()
    return Converted(result.out, plan, used, result.nbytes, result.hashes)
