"""The loop: read a piece of the source, encode it for everything that wants it, write.

Any number of plans of one source are carried out in one sweep; one plan is the sweep of one. Steps
of all plans that read the same bytes are one group. A thread takes a group, reads its bytes once,
piece by piece, and hands them to every step (`qwen35.execution.window`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Reader
from qwen35.codecs.devices import Kernels, kernels_for
from qwen35.errors import Qwen35Error
from qwen35.execution.dispatch import WorkerPool
from qwen35.execution.fleet import fill
from qwen35.execution.step_runner import StepRunner, ThreadCrew
from qwen35.execution.window import RangeReader
from qwen35.planning.manifest import manifest_bytes, work_key
from qwen35.planning.output_plan import Plan
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import write_file
from qwen35.sinks.staging import (
    StagedResult,
    check_output,
    check_space,
    os_errors,
    resolved,
    resumable,
)
from qwen35.sinks.tensor_writer import TensorWriter
from qwen35.threads import default_threads
from qwen35.writing.open_output import OpenOutput

__all__ = ["WriteJob", "check_before", "write", "write_all"]


def check_before(
    out: Path, *, overwrite: bool, device: str = "auto", source: Path | None = None
) -> None:
    """Check what can be checked before the source is downloaded.

    Args:
        out: the output.
        overwrite: replace an output of ours.
        device: to encode on.
        source: the folder of the source, if it is on this machine.

    Raises:
        OutputError: the output exists or overlaps the source.
        UsageError: there is no such device.
    """
    check_output(out, source=source, overwrite=overwrite)
    kernels_for(device)


@dataclass(frozen=True)
class WriteJob:
    """A plan, and the folder to write.

    Args:
        plan: what to write.
        out: where.
        overwrite: replace an output of ours.
    """

    plan: Plan
    out: Path
    overwrite: bool = False


def write(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    pool: WorkerPool | None = None,
    check: bool = False,
) -> StagedResult:
    """Write the output that `plan` describes to the folder `out`.

    The folder appears whole: everything is prepared beside it, flushed and hashed, and renamed. A
    run that is killed or interrupted is continued by the next one of the same plan.
    Memory is a few pieces a thread, whatever the size of the model.

    Args:
        plan: what to write.
        out: the folder.
        overwrite: replace an output of ours.
        threads: of this process; all processors, if not given.
        device: where this process encodes.
        progress: told of the bytes read.
        pool: workers that do it instead (`execution.process_pool`,
            `execution.ray_workers`), on their own devices; they must see the source and the output.
        check: have workers compare what they write with the source (`StagedResult.compared`).

    Raises:
        OutputError: the output exists or overlaps the source, or the disk is full.
        TensorError: a weight cannot be read, or holds NaN or infinity.
        UsageError: a library is needed and not installed.
        WorkerError: workers died again and again, or a GPU has too little memory.
    """
    job = WriteJob(plan, out, overwrite)
    sweep = _Sweep([job], "cpu" if pool else device, progress or Silent())
    results, errors = sweep.run(threads or default_threads(), pool, check=check)
    for error in errors.values():
        raise error
    return results[0]


def write_all(
    jobs: Sequence[WriteJob],
    *,
    threads: int,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[dict[int, StagedResult], dict[int, Qwen35Error]]:
    """Write several outputs of one source in one sweep.

    Args:
        jobs: of one source.
        threads: groups of steps worked on at a time.
        device: where weights are encoded.
        progress: told of the bytes that steps have done with, each output's by itself.

    Returns:
        What was written and what went wrong, by the number of the job; one that goes wrong does not
        stop the others.
    """
    return _Sweep(jobs, device, progress or Silent()).run(threads)


@dataclass
class _Sweep:
    """One sweep: what its threads share.

    Args:
        jobs: what is made; their numbers are the owners of works.
        device: where weights are encoded.
        progress: told of the bytes done with.
    """

    jobs: Sequence[WriteJob]
    device: str
    progress: Progress
    errors: dict[int, Qwen35Error] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def run(
        self, threads: int, workers: WorkerPool | None = None, *, check: bool = False
    ) -> tuple[dict[int, StagedResult], dict[int, Qwen35Error]]:
        """Open all outputs, sweep over the source, complete the outputs that came out well.

        What is no `Qwen35Error` ends all of them.
        """
        stacks = [ExitStack() for _ in self.jobs]
        outputs: list[OpenOutput | None] = []
        try:
            kernels = kernels_for(self.device)
            outputs += [self._open(i, stack, kernels) for i, stack in enumerate(stacks)]
            with ThreadPoolExecutor(threads) as pool:
                if workers is None:
                    self._fill(outputs, pool, threads)
                elif outputs[0] is not None:
                    self._hand_out(outputs[0], pool, workers, check=check)
        except BaseException as error:
            for stack in stacks:
                with suppress(Qwen35Error):  # the first error is the one to tell
                    stack.__exit__(type(error), error, error.__traceback__)
            raise
        finally:
            self.progress.end()
        for owner, stack in enumerate(stacks):
            self._close(owner, stack)
        results = {i: o.result for i, o in enumerate(outputs) if o and i not in self.errors}
        return results, self.errors

    def _open(
        self, owner: int, stack: ExitStack, kernels: tuple[Kernels, ...]
    ) -> OpenOutput | None:
        """Open an output, or note why it cannot be."""
        job = self.jobs[owner]
        progress = self.progress if len(self.jobs) == 1 else _Part(self.progress)
        try:
            with os_errors(job.out):
                return stack.enter_context(_opened(job, kernels, progress))
        except Qwen35Error as error:
            self.errors[owner] = error
            return None

    def _fill(
        self, outputs: Sequence[OpenOutput | None], pool: ThreadPoolExecutor, threads: int
    ) -> None:
        """Fill all files by threads, and finish each when it is full."""
        works: list[RangeReader] = []
        empty: list[Callable[[], None]] = []
        whole = nbytes = 0
        for owner, output in enumerate(outputs):
            if output is None:
                continue
            names = [file.name for file in output.find_finished(pool)]
            steps = output.left(output.plan.written)
            works += output.works(owner, steps)
            full = set(names) - {file for step in steps for file in step.files}
            empty += [partial(self._finish, owner, output, name) for name in sorted(full)]
            whole += output.plan.read_bytes
            nbytes += sum(step.read_bytes for step in steps)
        if any(outputs):
            self._announce(nbytes, whole)
        crew = ThreadCrew(works, self._failed, self._unwanted)
        for owner, output in enumerate(outputs):
            if output is not None:
                output.filled = partial(self._full, crew, owner, output)
        for job in empty:
            crew.soon(job)
        with Reader(self.jobs[0].plan.checkpoint) as reader:
            crew.run(pool, threads, reader)

    def _full(self, crew: ThreadCrew, owner: int, output: OpenOutput, name: str) -> None:
        crew.soon(partial(self._finish, owner, output, name))

    def _finish(self, owner: int, output: OpenOutput, name: str) -> None:
        if self._unwanted(owner):
            return
        try:
            output.finish([name])
        except Qwen35Error as error:
            self._failed(owner, error)

    def _hand_out(
        self, output: OpenOutput, pool: ThreadPoolExecutor, workers: WorkerPool, *, check: bool
    ) -> None:
        """Have workers fill the files."""
        left = output.find_finished(pool)
        todo = sum(step.read_bytes for step in output.left(output.plan.written))
        self._announce(todo, output.plan.read_bytes)
        fill(output, left, workers, check=check)

    def _announce(self, nbytes: int, whole: int) -> None:
        if len(self.jobs) > 1:
            title = f"writing {len(self.jobs)} artifacts in one sweep, counting for each"
        else:
            verb = "writing" if nbytes == whole else "continuing" if nbytes else "finishing"
            title = f"{verb} {self.jobs[0].out.name}"
        self.progress.begin(title, nbytes)

    def _failed(self, owner: int, error: Qwen35Error) -> None:
        with self.lock:
            self.errors.setdefault(owner, error)

    def _unwanted(self, owner: int) -> bool:
        return owner in self.errors

    def _close(self, owner: int, stack: ExitStack) -> None:
        """Let an output appear, or take what there is of it away."""
        error = self.errors.get(owner)
        try:
            if error is None:
                stack.close()
            else:
                stack.__exit__(type(error), error, error.__traceback__)
        except Qwen35Error as failure:
            self._failed(owner, failure)


@contextmanager
def _opened(
    job: WriteJob, kernels: tuple[Kernels, ...], progress: Progress
) -> Iterator[OpenOutput]:
    """Prepare an output, let the block fill its files, and complete it."""
    plan, out = job.plan, resolved(job.out)
    source = plan.checkpoint.folder()
    place = LocalFolder(source)
    check_output(out, source=source, overwrite=job.overwrite)
    plan.container.prepare(plan)
    with resumable(out, work_key(plan), overwrite=job.overwrite) as (folder, journal):
        check_space(folder, plan.total_bytes, keeping=folder)
        with TensorWriter(folder, journal) as written:
            output = OpenOutput(out, plan, folder, written, StepRunner(plan, kernels), progress)
            yield output
        hashes = {file.name: output.hashes[file.name] for file in plan.files}
        for name, content in plan.documents.items():
            hashes[name] = write_file(folder / name, content)
        for name, size in plan.copied.items():
            hashes[name] = write_file(folder / name, place.read(name, 0, size))
        manifest = manifest_bytes(plan, hashes)
        write_file(folder / MANIFEST_NAME, manifest)
    output.result = StagedResult(out, hashes, plan.nbytes + len(manifest), output.compared)


class _Part:
    """The progress of one output, which is a part of the sweep's."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def begin(self, title: str, total: int) -> None:
        """Ignore it: the sweep has begun."""

    def advance(self, amount: int, item: str) -> None:
        """Pass it on."""
        self._whole.advance(amount, item)

    def end(self) -> None:
        """Ignore it: the sweep goes on."""
