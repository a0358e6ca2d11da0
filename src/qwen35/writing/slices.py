"""Write an output in independent slices, for batch schedulers, and finalize it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen35.checkpoint.source import FolderReader, Reader
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.devices import kernels_for
from qwen35.errors import InputError, OutputError, Qwen35Error
from qwen35.execution.judging import compare_steps
from qwen35.execution.step_runner import StepRunner, ThreadCrew
from qwen35.planning.output_plan import Plan
from qwen35.planning.step import Step
from qwen35.planning.tasks import make_tasks, share, task_bytes
from qwen35.planning.work_order import order_of, plan_from
from qwen35.progress import Progress, Silent
from qwen35.sinks.journal import Journal
from qwen35.sinks.slice_folder import joined, read_order, slice_name
from qwen35.sinks.staging import StagedResult, check_output, check_space, os_errors, resolved
from qwen35.sinks.tensor_writer import TensorWriter
from qwen35.sinks.work_folder import FILES_NAME, JOURNAL_NAME, check_work, misfit, work_path
from qwen35.threads import default_threads
from qwen35.writing.open_output import OpenOutput
from qwen35.writing.write import write

__all__ = ["Slice", "finalize", "write_slice"]

_COMPARED = "compared "
"""Prefix of the journal entries that hold the check results of weights."""


@dataclass(frozen=True)
class Slice:
    """A finished slice.

    Args:
        work: the work folder.
        weights: number of weights.
        nbytes: bytes written.
    """

    work: Path
    weights: int
    nbytes: int


def write_slice(
    plan: Plan,
    out: Path,
    number: int,
    count: int,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    check: bool = False,
) -> Slice:
    """Write slice `number` (from 1) of `count` of a plan, in the work folder beside `out`.

    Slices may run in any order and at the same time, on machines that share the folders. The same
    call resumes a slice that was killed. `finalize` makes the output of them. With `check`, a slice
    compares what it wrote with the source and records the results for `finalize`.

    Raises:
        OutputError: the output exists, the slice is running, or the folder holds other work.
        TensorError: a weight cannot be read, or holds NaN or infinity.
    """
    progress = progress or Silent()
    out = resolved(out)
    source, donor = plan.checkpoint.location(), plan.checkpoint.donor_location()
    check_output(out, source=source, overwrite=overwrite, donor=donor)
    plan.container.prepare(plan)
    runner = StepRunner(plan, kernels_for(device))
    size = task_bytes(plan, count)
    order = order_of(plan, size, check=check, slices=count, overwrite=overwrite)
    tasks = share(make_tasks(plan.written, size), count)[number - 1]
    own = [step for task in tasks for step in task.steps]
    try:
        with (
            joined(out, number, order) as (folder, journal),
            Reader(plan.checkpoint) as reader,
            TensorWriter(folder, journal, shared=True) as written,
        ):
            output = OpenOutput(out, plan, folder, written, runner, progress)
            _fill(output, own, f"slice {number}/{count} of {out.name}", reader, threads)
            if check:
                _compare(output, own, journal, reader, threads)
    finally:
        progress.end()
    return Slice(work_path(out), len(own), sum(step.nbytes for step in own))


def _fill(
    output: OpenOutput, own: Sequence[Step], title: str, reader: Reader, threads: int | None
) -> None:
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        output.find_finished(pool, own)
    steps = output.pending(own)
    check_space(output.folder, sum(step.nbytes for step in steps))
    nbytes = sum(step.read_bytes for step in steps)
    verb = "writing" if nbytes == sum(step.read_bytes for step in own) else "continuing"
    output.progress.begin(f"{verb} {title}", nbytes)
    errors: list[Qwen35Error] = []
    threads = threads or default_threads()
    readers = list(output.readers(0, steps))
    crew = ThreadCrew(readers, lambda _, error: errors.append(error), lambda _: bool(errors))
    with ThreadPoolExecutor(threads) as pool:
        crew.run(pool, threads, reader)
    for error in errors:
        raise error
    output.written.flush()


def _compare(
    output: OpenOutput, own: Sequence[Step], journal: Journal, reader: Reader, threads: int | None
) -> None:
    """Check each weight whose result the journal lacks, and record it."""
    pending = [step for step in own if f"{_COMPARED}{step.outputs[0].name}" not in journal]
    files = {file.name: file for file in output.plan.files}
    with (
        ThreadPoolExecutor(threads or default_threads()) as pool,
        FolderReader(output.folder) as written,
    ):
        results = compare_steps(pending, files, written, reader, pool)
    journal.record({f"{_COMPARED}{name}": value for name, value in results.items()})


def finalize(
    out: Path, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[Plan, StagedResult]:
    """Complete the output of finished slices: hash their files, write the others, rename.

    The output is the same as without slices. The source's headers and sidecar files must still be
    there. The same call resumes a finalization that was killed.

    Raises:
        OutputError: there are no slices, some are incomplete, or one is running.
        InputError: the source or the tool versions differ from those of the slices.
    """
    out = resolved(out)
    work = work_path(out)
    begun = os.path.lexists(work)
    if not begun and out.exists():
        raise OutputError(str(out), "already exists", hint="there are no slices to finalize")
    if not begun:
        hint = "write them with `--slice i/N` of convert or gguf and the same OUT"
        raise OutputError(str(out), "has no slices", hint=hint)
    with os_errors(out):
        check_work(work)
        order = read_order(work)
    if not isinstance(order.get("slices"), int):
        hint = "run the original command again"
        raise OutputError(str(work), "holds a run without slices", hint=hint)
    if not Path(order["root"]).exists():
        found = f"not there on {platform.node()}"
        hint = "finalize reads its headers and small files: bring it back to where it was"
        raise InputError(order["root"], found, expected="the source of the slices", hint=hint)
    plan = plan_from(order)
    with ExitStack() as held:  # hold the journals of all slices: none can start meanwhile
        merged = _merged(work, order)
        finished, compared = _finished(out, plan, order, held, complete=merged)
        if not merged:
            whole = held.enter_context(Journal(work / JOURNAL_NAME, order["key"], home=work))
            whole.record(finished)
    # from here on it is a resumed run without slices
    result = write(plan, out, overwrite=order["overwrite"], threads=threads, progress=progress)
    return plan, replace(result, compared=compared)


def _merged(work: Path, order: Mapping[str, Any]) -> bool:
    """Return whether an earlier finalization merged the journals; remove an empty one."""
    path = work / JOURNAL_NAME
    if not path.exists():
        return False
    with Journal(path, order["key"], home=work) as whole:
        if not whole:
            path.unlink()
        return bool(whole)


def _finished(
    out: Path, plan: Plan, order: Mapping[str, Any], held: ExitStack, *, complete: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Collect the results of all slices.

    Args:
        out: the output.
        plan: the plan of the slices.
        order: their order.
        held: keeps their journals open.
        complete: skip the checks, because an earlier call found all slices complete.

    Returns:
        The finished pieces as journal entries, and the results of their checks.

    Raises:
        OutputError: slices are missing or incomplete; the message names them.
    """
    work, count = work_path(out), order["slices"]
    shares = share(make_tasks(plan.written, order["task_bytes"]), count)
    finished: dict[str, Any] = {}
    compared: dict[str, Any] = {}
    problems = []
    for number, tasks in enumerate(shares, 1):
        path = work / slice_name(number, count)
        if not path.exists():
            problems.append(f"slice {number}/{count} was not run")
            continue
        journal = held.enter_context(Journal(path, order["key"], home=work))
        steps = [step for task in tasks for step in task.steps]
        expected = [_entries(step) for step in steps]
        missing = sum(not all(map(journal.get, entries)) for entries in expected)
        if missing:
            problems.append(f"slice {number}/{count} lacks {missing} of {len(expected)} weights")
        finished |= {entry: journal.get(entry) for entries in expected for entry in entries}
        compared |= _valid_comparisons(journal)
    if problems and not complete:
        raise OutputError(str(out), "; ".join(problems), hint="run these, then finalize again")
    for file in [] if complete else plan.files:
        path = work / FILES_NAME / file.name
        if wrong := misfit(path, file.nbytes):
            raise OutputError(str(path), wrong, hint=f"remove {work} to start over")
    return finished, compared


def _valid_comparisons(journal: Journal) -> dict[str, Any]:
    """Return the check results of a slice; a malformed one counts as not checked."""
    valid = {}
    for name, value in journal.items():
        if name.startswith(_COMPARED):
            with suppress(TypeError, KeyError, ValueError, AttributeError):
                valid[name.removeprefix(_COMPARED)] = WeightComparison.from_json(value).to_json()
    return valid


def _entries(step: Step) -> list[str]:
    """Return a step's journal entries."""
    return [f"{file}/{target.outputs[0].name}" for target in step.targets for file in target.files]
