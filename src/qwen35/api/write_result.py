"""Write an output by threads, processes, a Ray cluster or slices; the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.api.worker_choice import pool_for
from qwen35.display import size
from qwen35.errors import Qwen35Error
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.output_plan import Plan
from qwen35.progress import Progress
from qwen35.table import html_table
from qwen35.threads import default_threads

if TYPE_CHECKING:
    from qwen35.api.text_hessians import TextRun
    from qwen35.verification.fp8_report import Fp8Report

__all__ = ["WriteOptions", "WriteResult", "carry_out", "fitting_threads"]


@dataclass(frozen=True)
class WriteResult:
    """The result of writing an output.

    Args:
        out: the folder.
        plan: the plan that was or would be written.
        threads: number of threads that were or would be used.
        nbytes: bytes of all files; of a slice, its own.
        hashes: file name to SHA-256, without the manifest; empty if nothing was written.
        report: the check of an FP8 output against its source, unless skipped.
        part: ``(i, N)`` if this is a slice.
        weights: number of weights in the slice.
        compared: weight to the result of the workers' check.
        exported: an export's file, and the type of each of its tensors.
        before: notes on what is done before anything is written.
        refined: file and weight to a digit for each of its matrices: 1 if it has refined codes.
    """

    out: Path
    plan: Plan
    threads: int
    nbytes: int
    hashes: Mapping[str, str] = field(default_factory=dict)
    report: Fp8Report | None = None
    part: tuple[int, int] | None = None
    weights: int = 0
    compared: Mapping[str, Any] = field(default_factory=dict, repr=False)
    exported: tuple[Path, Mapping[str, str]] | None = None
    before: tuple[str, ...] = ()
    refined: Mapping[tuple[str, str], str] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        did = f"{len(self.hashes)} files" if self.hashes else "not written"
        return f"<WriteResult {self.out}: {did}, {size(self.nbytes)}>"

    def _repr_html_(self) -> str:
        rows = [(name, digest) for name, digest in self.hashes.items()]
        title = repr(self).strip("<>")
        return html_table(("file", "SHA-256"), rows, title) if rows else self.plan._repr_html_()

    @property
    def passed(self) -> bool:
        """Whether the check of the output, if any, passed."""
        return self.report is None or self.report.verdict != "FAIL"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        if self.part is not None:
            number, count = self.part
            own = {"weights": self.weights, "bytes": self.nbytes}
            return {"slice": number, "of": count, **own}
        if self.exported is not None:
            return {"file": str(self.exported[0]), "tensors": dict(self.exported[1])}
        value: dict[str, Any] = {"out": str(self.out), "bytes": self.nbytes}
        value |= {"sha256": dict(self.hashes), **self.plan.container.packed_json(self.plan)}
        return value if self.report is None else {**value, "report": self.report.to_json()}


@dataclass(frozen=True)
class WriteOptions:
    """How to write an output; the bytes do not depend on it.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a list of GPUs; ``auto`` is the CPU.
        workers: number of processes, each with `threads` threads.
        ray_address: use this Ray cluster.
        slice: write one part, ``(i, N)``.
        threads: number of threads; all processors if None.
        memory: use fewer threads to stay below this many bytes.
        overwrite: replace an output of qwen35.
        check: have other processes compare what they write with the source.
        held: bytes of `memory` that something else takes.
    """

    device: str = "auto"
    workers: int | None = None
    ray_address: str | None = None
    slice: tuple[int, int] | None = None
    threads: int | None = None
    memory: int | None = None
    overwrite: bool = False
    check: bool = False
    held: int = 0


def carry_out(
    plan: Plan,
    out: Path,
    options: WriteOptions,
    progress: Progress | None,
    text: TextRun | None = None,
) -> WriteResult:
    """Write an output; errors are those of `qwen35.writing.write.write`.

    Args:
        plan: the plan to write.
        out: the folder.
        options: how.
        progress: receives bytes read.
        text: makes the Hessians that the plan expects meanwhile.
    """
    if options.slice is not None:
        return _slice(plan, out, options, options.slice, progress)
    from qwen35.sinks.staging import may_continue
    from qwen35.writing.write import write

    pool = pool_for(
        plan,
        options.workers,
        options.ray_address,
        device=options.device,
        threads=options.threads,
        memory=options.memory,
    )
    with pool as workers:
        # with workers, which keep to the memory limit themselves, this process only hashes
        threads = default_threads() if workers else fitting_threads(plan, options)
        try:
            result = write(
                plan,
                out,
                overwrite=options.overwrite,
                threads=threads,
                device=options.device,
                progress=progress,
                pool=workers,
                check=options.check,
                text=text,
            )
        except Qwen35Error as error:
            if text is not None and not may_continue(error):
                text.stream.remove()
            raise
    if text is not None:
        text.stream.remove()
        plan = text.plan or plan
    written = WriteResult(result.out, plan, threads, result.nbytes, result.hashes)
    return replace(written, compared=result.compared, refined=result.refined)


def _slice(
    plan: Plan, out: Path, options: WriteOptions, part: tuple[int, int], progress: Progress | None
) -> WriteResult:
    from qwen35.writing.slices import write_slice

    threads = fitting_threads(plan, options)
    result = write_slice(
        plan,
        out,
        *part,
        overwrite=options.overwrite,
        threads=threads,
        device=options.device,
        progress=progress,
        check=options.check,
    )
    return WriteResult(out, plan, threads, result.nbytes, part=part, weights=result.weights)


def fitting_threads(plan: Plan, options: WriteOptions) -> int:
    """Return the number of threads that fits into the memory limit.

    Raises:
        UsageError: a single thread needs more.
    """

    def needed(threads: int) -> int:
        return options.held + peak_memory(plan, threads)

    return threads_within(needed, options.threads, options.memory)
