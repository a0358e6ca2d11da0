"""The loop: read a piece of the source, encode it for every output that needs it, write.

One sweep over a source writes the outputs of any number of plans. Steps of all plans that read the
same bytes form a group. A thread takes a group, reads its bytes once, piece by piece, and hands
them to every step (`qwen35.execution.window`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Reader
from qwen35.codecs.devices import Kernels, kernels_for
from qwen35.errors import Qwen35Error
from qwen35.execution.dispatch import WorkerPool
from qwen35.execution.fleet import fill
from qwen35.execution.step_runner import StepRunner, ThreadCrew
from qwen35.execution.window import RangeReader
from qwen35.planning.hessians import Hessians
from qwen35.planning.manifest import manifest_bytes, work_key
from qwen35.planning.output_plan import Plan
from qwen35.planning.step import Step
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
from qwen35.sinks.tensor_writer import TensorWriter, refined_digits
from qwen35.threads import default_threads
from qwen35.writing.open_output import OpenOutput
from qwen35.writing.text_pass import TextPass, Waiting

__all__ = ["WriteJob", "check_before", "write", "write_all"]


def check_before(
    out: Path,
    *,
    overwrite: bool,
    device: str = "auto",
    source: Path | None = None,
    donor: Path | None = None,
    files: Sequence[str | Path | None] = (),
) -> None:
    """Check everything that needs no source, before it is downloaded.

    Args:
        out: the output.
        overwrite: replace an output of qwen35.
        device: to encode on.
        source: the source's folder, if it is on this machine.
        donor: the same of the checkpoint that the MTP layer is taken from.
        files: the other inputs as the user named them, if any.

    Raises:
        OutputError: the output exists, overlaps the source or the donor, or holds an input.
        UsageError: the device does not exist.
    """
    check_output(out, source=source, overwrite=overwrite, donor=donor, files=files)
    kernels_for(device)


@dataclass(frozen=True)
class WriteJob:
    """A plan and its output folder.

    Args:
        plan: the plan to write.
        out: the folder.
        overwrite: replace an output of qwen35.
        keep: leave unfinished work for the next run.
        text: makes the Hessians that the plan expects while it is written; of a single job.
    """

    plan: Plan
    out: Path
    overwrite: bool = False
    keep: bool = True
    text: TextPass | None = None


def write(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    keep: bool = True,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    pool: WorkerPool | None = None,
    check: bool = False,
    text: TextPass | None = None,
) -> StagedResult:
    """Write the output that `plan` describes to the folder `out`.

    The folder appears whole: its files are written beside it, flushed, hashed and renamed. The next
    run of the same plan resumes a run that was killed or interrupted. Memory is a few pieces per
    thread, whatever the size of the model.

    Args:
        plan: the plan to write.
        out: the folder.
        overwrite: replace an output of qwen35.
        keep: leave unfinished work for the next run; without it, as in a temporary folder, nothing
            stays after a failure.
        threads: of this process; by default one per processor.
        device: where this process encodes.
        progress: receives bytes read.
        pool: workers that write instead of this process (`execution.process_pool`,
            `execution.ray_workers`), on their own devices; they need access to source and output.
        check: have workers compare what they write with the source (`StagedResult.compared`).
        text: makes the Hessians that the plan expects meanwhile; not for workers.

    Raises:
        OutputError: the output exists or overlaps the source, or the disk is full.
        TensorError: a weight cannot be read, or holds NaN or infinity.
        UsageError: a required library is not installed.
        WorkerError: a task's workers died at every attempt, or a GPU has too little memory.
    """
    job = WriteJob(plan, out, overwrite, keep, text)
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
        jobs: plans of one source.
        threads: number of groups that are written at a time.
        device: where weights are encoded.
        progress: receives bytes read, counted once per output.

    Returns:
        Results and errors by the number of the job; a failed job does not stop the others.
    """
    return _Sweep(jobs, device, progress or Silent()).run(threads)


@dataclass
class _Sweep:
    """One sweep: the state that its threads share.

    Args:
        jobs: the outputs to write; their numbers are the owners of range readers.
        device: where weights are encoded.
        progress: receives bytes read.
    """

    jobs: Sequence[WriteJob]
    device: str
    progress: Progress
    errors: dict[int, Qwen35Error] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def run(
        self, threads: int, workers: WorkerPool | None = None, *, check: bool = False
    ) -> tuple[dict[int, StagedResult], dict[int, Qwen35Error]]:
        """Open all outputs, sweep over the source, complete the outputs without errors.

        Any exception other than `Qwen35Error` ends all of them.
        """
        stacks = [ExitStack() for _ in self.jobs]
        outputs: list[OpenOutput | None] = []
        try:
            kernels = kernels_for(self.device)
            outputs += [self._open(i, stack, kernels) for i, stack in enumerate(stacks)]
            with ThreadPoolExecutor(threads) as pool:
                text = self.jobs[0].text
                if workers is None and text is None:
                    self._fill(outputs, pool, threads)
                elif workers is not None and outputs[0] is not None:
                    self._hand_out(outputs[0], pool, workers, check=check)
                elif text is not None and outputs[0] is not None:
                    self._fill_along(text, outputs[0], pool, threads)
        except BaseException as error:
            for stack in stacks:
                with suppress(Qwen35Error):  # report the first error only
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
        """Open an output, or record why it cannot be opened."""
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
        """Fill all files with threads, and finish each when it is full."""
        readers: list[RangeReader] = []
        filled_before: list[Callable[[], None]] = []
        whole = nbytes = 0
        for owner, output in enumerate(outputs):
            if output is None:
                continue
            steps, filled = self._unfinished(owner, output, pool)
            readers += output.readers(owner, steps)
            filled_before += filled
            whole += output.plan.read_bytes
            nbytes += sum(step.read_bytes for step in steps)
        if any(outputs):
            self._announce(nbytes, whole)
        with Reader(self.jobs[0].plan.checkpoint) as reader:
            crew = self._crew(outputs, readers, filled_before)
            crew.run(pool, threads, reader)

    def _fill_along(
        self, text: TextPass, output: OpenOutput, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        """Fill all files while a text passes the source: first with what awaits no Hessians."""
        plan, hessians = output.plan, output.plan.options.refinement.hessians
        assert hessians is not None  # those that the text makes
        steps, filled_before = self._unfinished(0, output, pool)
        waiting = Waiting(steps, hessians)
        todo = sum(step.read_bytes for step in steps)
        self._announce(todo + text.read_bytes, plan.read_bytes + text.read_bytes)

        def run(steps: Sequence[Step], before: Sequence[Callable[[], None]] = ()) -> None:
            readers = list(output.readers(0, steps, waiting.steps))
            self._crew([output], readers, before).run(pool, threads, reader)
            for error in self.errors.values():
                raise error

        def encode(hessians: Hessians) -> None:
            output.runner.refiners.use(hessians)
            run(waiting.taken(hessians))
            output.written.flush()  # before the Hessians are dropped

        with Reader(plan.checkpoint) as reader:
            run(waiting.ready, filled_before)
            output.plan = text.run(waiting.awaited, encode, output.progress)

    def _unfinished(
        self, owner: int, output: OpenOutput, pool: ThreadPoolExecutor
    ) -> tuple[list[Step], list[Callable[[], None]]]:
        """Return an output's unfinished steps, and jobs that finish files that lack none."""
        names = {file.name for file in output.find_finished(pool, output.plan.written)}
        steps = output.pending(output.plan.written)
        full = names - {file for step in steps for file in step.files}
        return steps, [partial(self._finish, owner, output, name) for name in sorted(full)]

    def _crew(
        self,
        outputs: Sequence[OpenOutput | None],
        readers: Sequence[RangeReader],
        jobs: Sequence[Callable[[], None]],
    ) -> ThreadCrew:
        """Return the threads that fill files, and finish those that are full."""
        crew = ThreadCrew(readers, self._failed, self._has_failed)
        for owner, output in enumerate(outputs):
            if output is not None:
                output.filled = partial(self._full, crew, owner, output)
        for job in jobs:
            crew.soon(job)
        return crew

    def _full(self, crew: ThreadCrew, owner: int, output: OpenOutput, name: str) -> None:
        crew.soon(partial(self._finish, owner, output, name))

    def _finish(self, owner: int, output: OpenOutput, name: str) -> None:
        if self._has_failed(owner):
            return
        try:
            output.finish([name])
        except Qwen35Error as error:
            self._failed(owner, error)

    def _hand_out(
        self, output: OpenOutput, pool: ThreadPoolExecutor, workers: WorkerPool, *, check: bool
    ) -> None:
        """Have workers fill the files."""
        unfinished = output.find_finished(pool, output.plan.written)
        todo = sum(step.read_bytes for step in output.pending(output.plan.written))
        self._announce(todo, output.plan.read_bytes)
        with os_errors(output.out):
            fill(output, unfinished, workers, check=check)

    def _announce(self, nbytes: int, whole: int) -> None:
        if len(self.jobs) > 1:
            title = f"writing {len(self.jobs)} artifacts in one sweep (bytes of each)"
        else:
            verb = "writing" if nbytes == whole else "continuing" if nbytes else "finishing"
            title = f"{verb} {self.jobs[0].out.name}"
        self.progress.begin(title, nbytes)

    def _failed(self, owner: int, error: Qwen35Error) -> None:
        with self.lock:
            self.errors.setdefault(owner, error)

    def _has_failed(self, owner: int) -> bool:
        return owner in self.errors

    def _close(self, owner: int, stack: ExitStack) -> None:
        """Commit an output, or roll it back if it failed."""
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
    """Prepare an output, let the block fill its tensor files, then complete it."""
    plan, out = job.plan, resolved(job.out)
    source, place = plan.checkpoint.location(), plan.checkpoint.place
    donor = plan.checkpoint.donor_location()
    check_output(out, source=source, overwrite=job.overwrite, donor=donor)
    plan.container.prepare(plan)
    key = work_key(plan)
    with resumable(out, key, overwrite=job.overwrite, keep=job.keep) as (folder, journal):
        beside = job.text.disk_bytes if job.text else 0
        check_space(folder, plan.total_bytes + beside, keeping=folder)
        with TensorWriter(folder, journal) as written:
            output = OpenOutput(out, plan, folder, written, StepRunner(plan, kernels), progress)
            yield output
        plan = output.plan  # with the hash of Hessians that were made meanwhile
        hashes = {file.name: output.hashes[file.name] for file in plan.files}
        for name, content in plan.documents.items():
            hashes[name] = write_file(folder / name, content)
        for name, size in plan.copied.items():
            assert place is not None  # it has a location
            hashes[name] = write_file(folder / name, place.read(name, 0, size))
        kept = refined_digits(journal)
        manifest = manifest_bytes(plan, hashes, kept)
        write_file(folder / MANIFEST_NAME, manifest)
    output.result = StagedResult(out, hashes, plan.nbytes + len(manifest), output.compared, kept)


class _Part:
    """The progress of one output within a sweep."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def begin(self, title: str, total: int) -> None:
        """Do nothing: the sweep has begun."""

    def advance(self, amount: int, item: str) -> None:
        """Advance the sweep."""
        self._whole.advance(amount, item)

    def end(self) -> None:
        """Do nothing: the sweep ends later."""
