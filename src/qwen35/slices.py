"""A conversion in slices that know nothing of each other, for batch schedulers; and its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from qwen35.checkpoint.source import Reader
from qwen35.codecs.devices import encoders_for
from qwen35.convert import Conversion, Result, convert
from qwen35.errors import OutputError
from qwen35.plan.order import order_of, plan_from
from qwen35.plan.plan import Plan, PlannedFile
from qwen35.plan.step import Step
from qwen35.plan.tasks import Task, make_tasks, share, task_bytes
from qwen35.progress import Progress, Silent
from qwen35.sinks.journal import Journal
from qwen35.sinks.slices import joined, read_order, slice_name
from qwen35.sinks.staging import FILES_NAME, JOURNAL_NAME, check_output, check_space, work_path
from qwen35.sinks.written import Written
from qwen35.threads import default_threads
from qwen35.work.steps import Carrier

__all__ = ["Slice", "convert_slice", "finalize"]


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


def convert_slice(
    plan: Plan,
    out: Path,
    number: int,
    count: int,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Slice:
    """Carry out slice `number` (from 1) of `count` of a plan, in the work folder beside `out`.

    Slices may run in any order, at the same time, on machines that see the same folders; one that
    ended before its time is continued by the same call. `finalize` makes the output of them.

    Raises:
        OutputError: the output exists, the slice is being run, or the folder holds other work.
        TensorError: a weight cannot be read, or holds NaN or infinity.
    """
    progress = progress or Silent()
    source = plan.checkpoint.folder()
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    carrier = Carrier(plan, encoders_for(device))
    size = task_bytes(plan, count)
    order = order_of(plan, size, slices=count, overwrite=overwrite)
    own = share(make_tasks(plan.files, size), count)[number - 1]
    try:
        with (
            joined(out, number, order) as (folder, journal),
            Reader(plan.checkpoint) as reader,
            Written(folder, journal, shared=True) as written,
        ):
            run = Conversion(out, plan, folder, written, reader, carrier, progress)
            _run(run, own, f"slice {number}/{count} of {out.name}", threads)
    finally:
        progress.end()
    steps = [step for task in own for step in task.steps]
    return Slice(work_path(out), len(steps), sum(step.nbytes for step in steps))


def _run(run: Conversion, tasks: Sequence[Task], title: str, threads: int | None) -> None:
    files = {file.name: file for file in run.plan.files}
    left = [(files[task.file], run.left(files[task.file], task.steps)) for task in tasks]
    check_space(run.folder, sum(step.nbytes for _, steps in left for step in steps))
    nbytes = sum(step.weight.nbytes for _, steps in left for step in steps)
    verb = "writing" if nbytes == sum(task.nbytes for task in tasks) else "continuing"
    run.progress.begin(f"{verb} {title}", nbytes)
    stop = Event()
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for file, group in _by_file(left):
            if group:
                run.fill(pool, file, group, stop)
    run.written.flush()


def _by_file(
    left: Sequence[tuple[PlannedFile, list[Step]]],
) -> Iterator[tuple[PlannedFile, list[Step]]]:
    """Join the steps of tasks of the same file, which follow each other."""
    joint: dict[str, tuple[PlannedFile, list[Step]]] = {}
    for file, steps in left:
        joint.setdefault(file.name, (file, []))[1].extend(steps)
    yield from joint.values()


def finalize(
    out: Path, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[Plan, Result]:
    """Make the output of finished slices: hash their files, write all others, rename.

    What comes out is what one run without slices writes. Needs the source, for its headers and
    side-car files. One that is killed is continued by the same call.

    Raises:
        OutputError: there are no slices, some are not complete, or one is being run.
        InputError: the source or the versions of the tools are not those of the slices.
    """
    out = out.resolve() if not out.is_symlink() else out
    work = work_path(out)
    if not work.exists() and out.exists():
        raise OutputError(str(out), "is there already", hint="there are no slices to finalize")
    if not work.exists():
        hint = "they are made by `qwen35 convert MODEL OUT --slice i/N`, of the same OUT"
        raise OutputError(str(out), "there are no slices of it", hint=hint)
    order = read_order(work)
    if not isinstance(order.get("slices"), int):
        hint = "repeat the command that began it"
        raise OutputError(str(work), "holds a run without slices", hint=hint)
    plan = plan_from(order)
    if not _merged(work, order):
        with ExitStack() as held:  # their journals: no slice can begin meanwhile
            finished = _finished(out, plan, order, held)
            whole = held.enter_context(Journal(work / JOURNAL_NAME, order["key"], home=work))
            whole.record(finished)
    result = convert(plan, out, overwrite=order["overwrite"], threads=threads, progress=progress)
    return plan, result


def _merged(work: Path, order: Mapping[str, Any]) -> bool:
    """Whether a run that finalized was killed; if it had not come far, nothing is left of it."""
    path = work / JOURNAL_NAME
    if not path.exists():
        return False
    with Journal(path, order["key"], home=work) as whole:
        if not whole:
            path.unlink()
        return bool(whole)


def _finished(out: Path, plan: Plan, order: Mapping[str, Any], held: ExitStack) -> dict[str, int]:
    """Return what the slices have finished, as the journal of the whole notes it.

    Raises:
        OutputError: that is not all there is to do; it says whose it is.
    """
    work, count = work_path(out), order["slices"]
    shares = share(make_tasks(plan.files, order["task_bytes"]), count)
    finished: dict[str, int] = {}
    problems = []
    for number, tasks in enumerate(shares, 1):
        path = work / slice_name(number, count)
        if not path.exists():
            problems.append(f"slice {number}/{count} was not run")
            continue
        journal = held.enter_context(Journal(path, order["key"], home=work))
        wanted = [f"{task.file}/{step.outputs[0].name}" for task in tasks for step in task.steps]
        missing = sum(not journal.get(entry) for entry in wanted)
        if missing:
            problems.append(f"slice {number}/{count} lacks {missing} of {len(wanted)} weights")
        finished |= dict.fromkeys(wanted, 1)
    if problems:
        raise OutputError(str(out), "; ".join(problems), hint="run these, then finalize again")
    for file in plan.files:
        path = work / FILES_NAME / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
            hint = f"remove {work} to start over"
            raise OutputError(str(path), "is gone or was cut since", hint=hint)
    return finished
