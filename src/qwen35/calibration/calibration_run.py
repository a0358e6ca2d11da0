"""Run a calibration plan and write its files."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.calibration.calibration_plan import (
    COVERAGE,
    IMATRIX,
    LEGACY,
    STATISTICS,
    CalibrationPlan,
)
from qwen35.calibration.calibration_stream import calibration_stream
from qwen35.calibration.draft_acceptance import DraftAcceptance, acceptance
from qwen35.calibration.imatrix_export import write_imatrix, write_legacy
from qwen35.calibration.shared_pass import run_shared
from qwen35.calibration.states import CalibrationFolder, work_folder
from qwen35.calibration.statistics_file import coverage, write_statistics
from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Reader
from qwen35.display import size
from qwen35.engines.torch_model import torch_and_transformers
from qwen35.errors import OutputError, UsageError
from qwen35.execution.dispatch import WorkerPool
from qwen35.planning.hessians import HESSIANS
from qwen35.planning.manifest import manifest_entries
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import flushed, write_file
from qwen35.sinks.staging import (
    StagedResult,
    check_output,
    check_space,
    locked,
    os_errors,
    resolved,
    staging,
)

__all__ = ["CalibrationResult", "calibrate", "check_before", "device_for"]


@dataclass(frozen=True)
class CalibrationResult:
    """The result of a calibration.

    Args:
        result: the files.
        coverage: tokens seen by each expert, and the experts below the floor; empty if dense.
        resumed: number of blocks taken over from an interrupted run.
        draft: how often what the MTP layer drafts is accepted, if asked for.
    """

    result: StagedResult
    coverage: dict[str, Any]
    resumed: int
    draft: DraftAcceptance | None = None

    def __repr__(self) -> str:
        return f"<CalibrationResult {self.result.out}: {size(self.result.nbytes)}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "out": str(self.result.out),
            "bytes": self.result.nbytes,
            "sha256": self.result.hashes,
            "coverage": self.coverage,
            "resumed": self.resumed,
            "draft": self.draft.to_json() if self.draft else None,
        }


def device_for(name: str) -> str:
    """Return the torch device for `name`; ``auto`` is a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    torch, _ = torch_and_transformers("calibrate")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError("--device", repr(name), expected="auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= count:
        raise UsageError("--device", f"{name}: {count} GPUs here", expected="an available GPU")
    return name


def check_before(out: Path, *, overwrite: bool, device: str) -> None:
    """Check the output and device, before the source is downloaded.

    Raises:
        OutputError: the output exists.
        UsageError: there is no such device, or a library is not installed.
    """
    check_output(out, source=None, overwrite=overwrite)
    device_for(device)


def calibrate(
    plan: CalibrationPlan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
    pool: WorkerPool | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run a plan's text through its checkpoint and write statistics to the folder `out`.

    Keeps one decoder layer and one batch in memory, and hidden states in a hidden folder beside
    `out`. An interrupted run resumes at the unfinished layer, with workers or without.

    Args:
        plan: the plan.
        out: the folder.
        overwrite: replace an output, or an interrupted run of another plan.
        threads: of torch, in this process.
        device: for torch, in this process.
        pool: workers that run the layers instead; closed at the end.
        progress: receives the bytes of each layer.

    Raises:
        WorkerError: the workers of some windows died at every attempt.
        OutputError: the output exists, or the disk is full.
        InputError: a weight cannot be read, or an input holds NaN.
    """
    out = resolved(out)
    source, donor = plan.checkpoint.location(), plan.checkpoint.donor_location()
    check_output(out, source=source, overwrite=overwrite, donor=donor)
    device = device_for(device)
    torch, _ = torch_and_transformers("calibrate")
    if threads:
        torch.set_num_threads(threads)
    progress = progress or Silent()
    folder = work_folder(out)
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with os_errors(out), locked(folder):
        work = CalibrationFolder(folder, plan.digest, restart=overwrite)
        resumed = max(0, len(work.done) - 1)
        # A resumed run has its hidden states on disk already.
        left = plan.output_bytes + plan.hessian_disk_bytes(work.done)
        needed = left if resumed else plan.own_disk_bytes
        check_space(out.parent, needed + (plan.part_bytes if pool is not None else 0))
        progress.begin(f"calibrating {out.name}", plan.read_bytes)
        try:
            with pool or nullcontext(), work, Reader(plan.checkpoint) as reader:
                stream = calibration_stream(plan, work, reader, device, progress)
                if pool is None:
                    stream.run()
                else:
                    run_shared(plan, work, stream, pool)
                draft = acceptance(stream) if plan.request.draft else None
        finally:
            progress.end()
        expert_coverage = _coverage(plan, work)
        result = _write(plan, work, out, expert_coverage, overwrite=overwrite)
        work.remove()
    return CalibrationResult(result, expert_coverage, resumed, draft)


def _coverage(plan: CalibrationPlan, work: CalibrationFolder) -> dict[str, Any]:
    if not plan.config.moe:
        return {}
    names = (block.name for block in plan.blocks)
    return coverage(((name, work.sums(name)) for name in names), plan.request.floor)


def _write(
    plan: CalibrationPlan,
    work: CalibrationFolder,
    out: Path,
    expert_coverage: dict[str, Any],
    *,
    overwrite: bool,
) -> StagedResult:
    floor = plan.request.floor
    provenance = {**plan.provenance, "experts_below_floor": _count_below(expert_coverage)}
    with staging(out, overwrite=overwrite) as folder:
        write_statistics(
            folder / STATISTICS, plan.items, plan.config, work, floor=floor, provenance=provenance
        )
        write_imatrix(folder / IMATRIX, plan, work, provenance)
        if plan.request.legacy:
            write_legacy(folder / LEGACY, plan, work)
        if expert_coverage:
            write_file(folder / COVERAGE, json_bytes(expert_coverage))
        places = {name: folder / name for name in plan.file_names} | _hessian_files(plan, work)
        sizes = {name: place.stat().st_size for name, place in places.items()}
        hashes = {name: flushed(place) for name, place in places.items()}
        recipe = {"name": "calibrate", "format": "statistics", "rules": [], **plan.provenance}
        entries = manifest_entries(plan.checkpoint, recipe, plan.digest, sizes, hashes)
        manifest = json_bytes(entries)
        write_file(folder / MANIFEST_NAME, manifest)
        if plan.hessians is not None:  # last: what is interrupted before this can be resumed
            work.hessians.replace(folder / HESSIANS)
    return StagedResult(out, hashes, sum(sizes.values()) + len(manifest))


def _hessian_files(plan: CalibrationPlan, work: CalibrationFolder) -> dict[str, Path]:
    """Return the files of Hessians in the work folder, by their names in the output.

    Raises:
        OutputError: they are gone.
    """
    files = plan.hessians.files if plan.hessians else ()
    places = {f"{HESSIANS}/{name}": work.hessians / name for name in files}
    for place in places.values():
        if not place.is_file():
            found = f"holds finished layers without {place.name}"
            raise OutputError(str(work.folder), found, hint="give --overwrite to start again")
    return places


def _count_below(expert_coverage: dict[str, Any]) -> int:
    return sum(map(len, expert_coverage.get("below_floor", {}).values()))
