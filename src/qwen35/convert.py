"""The loop: read, encode, write. Carries out a plan tensor by tensor, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from qwen35.codecs.nf4 import BLOCK
from qwen35.codecs.nf4_arrays import Statistics, encode_blocks
from qwen35.errors import UsageError
from qwen35.plan.manifest import manifest_bytes, manifest_size
from qwen35.plan.plan import Plan, PlannedFile, Step
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import TensorFile, write_file
from qwen35.sinks.staging import check_output, check_space, staging
from qwen35.strips import decoded, not_finite, stored
from qwen35.threads import default_threads

__all__ = ["Encoder", "Result", "check_before", "convert", "encoder_for"]

Array = npt.NDArray[Any]
Encoder = Callable[[Array, str, npt.NDArray[np.float32], npt.NDArray[np.uint8]], bool]
"""Quantizes blocks of (values, dtype) into (absmax, packed); says whether all were finite."""


@dataclass(frozen=True)
class Result:
    """What was written.

    Args:
        out: the folder.
        hashes: SHA-256 of every file but the manifest, by name.
        nbytes: bytes of all files.
    """

    out: Path
    hashes: dict[str, str]
    nbytes: int


def encoder_for(device: str) -> Encoder:
    """Return the NF4 encoder for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` is the CPU: its kernel is faster than disks are, and needs no torch.

    Raises:
        UsageError: the device is unknown or not there.
    """
    if device in ("auto", "cpu"):
        return encode_blocks
    if device != "cuda" and not device.startswith("cuda:"):
        raise UsageError(f"--device {device}", "unknown", expected="auto, cpu, cuda or cuda:N")
    from qwen35.codecs.nf4_torch import TorchEncoder

    return TorchEncoder(device)


def check_before(out: Path, *, overwrite: bool, device: str) -> None:
    """Check what can be checked before the source is downloaded.

    Raises:
        OutputError: the output exists.
        UsageError: there is no such device.
    """
    check_output(out, source=None, overwrite=overwrite)
    encoder_for(device)


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

    The folder appears whole: everything is prepared beside it, flushed and hashed, and renamed.
    Memory is a few pieces of 8 MB a thread, whatever the size of the model.

    Raises:
        OutputError: the output exists or overlaps the source, or the disk is full.
        TensorError: a weight cannot be read, or holds NaN or infinity.
    """
    source = plan.checkpoint.folder()
    place = Folder(source)
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    encoder = encoder_for(device)
    check_space(out.absolute().parent, plan.nbytes + manifest_size(plan))
    progress = progress or Silent()
    progress.begin(f"writing {out.name}", plan.read_bytes)
    try:
        with staging(out, overwrite=overwrite) as folder, Reader(plan.checkpoint) as reader:
            hashes = _Run(plan, folder, reader, encoder, progress).weights(threads)
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

    plan: Plan
    folder: Path
    reader: Reader
    encoder: Encoder
    progress: Progress

    def weights(self, threads: int | None) -> dict[str, str]:
        """Write the safetensors files; a file is flushed and hashed while the next is filled."""
        stop = Event()
        finishing: dict[str, Future[str]] = {}
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            try:
                for planned in self.plan.files:
                    file = TensorFile(
                        self.folder / planned.name, planned.head, planned.offsets, planned.nbytes
                    )
                    try:
                        self._fill(pool, planned, file, stop)
                    except BaseException:
                        file.close()
                        raise
                    finishing[planned.name] = pool.submit(file.finish)
                return {name: future.result() for name, future in finishing.items()}
            finally:
                stop.set()

    def _fill(
        self, pool: ThreadPoolExecutor, planned: PlannedFile, file: TensorFile, stop: Event
    ) -> None:
        largest_first = sorted(planned.steps, key=lambda step: -step.weight.nbytes)
        futures = [pool.submit(self._step, step, file, stop) for step in largest_first]
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

    def _step(self, step: Step, file: TensorFile, stop: Event) -> None:
        if stop.is_set():
            return
        if step.op == "nf4":
            self._encode(step, file, stop)
        elif step.op == "decode":
            pieces = decoded(self.reader, step.weight, step.spec)
            self._write(step.outputs[0].name, pieces, file, stop)
        else:
            for part, out in zip(step.weight.parts, step.outputs, strict=True):
                self._write(out.name, stored(self.reader, part), file, stop)
        self.progress.advance(step.weight.nbytes, step.weight.name)

    def _write(self, name: str, pieces: Iterable[Array], file: TensorFile, stop: Event) -> None:
        position = 0
        for piece in pieces:
            if stop.is_set():
                return
            file.write(name, position, piece.data.cast("B"))
            position += piece.nbytes

    def _encode(self, step: Step, file: TensorFile, stop: Event) -> None:
        packed_spec, *others = step.outputs
        absmax = np.empty(step.spec.numel // BLOCK, np.float32)
        done = 0
        for piece in decoded(self.reader, step.weight, step.spec):
            if stop.is_set():
                return
            packed = np.empty(piece.size // 2, np.uint8)
            blocks = absmax[done // BLOCK : (done + piece.size) // BLOCK]
            if not self.encoder(piece, step.spec.dtype, blocks, packed):
                raise not_finite(step.weight.name)
            file.write(packed_spec.name, done // 2, packed.data)
            done += piece.size
        renamed = type(step.spec)(packed_spec.name, step.spec.dtype, step.spec.shape)
        parts = Statistics.of(absmax).parts(renamed)
        for out, part in zip(others, parts, strict=True):
            file.write(out.name, 0, part.data.cast("B"))
