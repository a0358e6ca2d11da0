"""Where weights are encoded: the processor, or one or several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.codecs.fp8 import Calibration
from qwen35.codecs.fp8_arrays import encode_rows
from qwen35.codecs.nf4_arrays import encode_blocks
from qwen35.errors import UsageError, WorkerError

__all__ = ["Encoders", "encoders_for", "gpu_numbers"]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Encoders:
    """The encoders of one device.

    Args:
        nf4: as `qwen35.codecs.nf4_arrays.encode_blocks`.
        fp8: as `qwen35.codecs.fp8_arrays.encode_rows`.
    """

    nf4: Callable[[Array, str, F32, U8], bool]
    fp8: Callable[[Array, str, Calibration, F32 | None, U8, npt.NDArray[np.uint16]], bool]


def encoders_for(devices: str) -> tuple[Encoders, ...]:
    """Return the encoders for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:N,cuda:M``.

    ``auto`` is the CPU: its kernels are faster than disks are, and need no torch. ``cuda`` is all
    GPUs that are visible. An encoder raises `WorkerError` when its GPU has too little memory.

    Raises:
        UsageError: a device is unknown or not there.
    """
    if devices in ("auto", "cpu"):
        return (Encoders(encode_blocks, encode_rows),)
    found = []
    for device in _each(devices):
        from qwen35.codecs.nf4_torch import TorchEncoder

        nf4 = TorchEncoder(device)  # refuses a GPU that is not there
        try:
            from qwen35.codecs.fp8_triton import TritonEncoder
        except ImportError as error:
            raise UsageError(
                f"--device {devices}",
                f"{error.name} is not installed",
                hint="leave the flag out: a CPU is enough",
            ) from error
        fp8 = TritonEncoder(device)
        found.append(Encoders(_in_memory(nf4, device), _in_memory(fp8, device)))
    return tuple(found)


def gpu_numbers(devices: str) -> tuple[int, ...]:
    """Return the numbers of the GPUs that ``--device`` names; none for the CPU.

    Raises:
        UsageError: a device is unknown or not there.
    """
    if devices in ("auto", "cpu"):
        return ()
    encoders_for(devices)
    return tuple(int(device.partition(":")[2] or "0") for device in _each(devices))


def _each(devices: str) -> Iterator[str]:
    """Yield the GPUs of a list one by one; ``cuda`` stands for all of them."""
    for device in devices.split(","):
        if device == "cuda":
            from qwen35.codecs.nf4_torch import gpu_count

            yield from [f"cuda:{i}" for i in range(gpu_count())] or [device]
        elif device.startswith("cuda:"):
            yield device
        else:
            expected = "auto, cpu, cuda, cuda:N or a list of GPUs"
            raise UsageError(f"--device {devices}", "unknown", expected=expected)


def _in_memory(encode: Callable[..., bool], device: str) -> Callable[..., bool]:
    """Return the encoder with a sentence for a GPU that has too little memory."""

    def call(*arguments: Any) -> bool:
        try:
            return encode(*arguments)
        except RuntimeError as error:  # torch's, and those of CUDA and Triton, have no class alone
            if "out of memory" not in str(error):
                raise
            raise WorkerError(
                f"--device {device}",
                "the GPU has too little free memory",
                hint="use fewer --threads or another GPU, or leave the flag out: a CPU is enough",
            ) from error

    return call
