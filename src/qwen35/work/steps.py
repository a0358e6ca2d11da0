"""Carrying out steps: read, encode, write, in pieces of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.source import Reader
from qwen35.checkpoint.storage import FP8_BLOCK
from qwen35.codecs.devices import Encoders
from qwen35.codecs.nf4 import BLOCK
from qwen35.codecs.nf4_arrays import Statistics
from qwen35.plan.plan import Plan
from qwen35.plan.step import Step
from qwen35.sinks.files import TensorFile
from qwen35.strips import decoded, fp8_scales, not_finite, stored, tile_rows

__all__ = ["Carrier", "each"]

Array = npt.NDArray[Any]


def each(
    pool: Executor, steps: Iterable[Step], pieces: Callable[[Step], Iterator[int]], stop: Event
) -> None:
    """Carry out steps in the threads of `pool`, the largest first.

    The first failure, and `stop`, end all of them between two pieces; when this returns, nobody
    writes any more.
    """

    def carry_out(step: Step) -> None:
        if not stop.is_set():
            for _ in pieces(step):
                if stop.is_set():  # perhaps in the middle of it
                    return

    largest_first = sorted(steps, key=lambda step: -step.weight.nbytes)
    _all_of([pool.submit(carry_out, step) for step in largest_first], stop)


def _all_of(futures: Sequence[Future[None]], stop: Event) -> None:
    """Wait for all; after a failure `stop` the others, and raise it."""
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
        wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()


@dataclass(frozen=True)
class Carrier:
    """Carries out the steps of a plan.

    Args:
        plan: what they are of.
        encoders: one for each device.
    """

    plan: Plan
    encoders: tuple[Encoders, ...]

    def pieces(self, step: Step, file: TensorFile, reader: Reader) -> Iterator[int]:
        """Carry out a step; yield after each piece how far into its source file it has read.

        Raises:
            TensorError: the weight cannot be read, or holds NaN or infinity.
        """
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
