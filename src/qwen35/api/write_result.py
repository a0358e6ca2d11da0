"""What came of writing an output, and how: by threads, processes, a Ray cluster, or slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.api.worker_choice import pool_for
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.output_plan import Plan
from qwen35.progress import Progress
from qwen35.threads import default_threads

if TYPE_CHECKING:
    from qwen35.verification.fp8_report import Fp8Report

__all__ = ["WriteOptions", "WriteResult", "carry_out", "fitting"]


@dataclass(frozen=True)
class WriteResult:
    """What came of writing an output.

    Args:
        out: the folder.
        plan: what was carried out, or would be.
        threads: how many were used, or would be.
        nbytes: of all files.
        hashes: SHA-256 by name of file, without the manifest; empty if nothing was written.
        report: the check of an FP8 output against its source, unless it was left out.
        part: the slice that this was, ``(i, N)``, if it was one; `nbytes` are its own then.
        weights: of the slice.
        compared: weight to what workers found when they checked it.
        exported: the file of an export, and the type of each tensor in it.
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

    @property
    def passed(self) -> bool:
        """Whether the check, if there was one, found the output fit to be used."""
        return self.report is None or self.report.verdict != "FAIL"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        if self.part is not None:
            number, count = self.part
            own = {"weights": self.weights, "bytes": self.nbytes}
            return {"slice": number, "of": count, **own}
        if self.exported is not None:
            return {"file": str(self.exported[0]), "tensors": dict(self.exported[1])}
        made: dict[str, Any] = {"out": str(self.out), "bytes": self.nbytes}
        made |= {"sha256": dict(self.hashes), **self.plan.container.packed_json(self.plan)}
        return made if self.report is None else {**made, "report": self.report.to_json()}


@dataclass(frozen=True)
class WriteOptions:
    """How an output is written, which does not change what comes out.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a list of GPUs; ``auto`` is the CPU.
        workers: processes, each with so many threads.
        ray_address: work on this Ray cluster.
        slice: do one part, ``(i, N)``.
        threads: at most so many; all processors if None.
        memory: use fewer threads to stay below so many bytes.
        overwrite: replace an output of qwen35.
        check: have others than this process compare what they write with the source.
    """

    device: str = "auto"
    workers: int | None = None
    ray_address: str | None = None
    slice: tuple[int, int] | None = None
    threads: int | None = None
    memory: int | None = None
    overwrite: bool = False
    check: bool = False


def carry_out(plan: Plan, out: Path, how: WriteOptions, progress: Progress | None) -> WriteResult:
    """Write an output; errors are those of `qwen35.writing.write.write`."""
    if how.slice is not None:
        return _slice(plan, out, how, how.slice, progress)
    from qwen35.writing.write import write

    pool = pool_for(
        plan,
        how.workers,
        how.ray_address,
        device=how.device,
        threads=how.threads,
        memory=how.memory,
    )
    with pool as others:
        threads = default_threads() if others else fitting(plan, how)
        result = write(
            plan,
            out,
            overwrite=how.overwrite,
            threads=threads,
            device=how.device,
            progress=progress,
            pool=others,
            check=how.check,
        )
    made = WriteResult(result.out, plan, threads, result.nbytes, result.hashes)
    return replace(made, compared=result.compared)


def _slice(
    plan: Plan, out: Path, how: WriteOptions, part: tuple[int, int], progress: Progress | None
) -> WriteResult:
    from qwen35.writing.slices import write_slice

    threads = fitting(plan, how)
    done = write_slice(
        plan,
        out,
        *part,
        overwrite=how.overwrite,
        threads=threads,
        device=how.device,
        progress=progress,
        check=how.check,
    )
    return WriteResult(out, plan, threads, done.nbytes, part=part, weights=done.weights)


def fitting(plan: Plan, how: WriteOptions) -> int:
    """Return the threads of this process that keep within the memory given.

    Raises:
        UsageError: one thread alone needs more.
    """
    return threads_within(lambda n: peak_memory(plan, n), how.threads, how.memory)
