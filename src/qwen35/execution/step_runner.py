"""Run steps: read rows, encode them for every target and write, in pieces of bounded size."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from threading import Condition, Event
from typing import TYPE_CHECKING

from qwen35.checkpoint.source import FolderReader
from qwen35.codecs import pieces
from qwen35.codecs.codec import Encoding, EncodingRequest, Refine
from qwen35.codecs.devices import Kernels
from qwen35.codecs.pieces import stored
from qwen35.codecs.registry import CODECS, codec_of
from qwen35.errors import Qwen35Error
from qwen35.execution.refiners import Guard, Refiners, Written
from qwen35.execution.survey import Survey
from qwen35.execution.window import RangeReader, advance, groups
from qwen35.planning.output_plan import Plan
from qwen35.planning.rows import RowSpan
from qwen35.planning.step import Step, StepTarget
from qwen35.tensors import TensorSpec

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = ["StepRunner", "ThreadCrew", "Write"]

Write = Callable[[StepTarget, str, int, memoryview], None]
"""Writes to a target's files: tensor, offset in bytes, data."""

_SPAN = 32
"""Pieces per span, the part of a weight that one thread encodes."""


@dataclass
class _HeldBack:
    """What a span writes of a target, until its codes are judged.

    Args:
        guard: that refines and judges them.
        slab: the number of the matrix at hand.
        written: what is to be written, with the numbers of matrices.
    """

    guard: Guard
    slab: int = 0
    written: list[tuple[int, Written]] = field(default_factory=list)


@dataclass(frozen=True)
class StepRunner:
    """Runs the steps of a plan.

    Args:
        plan: the plan.
        kernels: one set per device.
    """

    plan: Plan
    kernels: tuple[Kernels, ...]
    survey: Survey = field(default_factory=Survey)
    refiners: Refiners = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "refiners", Refiners(self.plan))

    def spans(self, step: Step) -> list[RowSpan]:
        """Cut a step that is about to run into independent spans, for several threads."""
        self.refiners.begin(step, self._kernels(step).refining)
        rows = step.rows
        # others stay whole: NF4, say, quantizes the scales of a weight together at the end
        codecs = [codec_of(step.weight), *(CODECS[target.codec] for target in step.targets)]
        if any(target.copied for target in step.targets) or not all(c.independent for c in codecs):
            return [rows.whole_span]
        return list(rows.spans(self._grain(step), _SPAN * pieces.PIECE))

    def _kernels(self, step: Step) -> Kernels:
        """Return those of the device of a step."""
        # not hash(), which differs between processes: every run uses the same device
        return self.kernels[zlib.crc32(step.weight.name.encode()) % len(self.kernels)]

    def _grain(self, step: Step) -> int:
        return max(CODECS[target.codec].grain(step.spec) for target in step.targets)

    def run(self, step: Step, span: RowSpan, write: Write, reader: FolderReader) -> Iterator[int]:
        """Run a span; yield the position in its source file after each piece.

        Raises:
            TensorError: a weight cannot be read, holds NaN or infinity, or values that a codec
                cannot encode.
        """
        if step.targets[0].copied:
            yield from self._copy(step, step.targets[0], write, reader)
            return
        held = {
            t: _HeldBack(g) for t in step.targets if (g := self.refiners.of(step, t)) is not None
        }
        yield from self._encode(step, span, write, reader, held)
        for target, one in held.items():
            for verdict in one.guard.finished(span, one.written):
                if verdict.held is None:
                    whole = RowSpan(range(verdict.slab, verdict.slab + 1), 0, step.rows.count)
                    alone = replace(step, targets=(target,))
                    again = self._encode(alone, whole, write, reader, {}, verdict.refine)
                    deque(again, maxlen=0)
                else:
                    for name, offset, data in verdict.held:
                        write(target, name, offset, memoryview(data))

    def _encode(
        self,
        step: Step,
        span: RowSpan,
        write: Write,
        reader: FolderReader,
        held: Mapping[StepTarget, _HeldBack],
        refine: Refine | None = None,
    ) -> Iterator[int]:
        """Encode a span; what is `held` is refined, and not written yet; the rest by `refine`."""
        check = not all(CODECS[target.codec].checks for target in step.targets)
        opened = step.rows.open(reader, check=check)
        largest = self.survey.of(step, reader)
        encodings = [
            self._encoding(step, target, write, largest, held.get(target), refine)
            for target in step.targets
        ]
        importance, slab = None, -1
        size = self._kernels(step).refining.pieces if held or refine else 1
        for chunk in step.rows.chunks(self._grain(step), span, size):
            if chunk.slab != slab:
                slab = chunk.slab
                importance = self.plan.options.importance(step, slab)
                for one in held.values():
                    one.slab = slab
            piece = opened.piece(chunk, importance)
            for encoding in encodings:
                encoding.add(piece)
            yield step.rows.end_of(chunk)
        for encoding in encodings:
            encoding.finish()

    def _encoding(
        self,
        step: Step,
        target: StepTarget,
        write: Write,
        largest: F32 | None,
        held: _HeldBack | None,
        refine: Refine | None,
    ) -> Encoding:
        def to_target(name: str, offset: int, data: memoryview) -> None:
            if held is not None:
                held.written.append((held.slab, (name, offset, bytes(data))))
            else:
                write(target, name, offset, data)

        spec = TensorSpec(target.name, step.spec.dtype, step.rows.shape)
        codec = CODECS[target.codec]
        search = held.guard.search if held is not None and held.guard.searches else None
        if held is not None and search is None:
            refine = held.guard.refine
        return codec.encode(
            EncodingRequest(
                step.weight.name,
                spec,
                target.outputs,
                to_target,
                self.plan.settings,
                self._kernels(step).of(target.codec),
                self.plan.options.encoder,
                largest,
                self.plan.options.input_largest(step) if codec.quantized_inputs else None,
                refine,
                search,
            )
        )

    @staticmethod
    def _copy(step: Step, target: StepTarget, write: Write, reader: FolderReader) -> Iterator[int]:
        weight = step.weight
        codec_of(weight).check(reader, weight)
        main, behind = weight.main, weight.main.begin + weight.main.spec.nbytes
        for part, out in zip(weight.parts, target.outputs, strict=True):
            done = 0
            for piece in stored(reader, part):
                write(target, out.name, done, piece.data.cast("B"))
                done += piece.nbytes
                yield main.begin + done if part is main else behind


class ThreadCrew:
    """Threads that run groups of range readers, and urgent jobs before the next group.

    Args:
        readers: the range readers.
        failed: called with the owner of a reader that raised a `Qwen35Error`, and the error.
        stopped: returns whether to skip an owner's readers.
    """

    def __init__(
        self,
        readers: Sequence[RangeReader],
        failed: Callable[[int, Qwen35Error], None],
        stopped: Callable[[int], bool],
    ) -> None:
        # in the order of the output, so that hashing follows close behind; where it does not
        # matter, the largest groups first, so that no thread is left with one at the end
        ordered = sorted(groups(readers), key=lambda g: (min(r.rank for r in g), -_span(g)))
        self._groups = deque(ordered)
        self._urgent: deque[Callable[[], None]] = deque()
        self._failed, self._owner_stopped = failed, stopped
        self._changed = Condition()
        self._busy = 0
        self._stop = Event()

    def soon(self, job: Callable[[], None]) -> None:
        """Queue a job that a thread runs before it takes another group."""
        with self._changed:
            self._urgent.append(job)
            self._changed.notify()

    def run(self, pool: ThreadPoolExecutor, threads: int, reader: FolderReader) -> None:
        """Run everything; an exception other than `Qwen35Error` stops all threads.

        They stop after their current piece. No thread is running when this returns.
        """
        futures = [pool.submit(self._thread, reader) for _ in range(threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(future.done() and future.exception() for future in futures) or not all(
                future.done() for future in futures
            ):
                self._stop.set()
            wait(futures)
        for future in futures:
            future.result()

    def _thread(self, reader: FolderReader) -> None:
        while (job := self._next(reader)) is not None:
            try:
                job()
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _next(self, reader: FolderReader) -> Callable[[], None] | None:
        """Return a thread's next job; wait while busy threads may still queue urgent ones."""
        with self._changed:
            while not self._stop.is_set():
                if self._urgent:
                    self._busy += 1
                    return self._urgent.popleft()
                if self._groups:
                    self._busy += 1
                    group = self._groups.popleft()
                    return lambda: advance(group, reader, self._failed, self._stopped)
                if not self._busy:
                    break
                self._changed.wait()
        return None

    def _stopped(self, owner: int) -> bool:
        return self._stop.is_set() or self._owner_stopped(owner)


def _span(group: Sequence[RangeReader]) -> int:
    return max(reader.end for reader in group) - min(reader.begin for reader in group)
