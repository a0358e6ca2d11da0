"""One pass over the chunks: run the base once, compare every candidate, keep no logits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen35.array_types import F64
from qwen35.display import counted
from qwen35.errors import InputError
from qwen35.evaluation.cache import CacheFile, CacheWriter
from qwen35.evaluation.divergence import Series
from qwen35.evaluation.evaluation_job import EvaluationJob
from qwen35.evaluation.kld_file import KldFile, KldWriter, kld_file_size
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.records import RecordFile, check_kind
from qwen35.evaluation.reference import ChunkComparison, ExactReference, Reference
from qwen35.evaluation.runners import LogitsRunner, loaded_models
from qwen35.evaluation.served_candidate import ServedCandidate
from qwen35.evaluation.streamed_models import streamed_models, streaming_folder
from qwen35.progress import Progress, Silent
from qwen35.sinks.staging import check_space, locked, os_errors
from qwen35.sinks.work_folder import open_ours
from qwen35.version import __version__

__all__ = ["check_state", "sweep"]


_MAGIC = "qwen35 evaluation 1"
_BASE_ROWS, _MODEL_ROWS = 2, 4


_Runner = LogitsRunner | ServedCandidate
_Runners = Callable[[EvaluatedModel], LogitsRunner]


class _Writer(Protocol):
    def resume(self, done: int) -> int: ...
    def add(self, reference: ExactReference) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class _Source(Protocol):
    def chunk(self, index: int) -> Reference: ...
    def close(self) -> None: ...


class _Running:
    """The base, run chunk by chunk."""

    def __init__(self, job: EvaluationJob, runner: LogitsRunner) -> None:
        self._job, self._runner = job, runner

    def chunk(self, index: int) -> Reference:
        chunks = self._job.chunks
        logits = self._runner.logits(chunks, index)
        reference = ExactReference(logits, chunks.targets(index), self._job.threads)
        _check(self._job.base, index, reference.nll)
        return reference

    def close(self) -> None:
        """Leave the runner open: it is shared."""


class _Results:
    """The results of each chunk, optionally also in a file so that a run can resume.

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
        rows, scored = self._shape
        if len(data) != 8 * rows * scored:
            raise InputError(str(self._path), "a record of the wrong length", hint="delete it")
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
    """Return everything that must be equal for a run to resume an earlier one."""
    reference = job.reference_file
    made = [job.base.name, "made"]  # written anew by each run: its files have new times
    given = (*job.candidates, *job.simulations)
    return {
        "version": __version__,
        "tokens": job.chunks.sha256,
        "context": job.chunks.context,
        "base": job.base.identity(),
        "models": [made if job.floor_to_make and m not in given else m.identity() for m in models],
        "reference": (
            [reference.name, reference.stat().st_size, reference.stat().st_mtime_ns]
            if reference
            else []
        ),
        "device": job.request.device,
    }


def check_state(path: Path) -> None:
    """Check, before any work, that results may be kept in a file.

    Raises:
        InputError: it is of another kind.
        OutputError: it is a link, pipe, folder or device.
    """
    with os_errors(path):
        if not os.path.lexists(path):
            return
        with os.fdopen(open_ours(path, os.O_RDONLY), "rb") as file:
            check_kind(file, path, f"{_MAGIC}\n".encode())


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
        job: the prepared evaluation.
        models: compared with the base.
        device: for transformers.
        state: file that keeps results until the sweep ends, so that it can resume.
        progress: receives chunks.

    Returns:
        The base's series and one for each model.

    Raises:
        InputError: a model does not run, or computes NaN.
        OutputError: a file cannot be written, or another run is writing it.
    """
    progress = progress or Silent()
    with ExitStack() as stack:
        # Locks first: two runs appending to one file would corrupt it.
        for path in filter(None, (state, *job.writes)):
            with os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path))
        results = stack.enter_context(closing(_Results(job, models, state)))
        writers = list(_writers(job, stack))
        # Resume at the first chunk that any file lacks: a crash may leave them uneven.
        done = min(len(results.parts), job.chunks.count)
        for writer in writers:
            done = min(done, writer.resume(done))
        results.cut(done)
        resumed = f", {counted(done, 'chunk')} already measured" if done else ""
        runners = stack.enter_context(ExitStack())
        if done < job.chunks.count:
            runner = _runners(job, models, device, state, progress, runners)
        progress.begin(f"evaluating{resumed}", job.chunks.count - done)
        try:
            if done < job.chunks.count:
                _run(job, models, runner, results, writers, progress)
        finally:
            progress.end()
        runners.close()
        with os_errors(job.request.kld_file or job.request.cache or Path()):
            for writer in writers:
                writer.finish()
        values = np.stack(results.parts)
        results.remove()
        if state is not None and job.stream is not None:
            shutil.rmtree(streaming_folder(state), ignore_errors=True)
    return _series(values, len(models))


def _runners(
    job: EvaluationJob,
    models: Sequence[EvaluatedModel],
    device: str,
    state: Path | None,
    progress: Progress,
    stack: ExitStack,
) -> _Runners:
    """Return what runs each model; streamed ones have gone through their layers."""
    if job.stream is None:
        context, threads = job.chunks.context, job.threads
        return loaded_models(stack, context=context, threads=threads, device=device)
    here = (model for model in models if model.engine != "server")
    running = [*([] if job.reference_file else [job.base]), *here]
    streamed = streamed_models(job.stream, running, job.chunks, device, state, progress)
    return stack.enter_context(streamed)


def _run(
    job: EvaluationJob,
    models: Sequence[EvaluatedModel],
    runner: _Runners,
    results: _Results,
    writers: Sequence[_Writer],
    progress: Progress,
) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(closing(_source(job, runner)))
        served: dict[Path, ServedCandidate] = {}
        for target in job.served:
            candidate = ServedCandidate(target, job.decode)
            served[target.model.path] = stack.enter_context(closing(candidate))
        for model in models:
            if model.path not in served:
                runner(model)  # all are loaded before anything is measured
        for index in range(len(results.parts), job.chunks.count):
            reference = source.chunk(index)
            rows: list[Any] = [reference.nll, reference.top]
            for model in models:
                asked = served.get(model.path) or runner(model)
                rows += _compare(job, model, asked, reference, index)
            # Writers before results: a chunk listed in the results is in every file.
            with os_errors(job.request.kld_file or job.request.cache or Path()):
                for writer in writers:
                    assert isinstance(reference, ExactReference)  # writers imply a running base
                    writer.add(reference)
                results.add(np.stack([np.asarray(row, np.float64) for row in rows]))
            progress.advance(1, f"chunk {index + 1}")


def _compare(
    job: EvaluationJob,
    model: EvaluatedModel,
    runner: _Runner,
    reference: Reference,
    index: int,
) -> Iterator[F64]:
    result = _compared(job, model, runner, reference, index)
    yield result.kld
    yield result.nll
    yield result.top.astype(np.float64)
    yield result.kld * 0 if result.bound is None else result.bound


def _compared(
    job: EvaluationJob,
    model: EvaluatedModel,
    runner: _Runner,
    reference: Reference,
    index: int,
) -> ChunkComparison:
    chunks = job.chunks
    if isinstance(runner, ServedCandidate):
        return runner.compare(reference, chunks, index)
    logits = runner.logits(chunks, index, simulated=model.simulated)
    result = reference.against(logits, chunks.targets(index), job.threads)
    _check(model, index, result.nll + result.kld)
    return result


def _check(model: EvaluatedModel, index: int, values: F64) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            model.name,
            f"computes NaN or infinity in chunk {index + 1}",
            hint="qwen35 verify --depth numbers it first",
        )


def _source(job: EvaluationJob, runner: _Runners) -> _Source:
    path = job.reference_file
    if path is None:
        return _Running(job, runner(job.base))
    if path == job.request.kld_file:
        return KldFile(path)
    return CacheFile(path, job.chunks, job.base.width, job.base.effects())


def _writers(job: EvaluationJob, stack: ExitStack) -> Iterator[_Writer]:
    if job.reference_file is not None:
        return
    cached = partial(CacheWriter, adapters=job.base.effects())
    for path, kind in ((job.request.kld_file, KldWriter), (job.request.cache, cached)):
        if path is None:
            continue
        with os_errors(path):
            if kind is KldWriter:  # 126.6 MB per chunk at a vocabulary of 248,320
                check_space(path.parent, kld_file_size(job.chunks, job.base.width))
            yield stack.enter_context(closing(kind(path, job.chunks, job.base.width)))


def _series(values: F64, count: int) -> tuple[Series, list[Series]]:
    """Split values, [chunks, 2 + 4 * count, scored], by model."""
    base = Series(values[:, 0], values[:, 1].astype(np.int64))
    models = []
    for i in range(count):
        kld, nll, top, bound = (values[:, _BASE_ROWS + _MODEL_ROWS * i + j] for j in range(4))
        models.append(Series(nll, top.astype(np.int64), kld, bound if bound.any() else None))
    return base, models
