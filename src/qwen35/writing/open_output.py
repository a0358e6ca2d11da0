"""An output that is being written: its files, its remaining steps and its finished files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from qwen35.checkpoint.source import FolderReader
from qwen35.execution.step_runner import StepRunner
from qwen35.execution.window import RangeReader
from qwen35.planning.output_plan import Plan, PlannedFile
from qwen35.planning.rows import RowSpan
from qwen35.planning.step import Step, StepTarget
from qwen35.progress import Progress
from qwen35.sinks.checksums import PieceSums
from qwen35.sinks.files import TensorFile
from qwen35.sinks.staging import StagedResult, os_errors
from qwen35.sinks.tensor_writer import TensorWriter, noted

__all__ = ["OpenOutput"]


@dataclass
class OpenOutput:
    """One execution of a plan: the state that its steps share.

    Args:
        out: the final folder.
        plan: the plan to run; replaced by one with the same tensors once all Hessians are known.
        folder: holds the files while they are written.
        written: opens and finishes the files.
        runner: runs the steps.
        progress: receives bytes read.
        filled: called when a file holds all its tensors.

    Attributes:
        hashes: SHA-256 of the finished files.
        compared: weight to the result of its check, where workers checked it.
        result: set at the end.
    """

    out: Path
    plan: Plan
    folder: Path
    written: TensorWriter
    runner: StepRunner
    progress: Progress
    filled: Callable[[str], None] = lambda _: None
    hashes: dict[str, str] = field(default_factory=dict)
    compared: dict[str, Any] = field(default_factory=dict)
    result: StagedResult = field(init=False)

    def __post_init__(self) -> None:
        self._files = {file.name: file for file in self.plan.files}
        self._opened: dict[str, TensorFile] = {}
        self._unfilled: Counter[str] = Counter()
        self._spans: Counter[int] = Counter()
        self._sums = PieceSums()
        self._lock = Lock()

    def find_finished(self, pool: Executor, steps: Sequence[Step]) -> list[PlannedFile]:
        """Check what an earlier run finished of these steps; keep the hashes of whole files.

        Returns:
            The other files.
        """
        pieces: dict[str, dict[str, list[tuple[int, int]]]] = {name: {} for name in self._files}
        for step in steps if self.written.resumes else ():
            for target in step.targets:
                for name in target.files:
                    offsets = self._files[name].offsets
                    parts = [(offsets[out.name], out.nbytes) for out in target.outputs]
                    pieces[name][target.outputs[0].name] = parts

        def check(file: PlannedFile) -> str | None:
            with os_errors(self.out):
                return self.written.check(file.name, file.head, file.nbytes, pieces[file.name])

        files = self.plan.files
        unfinished = []
        for file, digest in zip(files, pool.map(check, files), strict=True):
            if digest is None:
                unfinished.append(file)
            else:
                self.hashes[file.name] = digest
        return unfinished

    def pending(self, steps: Sequence[Step]) -> list[Step]:
        """Return the unfinished steps, each reduced to the files that still lack its tensors."""
        return [step for step in map(self._pending, steps) if step.targets]

    def _pending(self, step: Step) -> Step:
        done = [
            file
            for target in step.targets
            for file in target.files
            if self.written.has(file, target.outputs[0].name)
        ]
        return step.into(set(step.files) - set(done)) if done else step

    def readers(
        self, owner: int, steps: Sequence[Step], later: Sequence[Step] = ()
    ) -> Iterator[RangeReader]:
        """Yield the range readers of steps that `pending` returned.

        Args:
            owner: of the readers.
            steps: to run now.
            later: those that will run after all of these.
        """
        self._unfilled = Counter(file for step in (*steps, *later) for file in step.files)
        numbers = {name: number for number, name in enumerate(self._files)}
        for number, step in enumerate(steps):
            spans = self.runner.spans(step)
            self._spans[number] = len(spans)
            rank = min(
                (numbers[file], self._files[file].offsets[target.outputs[0].name])
                for target in step.targets
                for file in target.files
            )
            for span in spans:
                yield self._reader(owner, number, step, span, rank)

    def _reader(
        self, owner: int, number: int, step: Step, span: RowSpan, rank: tuple[int, int]
    ) -> RangeReader:
        def run(reader: FolderReader) -> Iterator[int]:
            with os_errors(self.out):
                yield from self.runner.run(step, span, self._write, reader)
                self._done(number, step)
            self.progress.advance(step.rows.share(span), step.weight.name)

        return RangeReader(owner, *step.rows.bounds(span), rank, run)

    def _write(self, target: StepTarget, name: str, offset: int, data: memoryview) -> None:
        self._sums.add(target.outputs, target.files, name, offset, data)
        for file in target.files:
            self._open(file).write(name, offset, data)

    def _open(self, name: str) -> TensorFile:
        opened = self._opened.get(name)  # without the lock: every piece of every thread comes here
        if opened is not None:
            return opened
        with self._lock:
            if name not in self._opened:
                file = self._files[name]
                pending = self._unwritten(file)
                opened = self.written.open(name, file.head, file.offsets, file.nbytes, pending)
                self._opened[name] = opened
            return self._opened[name]

    def _unwritten(self, file: PlannedFile) -> Iterator[tuple[int, int]]:
        """Yield the byte ranges of tensors that a file lacks."""
        for step in file.steps:
            for target in step.targets:
                first = target.outputs[0].name
                if file.name in target.files and not self.written.has(file.name, first):
                    for out in target.outputs:
                        begin = file.offsets[out.name]
                        yield begin, begin + out.nbytes

    def _done(self, number: int, step: Step) -> None:
        """Count a finished span; the last one completes the step, and perhaps files."""
        with self._lock:
            self._spans[number] -= 1
            if self._spans[number]:
                return
        for target in step.targets:
            checksum = self._sums.take(target.outputs, target.files)
            digits = self.runner.refiners.take(step, target)
            self.written.done(target.outputs[0].name, target.files, noted(checksum, digits))
        with self._lock:
            self._unfilled.subtract(step.files)
            full = [file for file in step.files if not self._unfilled[file]]
        for file in full:  # outside the lock, since the callback is not ours
            self.filled(file)

    def finish(self, files: Iterable[str]) -> None:
        """Flush and hash files that hold all their tensors."""
        with os_errors(self.out):
            for name in files:
                self._open(name)  # not open yet if an earlier run had filled it
                self.hashes[name] = self.written.finish(name)
