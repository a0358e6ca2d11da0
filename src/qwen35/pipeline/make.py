"""Make artifacts of one source in one sweep; what goes wrong with one does not stop the others.

The steps of all plans that read the same bytes of the source are one group. A thread takes a group,
reads its bytes once, piece by piece, and hands them to every step (`qwen35.pipeline.window`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import Event, Lock

from qwen35.checkpoint.source import Reader
from qwen35.checkpoint.storage import Weight
from qwen35.convert import Conversion, convert, converting
from qwen35.errors import Qwen35Error
from qwen35.gguf.plan import GgufPlan
from qwen35.gguf.rows import Strip, source_end, strips
from qwen35.gguf.write import Job, Writing, write, writing
from qwen35.pipeline.planned import Artifact
from qwen35.pipeline.window import Window, Work, advance, groups
from qwen35.plan.plan import PlannedFile
from qwen35.plan.step import Step
from qwen35.progress import Progress
from qwen35.sinks.files import TensorFile
from qwen35.sinks.staging import os_errors

__all__ = ["make_artifacts"]


def make_artifacts(
    artifacts: Sequence[Artifact], *, threads: int, device: str, progress: Progress
) -> dict[str, Qwen35Error]:
    """Write artifacts over whatever of theirs lies there; return what went wrong, by name.

    Whether they may be replaced was asked before. One alone is made as its own verb makes it.

    Args:
        artifacts: of one source.
        threads: groups worked on at a time.
        device: where weights are encoded.
        progress: told of the bytes that steps have done with, each artifact's by itself.
    """
    if len(artifacts) == 1:
        return _alone(artifacts[0], threads, device, progress)
    sweep = _Sweep(artifacts, device, progress)
    try:
        sweep.run(threads)
    finally:
        progress.end()
    return {artifacts[i].name: error for i, error in sweep.errors.items()}


def _alone(
    artifact: Artifact, threads: int, device: str, progress: Progress
) -> dict[str, Qwen35Error]:
    plan, out = artifact.plan, artifact.out
    try:
        if isinstance(plan, GgufPlan):
            write(plan, out, overwrite=True, threads=threads, progress=progress)
        else:
            convert(plan, out, overwrite=True, threads=threads, device=device, progress=progress)
    except Qwen35Error as error:
        return {artifact.name: error}
    return {}


@dataclass
class _Sweep:
    """One sweep: what its threads share.

    Args:
        artifacts: what is made; their numbers are the owners of works.
        device: where weights are encoded.
        progress: told of the bytes done with.
    """

    artifacts: Sequence[Artifact]
    device: str
    progress: Progress
    errors: dict[int, Qwen35Error] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    stop: Event = field(default_factory=Event)

    def run(self, threads: int) -> None:
        """Open all outputs, sweep over the source, complete the outputs that came out well.

        What is no `Qwen35Error` ends all of them.
        """
        stacks = [ExitStack() for _ in self.artifacts]
        ends: list[Conversion | Writing | None] = []
        try:
            with ThreadPoolExecutor(threads) as pool:
                works: list[Work] = []
                for owner, stack in enumerate(stacks):
                    ends.append(self._open(owner, stack, pool, works))
                self.progress.begin(
                    f"writing {len(self.artifacts)} artifacts in one sweep, counting for each",
                    sum(w.end - w.begin for w in works),
                )
                self._sweep(pool, works)
                for owner, end in enumerate(ends):
                    if end is not None and owner not in self.errors:
                        self._finish(owner, end, pool)
        except BaseException as error:
            for stack in stacks:
                with suppress(Qwen35Error):  # the first error is the one to tell
                    stack.__exit__(type(error), error, error.__traceback__)
            raise
        for owner, stack in enumerate(stacks):
            self._close(owner, stack)

    def _open(
        self, owner: int, stack: ExitStack, pool: Executor, works: list[Work]
    ) -> Conversion | Writing | None:
        """Open an output and add what is to be done for it."""
        artifact = self.artifacts[owner]
        plan, out = artifact.plan, artifact.out
        part = _Part(self.progress)
        try:
            with os_errors(out):
                if isinstance(plan, GgufPlan):
                    files = stack.enter_context(writing(plan, out, overwrite=True, progress=part))
                    works += _gguf_works(owner, files, files.begin(pool))
                    return files
                conversion = stack.enter_context(
                    converting(plan, out, overwrite=True, device=self.device, progress=part)
                )
                works += [_step_work(owner, conversion, *job) for job in conversion.begin(pool)]
        except Qwen35Error as error:
            self.errors[owner] = error
            return None
        return conversion

    def _sweep(self, pool: Executor, works: Sequence[Work]) -> None:
        largest_first = sorted(groups(works), key=lambda group: -_span(group))
        with Reader(self.artifacts[0].plan.checkpoint) as reader:
            futures = [pool.submit(self._group, group, reader) for group in largest_first]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self.stop.set()
                for future in futures:
                    future.cancel()
                wait(futures)  # nobody may write when the files are closed
        for future in futures:
            if not future.cancelled():
                future.result()

    def _group(self, group: Sequence[Work], reader: Reader) -> None:
        advance(group, Window(reader), self._failed, self._stopped)

    def _failed(self, owner: int, error: Qwen35Error) -> None:
        with self.lock:
            self.errors.setdefault(owner, error)

    def _stopped(self, owner: int) -> bool:
        return self.stop.is_set() or owner in self.errors

    def _finish(self, owner: int, end: Conversion | Writing, pool: Executor) -> None:
        try:
            with os_errors(self.artifacts[owner].out):
                end.finish(pool)
        except Qwen35Error as error:
            self._failed(owner, error)

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


def _span(group: Sequence[Work]) -> int:
    return max(work.end for work in group) - min(work.begin for work in group)


def _step_work(
    owner: int, conversion: Conversion, step: Step, planned: PlannedFile, file: TensorFile
) -> Work:
    def run(reader: Reader) -> Iterator[int]:
        with os_errors(conversion.out):
            yield from conversion.pieces(step, planned, file, reader)

    return _work(owner, step.weight, run)


def _gguf_works(owner: int, files: Writing, jobs: Sequence[Job]) -> Iterator[Work]:
    """Yield the works of tensors: one for each weight that a tensor has rows of."""
    for job in jobs:
        parts: dict[Weight, list[Strip]] = {}
        for strip in strips(job.tensor):
            parts.setdefault(strip.tensor.slabs[strip.slab].item.weight, []).append(strip)
        for weight, members in parts.items():
            yield _strips_work(owner, files, job, weight, members)


def _strips_work(
    owner: int, files: Writing, job: Job, weight: Weight, members: Sequence[Strip]
) -> Work:
    def run(reader: Reader) -> Iterator[int]:
        with os_errors(files.out):
            for strip in members:
                files.strip(job, strip, reader)
                numel = strip.tensor.slabs[strip.slab].item.spec.numel
                yield main.begin + main.spec.nbytes * source_end(strip) // numel

    main = weight.main
    return _work(owner, weight, run)


def _work(owner: int, weight: Weight, run: Callable[[Reader], Iterator[int]]) -> Work:
    main = weight.main
    return Work(owner, main.file, main.begin, main.begin + main.spec.nbytes, run)


class _Part:
    """The progress of one artifact, which is a part of the sweep's."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def begin(self, title: str, nbytes: int) -> None:
        """Ignore it: the sweep has begun."""

    def advance(self, nbytes: int, item: str) -> None:
        """Pass it on."""
        self._whole.advance(nbytes, item)

    def end(self) -> None:
        """Ignore it: the sweep goes on."""
