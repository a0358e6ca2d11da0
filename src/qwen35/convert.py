"""The loop: read, encode, write. Carries out a plan tensor by tensor, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
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

__all__ = ["Result", "check_before", "convert"]

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
    source = plan.checkpoint.folder()
    place = Folder(source)
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    encoders = encoders_for(device)
    progress = progress or Silent()
    key = work_key(plan.digest, plan.checkpoint)
    try:
        with (
            resumable(out, key, overwrite=overwrite) as (folder, journal),
            Reader(plan.checkpoint) as reader,
        ):
            check_space(folder, plan.nbytes + manifest_size(plan), keeping=folder)
            with Written(folder, journal) as written:
                hashes = _Run(out.name, plan, written, reader, encoders, progress).weights(threads)
            for name, content in plan.documents.items():
                hashes[name] = write_file(folder / name, content)
            for name, size in plan.copied.items():
                hashes[name] = write_file(folder / name, place.read(name, 0, size))
            manifest = manifest_bytes(plan, hashes)
            write_file(folder / MANIFEST_NAME, manifest)
    finally:
        progress.end()
    return Result(out, hashes, plan.nbytes + len(manifest))


@dataclass(frozen=True)
class _Run:
    """One execution: everything its steps share."""

    name: str
    plan: Plan
    written: Written
    reader: Reader
    encoders: tuple[Encoders, ...]
    progress: Progress

    def weights(self, threads: int | None) -> dict[str, str]:
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
        return {name: digest for name, digest in hashes.items() if digest is not None}

    def _finished(self, pool: ThreadPoolExecutor) -> dict[str, str | None]:
        """Return the SHA-256 of the files that an earlier run finished, None for the others."""
        names, sizes = zip(*((file.name, file.nbytes) for file in self.plan.files), strict=True)
        return dict(zip(names, pool.map(self.written.hash_of, names, sizes), strict=True))

    def _begin(self, left: Sequence[PlannedFile]) -> None:
        nbytes = sum(step.weight.nbytes for file in left for step in self._steps(file))
        verb = "writing" if nbytes == self.plan.read_bytes else "continuing"
        self.progress.begin(f"{verb} {self.name}", nbytes)

    def _steps(self, planned: PlannedFile) -> list[Step]:
        """Return the steps of a file that are still to be done."""
        return [s for s in planned.steps if not self.written.has(planned.name, s.outputs[0].name)]

    def _fill(self, pool: ThreadPoolExecutor, planned: PlannedFile, stop: Event) -> None:
        file = self.written.open(planned.name, planned.head, planned.offsets, planned.nbytes)
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
        encoders = self.encoders[zlib.crc32(step.weight.name.encode()) % len(self.encoders)]
        if step.op == "nf4":
            self._nf4(step, file, stop, encoders)
        elif step.op == "fp8":
            self._fp8(step, file, stop, encoders)
        elif step.op == "decode":
            pieces = decoded(self.reader, step.weight, step.spec)
            self._write(step.outputs[0].name, pieces, file, stop)
        else:
            if step.weight.storage == "fp8":
                fp8_scales(self.reader, step.weight)  # refuses what is no scale
            for part, out in zip(step.weight.parts, step.outputs, strict=True):
                self._write(out.name, stored(self.reader, part), file, stop)
        if stop.is_set():  # perhaps in the middle of it
            return
        self.written.done(step.outputs[0].name, [planned.name])
        self.progress.advance(step.weight.nbytes, step.weight.name)

    def _write(self, name: str, pieces: Iterable[Array], file: TensorFile, stop: Event) -> None:
        position = 0
        for piece in pieces:
            if stop.is_set():
                return
            file.write(name, position, piece.data.cast("B"))
            position += piece.nbytes

    def _fp8(self, step: Step, file: TensorFile, stop: Event, encoders: Encoders) -> None:
        codes_spec, scales_spec = step.outputs
        calibration, columns = self.plan.calibration, step.spec.shape[1]
        assert calibration is not None  # the plan has FP8 steps
        weights = self.plan.activations.of(step.role) if self.plan.activations else None
        done = 0
        for piece in decoded(self.reader, step.weight, step.spec, strip=tile_rows(step.spec)):
            if stop.is_set():
                return
            values = piece.reshape(-1, columns)
            codes = np.empty(values.shape, np.uint8)
            scales = np.empty((len(values) // FP8_BLOCK, columns // FP8_BLOCK), np.uint16)
            if not encoders.fp8(values, step.spec.dtype, calibration, weights, codes, scales):
                raise not_finite(step.weight.name)
            file.write(codes_spec.name, done, codes.data.cast("B"))
            file.write(scales_spec.name, done // FP8_BLOCK**2 * 2, scales.data.cast("B"))
            done += values.size

    def _nf4(self, step: Step, file: TensorFile, stop: Event, encoders: Encoders) -> None:
        packed_spec, *others = step.outputs
        absmax = np.empty(step.spec.numel // BLOCK, np.float32)
        done = 0
        for piece in decoded(self.reader, step.weight, step.spec):
            if stop.is_set():
                return
            packed = np.empty(piece.size // 2, np.uint8)
            blocks = absmax[done // BLOCK : (done + piece.size) // BLOCK]
            if not encoders.nf4(piece, step.spec.dtype, blocks, packed):
                raise not_finite(step.weight.name)
            file.write(packed_spec.name, done // 2, packed.data)
            done += piece.size
        renamed = type(step.spec)(packed_spec.name, step.spec.dtype, step.spec.shape)
        parts = Statistics.of(absmax).parts(renamed)
        for out, part in zip(others, parts, strict=True):
            file.write(out.name, 0, part.data.cast("B"))
