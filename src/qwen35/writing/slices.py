"""An output in slices that know nothing of each other, for batch schedulers; and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen35.checkpoint.source import FolderReader, Reader
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.devices import kernels_for
from qwen35.errors import OutputError, Qwen35Error
from qwen35.execution.judging import compare_steps
from qwen35.execution.step_runner import StepRunner, ThreadCrew
from qwen35.planning.output_plan import Plan
from qwen35.planning.step import Step
from qwen35.planning.tasks import make_tasks, share, task_bytes
from qwen35.planning.work_order import order_of, plan_from
from qwen35.progress import Progress, Silent
from qwen35.sinks.journal import Journal
from qwen35.sinks.slice_folder import joined, read_order, slice_name
from qwen35.sinks.staging import (
    FILES_NAME,
    JOURNAL_NAME,
    StagedResult,
    check_output,
    check_space,
    resolved,
    work_path,
)
from qwen35.sinks.tensor_writer import TensorWriter
from qwen35.threads import default_threads
from qwen35.writing.open_output import OpenOutput
from qwen35.writing.write import write

__all__ = ["Slice", "finalize", "write_slice"]

_COMPARED = "compared "
"""What entries of a slice's journal begin with that say what a check of a weight found."""


@dataclass(frozen=True)
class Slice:
    """What a slice has finished.

    Args:
        work: the work folder, which holds it.
        weights: how many.
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
    """Carry out slice `number` (from 1) of `count` of a plan, in the work folder beside `out`.

    Slices may run in any order, at the same time, on machines that see the same folders; one that
    ended before its time is continued by the same call. `finalize` makes the output of them.
    With `check`, a slice compares what it wrote with the source, and leaves what it found for
    `finalize`.

    Raises:
        OutputError: the output exists, the slice is being run, or the folder holds other work.
        TensorError: a weight cannot be read, or holds NaN or infinity.
    """
    progress = progress or Silent()
    out = resolved(out)
    check_output(out, source=plan.checkpoint.folder(), overwrite=overwrite)
    plan.container.prepare(plan)
    carrier = StepRunner(plan, kernels_for(device))
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
            output = OpenOutput(out, plan, folder, written, carrier, progress)
            _fill(output, own, f"slice {number}/{count} of {out.name}", reader, threads)
            if check:
                _compare(output, own, journal, reader, threads)
    finally:
        progress.end()
    return Slice(work_path(out), len(own), sum(step.nbytes for step in own))


def _fill(
    output: OpenOutput, own: Sequence[Step], title: str, reader: Reader, threads: int | None
) -> None:
    steps = output.left(own)
    check_space(output.folder, sum(step.nbytes for step in steps))
    nbytes = sum(step.read_bytes for step in steps)
    verb = "writing" if nbytes == sum(step.read_bytes for step in own) else "continuing"
    output.progress.begin(f"{verb} {title}", nbytes)
    errors: list[Qwen35Error] = []
    threads = threads or default_threads()
    works = list(output.works(0, steps))
    crew = ThreadCrew(works, lambda _, error: errors.append(error), lambda _: bool(errors))
    with ThreadPoolExecutor(threads) as pool:
        crew.run(pool, threads, reader)
    for error in errors:
        raise error
    output.written.flush()


def _compare(
    output: OpenOutput, own: Sequence[Step], journal: Journal, reader: Reader, threads: int | None
) -> None:
    """Note in the journal what a check of each weight finds that is not noted there."""
    left = [step for step in own if f"{_COMPARED}{step.outputs[0].name}" not in journal]
    files = {file.name: file for file in output.plan.files}
    with (
        ThreadPoolExecutor(threads or default_threads()) as pool,
        FolderReader(output.folder) as written,
    ):
        found = compare_steps(left, files, written, reader, pool)
    journal.record({f"{_COMPARED}{name}": value for name, value in found.items()})


def finalize(
    out: Path, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[Plan, StagedResult]:
    """Make the output of finished slices: hash their files, write all others, rename.

    What comes out is what one run without slices writes. Needs the source, for its headers and
    side-car files. One that is killed is continued by the same call.

    Raises:
        OutputError: there are no slices, some are not complete, or one is being run.
        InputError: the source or the versions of the tools are not those of the slices.
    """
    out = resolved(out)
    work = work_path(out)
    if not work.exists() and out.exists():
        raise OutputError(str(out), "is there already", hint="there are no slices to finalize")
    if not work.exists():
        hint = "they are made by `--slice i/N` of convert or gguf, with the same OUT"
        raise OutputError(str(out), "there are no slices of it", hint=hint)
    order = read_order(work)
    if not isinstance(order.get("slices"), int):
        hint = "repeat the command that began it"
        raise OutputError(str(work), "holds a run without slices", hint=hint)
    plan = plan_from(order)
    with ExitStack() as held:  # their journals: no slice can begin meanwhile
        merged = _merged(work, order)
        finished, compared = _finished(out, plan, order, held, known=merged)
        if not merged:
            whole = held.enter_context(Journal(work / JOURNAL_NAME, order["key"], home=work))
            whole.record(finished)
    result = write(plan, out, overwrite=order["overwrite"], threads=threads, progress=progress)
    return plan, replace(result, compared=compared)


def _merged(work: Path, order: Mapping[str, Any]) -> bool:
    """Whether a run that finalized was killed; if it had not come far, nothing is left of it."""
    path = work / JOURNAL_NAME
    if not path.exists():
        return False
    with Journal(path, order["key"], home=work) as whole:
        if not whole:
            path.unlink()
        return bool(whole)


def _finished(
    out: Path, plan: Plan, order: Mapping[str, Any], held: ExitStack, *, known: bool
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return what the slices have finished, as the journal of the whole notes it.

    Args:
        out: the output.
        plan: of the slices.
        order: that they follow.
        held: keeps their journals open.
        known: whether all was complete before, so that nothing is asked again.

    Returns:
        The finished tensors, and what checks of them found.

    Raises:
        OutputError: that is not all there is to do; it says whose it is.
    """
    work, count = work_path(out), order["slices"]
    shares = share(make_tasks(plan.written, order["task_bytes"]), count)
    finished: dict[str, int] = {}
    compared: dict[str, Any] = {}
    problems = []
    for number, tasks in enumerate(shares, 1):
        path = work / slice_name(number, count)
        if not path.exists():
            problems.append(f"slice {number}/{count} was not run")
            continue
        journal = held.enter_context(Journal(path, order["key"], home=work))
        steps = [step for task in tasks for step in task.steps]
        wanted = [_entries(step) for step in steps]
        missing = sum(not all(map(journal.get, entries)) for entries in wanted)
        if missing:
            problems.append(f"slice {number}/{count} lacks {missing} of {len(wanted)} weights")
        finished |= dict.fromkeys((entry for entries in wanted for entry in entries), 1)
        compared |= _sound(journal)
    if problems and not known:
        raise OutputError(str(out), "; ".join(problems), hint="run these, then finalize again")
    for file in [] if known else plan.files:
        path = work / FILES_NAME / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
            hint = f"remove {work} to start over"
            raise OutputError(str(path), "is gone or was cut since", hint=hint)
    return finished, compared


def _sound(journal: Journal) -> dict[str, Any]:
    """Return what a slice's checks found; an entry that is none counts as not checked."""
    found = {}
    for name, value in journal.items():
        if name.startswith(_COMPARED):
            with suppress(TypeError, KeyError, ValueError, AttributeError):
                found[name.removeprefix(_COMPARED)] = WeightComparison.from_json(value).to_json()
    return found


def _entries(step: Step) -> list[str]:
    """Return the journal's entries of all that a step writes."""
    return [f"{file}/{target.outputs[0].name}" for target in step.targets for file in target.files]
