"""Where weights are encoded: the processor, or one or several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qwen35.codecs.codec import Kernel
from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError, WorkerError

__all__ = ["Kernels", "gpu_numbers", "kernels_for"]

Kernels = Mapping[str, Kernel]
"""Codec to what encodes for it on one device."""


def kernels_for(devices: str) -> tuple[Kernels, ...]:
    """Return the kernels for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:N,cuda:M``.

    ``auto`` is the CPU: its kernels are faster than disks are, and need no torch. ``cuda`` is all
    GPUs that are visible. A kernel raises `WorkerError` when its GPU has too little memory.

    Raises:
        UsageError: a device is unknown or not there.
    """
    if devices in ("auto", "cpu"):
        return (_kernels("cpu"),)
    found = []
    for device in _each(devices):
        try:
            kernels = _kernels(device)
        except ImportError as error:
            raise UsageError(
                f"--device {devices}",
                f"{error.name} is not installed",
                hint="leave the flag out: a CPU is enough",
            ) from error
        found.append({name: _in_memory(kernel, device) for name, kernel in kernels.items()})
    return tuple(found)


def _kernels(device: str) -> dict[str, Kernel]:
    found = {name: codec.kernel(device) for name, codec in CODECS.items()}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


def gpu_numbers(devices: str) -> tuple[int, ...]:
    """Return the numbers of the GPUs that ``--device`` names; none for the CPU.

    Raises:
        UsageError: a device is unknown or not there.
    """
    if devices in ("auto", "cpu"):
        return ()
    kernels_for(devices)
    return tuple(int(device.partition(":")[2] or "0") for device in _each(devices))


def _each(devices: str) -> Iterator[str]:
    """Yield the GPUs of a list one by one; ``cuda`` stands for all of them."""
    for device in devices.split(","):
        if device == "cuda":
            from qwen35.codecs.nf4.torch import gpu_count

            yield from [f"cuda:{i}" for i in range(gpu_count())] or [device]
        elif device.startswith("cuda:"):
            yield device
        else:
            expected = "auto, cpu, cuda, cuda:N or a list of GPUs"
            raise UsageError(f"--device {devices}", "unknown", expected=expected)


def _in_memory(encode: Kernel, device: str) -> Callable[..., bool]:
    """Return the kernel with a sentence for a GPU that has too little memory."""

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
