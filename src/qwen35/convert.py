"""The loop: read, encode, write. Carries out a plan tensor by tensor, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.place import Folder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Reader
from qwen35.checkpoint.storage import FP8_BLOCK
from qwen35.codecs.devices import Encoders, encoders_for
from qwen35.codecs.nf4 import BLOCK
from qwen35.codecs.nf4_arrays import Statistics
from qwen35.plan.manifest import manifest_bytes, manifest_size, work_key
from qwen35.plan.plan import Plan, PlannedFile
from qwen35.plan.step import Step
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import TensorFile, write_file
from qwen35.sinks.staging import Result, check_output, check_space, resumable
from qwen35.sinks.written import Written
from qwen35.strips import decoded, fp8_scales, not_finite, stored, tile_rows
from qwen35.threads import default_threads

__all__ = ["Conversion", "Result", "check_before", "convert", "converting"]

Array = npt.NDArray[Any]


def check_before(out: Path, *, overwrite: bool, device: str) -> None:
    """Check what can be checked before the source is downloaded.

    Raises:
        OutputError: the output exists.
        UsageError: there is no such device.
    """
    check_output(out, source=None, overwrite=overwrite)
    encoders_for(device)


def convert(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """Write the output that `plan` describes to the folder `out`.

    The folder appears whole: everything is prepared beside it, flushed and hashed, and renamed. A
    run that is killed or interrupted is continued by the next one of the same plan.
    Memory is a few pieces of 8 MB a thread, whatever the size of the model.

    Raises:
        OutputError: the output exists or overlaps the source, or the disk is full.
        TensorError: a weight cannot be read, or holds NaN or infinity.
    """
    progress = progress or Silent()
    try:
        with converting(plan, out, overwrite=overwrite, device=device, progress=progress) as run:
            run.weights(threads)
    finally:
        progress.end()
    return run.result


@contextmanager
def converting(
    plan: Plan, out: Path, *, overwrite: bool, device: str, progress: Progress
) -> Iterator[Conversion]:
    """Prepare the output of `plan`, let the block fill its weights, and complete it.

    Arguments and errors are those of `convert`.
    """
    source = plan.checkpoint.folder()
    place = Folder(source)
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    encoders = encoders_for(device)
    key = work_key(plan.digest, plan.checkpoint)
    with (
        resumable(out, key, overwrite=overwrite) as (folder, journal),
        Reader(plan.checkpoint) as reader,
    ):
        check_space(folder, plan.nbytes + manifest_size(plan), keeping=folder)
        with Written(folder, journal) as written:
            run = Conversion(out, plan, written, reader, encoders, progress)
            yield run
        hashes = run.hashes
        for name, content in plan.documents.items():
            hashes[name] = write_file(folder / name, content)
        for name, size in plan.copied.items():
            hashes[name] = write_file(folder / name, place.read(name, 0, size))
        manifest = manifest_bytes(plan, hashes)
        write_file(folder / MANIFEST_NAME, manifest)
    run.result = Result(out, hashes, plan.nbytes + len(manifest))


@dataclass
class Conversion:
    """One execution of a plan: everything its steps share.

    Args:
        out: the output.
        plan: what is executed.
        written: its files.
        reader: of the source.
        encoders: one for each device.
        progress: told of the bytes read.

    Attributes:
        hashes: SHA-256 of the finished files.
        result: known at the end.
    """

    out: Path
    plan: Plan
    written: Written
    reader: Reader
    encoders: tuple[Encoders, ...]
    progress: Progress
    hashes: dict[str, str] = field(default_factory=dict)
    result: Result = field(init=False)

    def weights(self, threads: int | None) -> None:
        """Write the safetensors files; a file is flushed and hashed while the next is filled."""
        stop = Event()
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            hashes = self._finished(pool)
            finishing: dict[str, Future[str]] = {}
            left = [file for file in self.plan.files if hashes[file.name] is None]
            self._begin(left)
            try:
                for planned in left:
                    self._fill(pool, planned, stop)
                    finishing[planned.name] = pool.submit(self.written.finish, planned.name)
                for name, future in finishing.items():
                    hashes[name] = future.result()
            finally:
                stop.set()
        self.hashes = {name: digest for name, digest in hashes.items() if digest is not None}

    def begin(self, pool: Executor) -> list[tuple[Step, PlannedFile, TensorFile]]:
        """Open the files that are still to be filled; return the steps that fill them."""
        hashes = self._finished(pool)
        self.hashes = {name: digest for name, digest in hashes.items() if digest is not None}
        left = [file for file in self.plan.files if hashes[file.name] is None]
        opened = [(planned, self._open(planned)) for planned in left]
        return [(step, planned, f) for planned, f in opened for step in self._steps(planned)]

    def finish(self, pool: Executor) -> None:
        """Flush and hash the files that `begin` opened."""
        left = [file.name for file in self.plan.files if file.name not in self.hashes]
        self.hashes |= zip(left, pool.map(self.written.finish, left), strict=True)

    def _finished(self, pool: Executor) -> dict[str, str | None]:
        """Return the SHA-256 of the files that an earlier run finished, None for the others."""
        names, sizes = zip(*((file.name, file.nbytes) for file in self.plan.files), strict=True)
        return dict(zip(names, pool.map(self.written.hash_of, names, sizes), strict=True))

    def _begin(self, left: Sequence[PlannedFile]) -> None:
        nbytes = sum(step.weight.nbytes for file in left for step in self._steps(file))
        verb = "writing" if nbytes == self.plan.read_bytes else "continuing"
        self.progress.begin(f"{verb} {self.out.name}", nbytes)

    def _steps(self, planned: PlannedFile) -> list[Step]:
        """Return the steps of a file that are still to be done."""
        return [s for s in planned.steps if not self.written.has(planned.name, s.outputs[0].name)]

    def _open(self, planned: PlannedFile) -> TensorFile:
        return self.written.open(planned.name, planned.head, planned.offsets, planned.nbytes)

    def _fill(self, pool: ThreadPoolExecutor, planned: PlannedFile, stop: Event) -> None:
        file = self._open(planned)
        largest_first = sorted(self._steps(planned), key=lambda step: -step.weight.nbytes)
        futures = [pool.submit(self._step, step, planned, file, stop) for step in largest_first]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                stop.set()
        except BaseException:
            stop.set()
            raise
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # nobody may write when the file is closed
        for future in futures:
            if not future.cancelled():
                future.result()

    def _step(self, step: Step, planned: PlannedFile, file: TensorFile, stop: Event) -> None:
        if stop.is_set():
            return
        for _ in self.pieces(step, planned, file, self.reader):
            if stop.is_set():  # perhaps in the middle of it
                return

    def pieces(
        self, step: Step, planned: PlannedFile, file: TensorFile, reader: Reader
    ) -> Iterator[int]:
        """Carry out a step; yield after each piece how far into its source file it has read."""
        encoders = self.encoders[zlib.crc32(step.weight.name.encode()) % len(self.encoders)]
        if step.op == "nf4":
            yield from self._nf4(step, file, reader, encoders)
        elif step.op == "fp8":
            yield from self._fp8(step, file, reader, encoders)
        elif step.op == "decode":
            pieces = decoded(reader, step.weight, step.spec)
            for done in _write(step.outputs[0].name, pieces, file):
                yield _reached(step, done // step.spec.itemsize)
        else:
            if step.weight.storage == "fp8":
                fp8_scales(reader, step.weight)  # refuses what is no scale
            for part, out in zip(step.weight.parts, step.outputs, strict=True):
                for done in _write(out.name, stored(reader, part), file):
                    main = part is step.weight.main
                    yield step.weight.main.begin + (done if main else step.weight.main.spec.nbytes)
        self.written.done(step.outputs[0].name, [planned.name])
        self.progress.advance(step.weight.nbytes, step.weight.name)

    def _fp8(
        self, step: Step, file: TensorFile, reader: Reader, encoders: Encoders
    ) -> Iterator[int]:
        codes_spec, scales_spec = step.outputs
        calibration, columns = self.plan.calibration, step.spec.shape[1]
        assert calibration is not None  # the plan has FP8 steps
        statistics = self.plan.activations
        weights = statistics.weights(step.role, calibration.mode) if statistics else None
        done = 0
        for piece in decoded(reader, step.weight, step.spec, strip=tile_rows(step.spec)):
            values = piece.reshape(-1, columns)
            codes = np.empty(values.shape, np.uint8)
            scales = np.empty((len(values) // FP8_BLOCK, columns // FP8_BLOCK), np.uint16)
            if not encoders.fp8(values, step.spec.dtype, calibration, weights, codes, scales):
                raise not_finite(step.weight.name)
            file.write(codes_spec.name, done, codes.data.cast("B"))
            file.write(scales_spec.name, done // FP8_BLOCK**2 * 2, scales.data.cast("B"))
            done += values.size
            yield _reached(step, done)

    def _nf4(
        self, step: Step, file: TensorFile, reader: Reader, encoders: Encoders
    ) -> Iterator[int]:
        packed_spec, *others = step.outputs
        absmax = np.empty(step.spec.numel // BLOCK, np.float32)
        done = 0
        for piece in decoded(reader, step.weight, step.spec):
            packed = np.empty(piece.size // 2, np.uint8)
            blocks = absmax[done // BLOCK : (done + piece.size) // BLOCK]
            if not encoders.nf4(piece, step.spec.dtype, blocks, packed):
                raise not_finite(step.weight.name)
            file.write(packed_spec.name, done // 2, packed.data)
            done += piece.size
            yield _reached(step, done)
        renamed = type(step.spec)(packed_spec.name, step.spec.dtype, step.spec.shape)
        parts = Statistics.of(absmax).parts(renamed)
        for out, part in zip(others, parts, strict=True):
            file.write(out.name, 0, part.data.cast("B"))


def _write(name: str, pieces: Iterable[Array], file: TensorFile) -> Iterator[int]:
    """Write pieces one after the other; yield after each how many bytes are written."""
    position = 0
    for piece in pieces:
        file.write(name, position, piece.data.cast("B"))
        position += piece.nbytes
        yield position


def _reached(step: Step, done: int) -> int:
    """Return how far into the file the first `done` elements of a weight lie."""
    main = step.weight.main
    return main.begin + main.spec.nbytes * done // step.spec.numel
