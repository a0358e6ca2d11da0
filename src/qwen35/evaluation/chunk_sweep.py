"""One pass over the chunks: the base once, every candidate against it, nothing of it kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen35.array_types import F64
from qwen35.errors import InputError
from qwen35.evaluation.cache import CacheFile, CacheWriter
from qwen35.evaluation.divergence import Series
from qwen35.evaluation.evaluation_job import EvaluationJob
from qwen35.evaluation.kld_file import KldFile, KldWriter, kld_file_size
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.records import RecordFile
from qwen35.evaluation.reference import ExactReference, Reference
from qwen35.evaluation.runners import LogitsRunner, runner_of
from qwen35.progress import Progress, Silent
from qwen35.sinks.staging import check_space, locked, os_errors
from qwen35.version import __version__

__all__ = ["sweep"]


_MAGIC = "qwen35 evaluation 1"
_BASE_ROWS, _MODEL_ROWS = 2, 4


class _Writer(Protocol):
    def resume(self, done: int) -> int: ...
    def add(self, reference: ExactReference) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class _Source(Protocol):
    def chunk(self, index: int) -> Reference: ...
    def close(self) -> None: ...


class _Running:
    """The base, run."""

    def __init__(self, job: EvaluationJob, device: str) -> None:
        self._job = job
        options = {"threads": job.threads, "device": device}
        self._runner = runner_of(job.base, context=job.chunks.context, **options)  # type: ignore[arg-type]

    def chunk(self, index: int) -> Reference:
        chunks = self._job.chunks
        logits = self._runner.logits(chunks.inputs(index), chunks.first)
        reference = ExactReference(logits, chunks.targets(index), self._job.threads)
        _check(self._job.base, index, reference.nll)
        return reference

    def close(self) -> None:
        self._runner.close()


class _Results:
    """What was measured, chunk by chunk; in a file too, if it is to outlive an interruption.

    A chunk is [2 + 4 * models, scored] float64: negative log probability and most likely token of
    the base, then divergence, negative log probability, most likely token and bound of each model.
    """

    def __init__(
        self, job: EvaluationJob, models: Sequence[EvaluatedModel], path: Path | None
    ) -> None:
        self._shape = (_BASE_ROWS + _MODEL_ROWS * len(models), job.chunks.scored)
        self._path = path
        self.parts: list[F64] = []
        self._records: RecordFile | None = None
        if path is not None:
            self._records = RecordFile(path, _MAGIC, _identity(job, models))
            self.parts = [self._part(self._records.read(i)) for i in range(self._records.count)]

    def _part(self, data: bytes) -> F64:
        return np.frombuffer(data, "<f8").reshape(self._shape)

    def cut(self, count: int) -> None:
        del self.parts[count:]
        if self._records is not None:
            self._records.cut(count)

    def add(self, part: F64) -> None:
        self.parts.append(part)
        if self._records is not None:
            self._records.append(part.astype("<f8").tobytes())

    def close(self) -> None:
        if self._records is not None:
            self._records.close()

    def remove(self) -> None:
        self.close()
        if self._path is not None:
            self._path.unlink()


def _identity(job: EvaluationJob, models: Sequence[EvaluatedModel]) -> dict[str, Any]:
    """Return what must be the same for a run to go on where an earlier one was."""
    reads = job.reads_base
    made = [job.base.name, "made"]
    return {
        "version": __version__,
        "tokens": job.chunks.sha256,
        "context": job.chunks.context,
        "base": job.base.identity(),
        "models": [
            made if job.floor_to_make and m not in job.candidates else m.identity() for m in models
        ],
        "reference": [reads.name, reads.stat().st_size, reads.stat().st_mtime_ns] if reads else [],
        "device": job.asked.device,
    }


def sweep(
    job: EvaluationJob,
    models: Sequence[EvaluatedModel],
    *,
    device: str,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Series, list[Series]]:
    """Measure the base and `models` on all chunks.

    Args:
        job: what was prepared.
        models: what is compared with the base.
        device: for transformers.
        state: where what is measured is kept until the sweep is over, to go on after an
            interruption.
        progress: told of the chunks.

    Returns:
        The base's series and one for each model.

    Raises:
        InputError: a model does not run, or computes NaN.
        OutputError: a file cannot be written, or another run is writing it.
    """
    watched = progress or Silent()
    with ExitStack() as stack:
        for path in filter(None, (state, *job.writes)):
            with os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path))
        results = stack.enter_context(closing(_Results(job, models, state)))
        writers = list(_writers(job, stack))
        done = len(results.parts)
        for writer in writers:
            done = min(done, writer.resume(done))
        results.cut(done)
        before = f", {done} chunks were measured before" if done else ""
        watched.begin(f"evaluating{before}", job.chunks.count - done)
        try:
            if done < job.chunks.count:
                _run(job, models, device, results, writers, watched)
        finally:
            watched.end()
        with os_errors(job.asked.kld_file or job.asked.cache or Path()):
            for writer in writers:
                writer.finish()
        found = np.stack(results.parts)
        results.remove()
    return _series(found, len(models))


def _run(
    job: EvaluationJob,
    models: Sequence[EvaluatedModel],
    device: str,
    results: _Results,
    writers: Sequence[_Writer],
    progress: Progress,
) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(closing(_source(job, device)))
        runners: list[LogitsRunner] = []
        for model in models:
            context = job.chunks.context
            runner = runner_of(model, context=context, threads=job.threads, device=device)
            runners.append(stack.enter_context(closing(runner)))
        for index in range(len(results.parts), job.chunks.count):
            reference = source.chunk(index)
            rows: list[Any] = [reference.nll, reference.top]
            for model, runner in zip(models, runners, strict=True):
                rows += _compare(job, model, runner, reference, index)
            with os_errors(job.asked.kld_file or job.asked.cache or Path()):
                for writer in writers:
                    assert isinstance(reference, ExactReference)
                    writer.add(reference)
                results.add(np.stack([np.asarray(row, np.float64) for row in rows]))
            progress.advance(1, f"chunk {index + 1}")


def _compare(
    job: EvaluationJob,
    model: EvaluatedModel,
    runner: LogitsRunner,
    reference: Reference,
    index: int,
) -> Iterator[F64]:
    chunks = job.chunks
    logits = runner.logits(chunks.inputs(index), chunks.first)
    found = reference.against(logits, chunks.targets(index), job.threads)
    _check(model, index, found.nll + found.kld)
    yield found.kld
    yield found.nll
    yield found.top.astype(np.float64)
    yield found.kld * 0 if found.bound is None else found.bound


def _check(model: EvaluatedModel, index: int, values: F64) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            model.name,
            f"computes NaN or infinity in chunk {index + 1}",
            hint="qwen35 verify --depth numbers it first",
        )


def _source(job: EvaluationJob, device: str) -> _Source:
    path = job.reads_base
    if path is None:
        return _Running(job, device)
    if path == job.asked.kld_file:
        return KldFile(path)
    return CacheFile(path, job.chunks, job.base.width)


def _writers(job: EvaluationJob, stack: ExitStack) -> Iterator[_Writer]:
    if job.reads_base is not None:
        return
    for path, kind in ((job.asked.kld_file, KldWriter), (job.asked.cache, CacheWriter)):
        if path is None:
            continue
        with os_errors(path):
            if kind is KldWriter:
                check_space(path.parent, kld_file_size(job.chunks, job.base.width))
            yield stack.enter_context(closing(kind(path, job.chunks, job.base.width)))


def _series(found: F64, count: int) -> tuple[Series, list[Series]]:
    """found: [chunks, 2 + 4 * count, scored]."""
    base = Series(found[:, 0], found[:, 1].astype(np.int64))
    models = []
    for i in range(count):
        kld, nll, top, bound = (found[:, _BASE_ROWS + _MODEL_ROWS * i + j] for j in range(4))
        models.append(Series(nll, top.astype(np.int64), kld, bound if bound.any() else None))
    return base, models
