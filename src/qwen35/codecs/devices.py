"""Devices that encode weights and refine codes: the CPU, or one or several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qwen35.codecs.codec import Kernel
from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError, WorkerError

if TYPE_CHECKING:
    from qwen35.codecs.refining import Refining

__all__ = ["Kernels", "gpu_numbers", "kernels_for"]

_T = TypeVar("_T")


def _refining() -> Refining:
    from qwen35.codecs import refining

    return refining.Refining(refining.refined_codes, refining.row_losses, refining.searched_scales)


@dataclass(frozen=True)
class Kernels:
    """What one device computes.

    Args:
        encoding: kernels by codec name.
        refining: chooses refined codes.
    """

    encoding: Mapping[str, Kernel]
    refining: Refining = field(default_factory=_refining)

    def of(self, codec: str) -> Kernel | None:
        """Return the kernel of a codec; None if it has none."""
        return self.encoding.get(codec)


def kernels_for(devices: str) -> tuple[Kernels, ...]:
    """Return the kernels for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:N,cuda:M``.

    ``auto`` is the CPU: its kernels outpace disks and need no torch. ``cuda`` means all visible
    GPUs. A kernel raises `WorkerError` if its GPU runs out of memory.

    Raises:
        UsageError: a device is unknown or missing.
    """
    if devices in ("auto", "cpu"):
        return (Kernels(_kernels("cpu")),)
    per_device = []
    for device in _gpus(devices):
        try:
            kernels, refining = _kernels(device), _refining_on(device)
        except ImportError as error:
            raise UsageError(
                f"--device {devices}",
                f"{error.name} is not installed",
                hint="leave the flag out: a CPU is enough",
            ) from error
        guarded = {name: _guarded(kernel, device) for name, kernel in kernels.items()}
        per_device.append(Kernels(guarded, refining))
    return tuple(per_device)


def _kernels(device: str) -> dict[str, Kernel]:
    kernels = {name: codec.kernel(device) for name, codec in CODECS.items()}
    return {name: kernel for name, kernel in kernels.items() if kernel is not None}


def _refining_on(device: str) -> Refining:
    from qwen35.codecs.refining import Refining
    from qwen35.codecs.refining_torch import PIECES, TorchRefining

    own = TorchRefining(device)
    return Refining(
        _guarded(own.refined_codes, device),
        _guarded(own.row_losses, device),
        _guarded(own.searched_scales, device),
        PIECES,
    )


def gpu_numbers(devices: str) -> tuple[int, ...]:
    """Return the indices of the GPUs in ``--device``; none for the CPU.

    Raises:
        UsageError: a device is unknown or missing.
    """
    if devices in ("auto", "cpu"):
        return ()
    kernels_for(devices)  # raises for devices that do not exist
    return tuple(int(device.partition(":")[2] or "0") for device in _gpus(devices))


def _gpus(devices: str) -> Iterator[str]:
    """Yield each GPU of a list; ``cuda`` stands for all GPUs."""
    for device in devices.split(","):
        if device == "cuda":
            from qwen35.codecs.nf4.torch import gpu_count

            yield from [f"cuda:{i}" for i in range(gpu_count())] or [device]
        elif device.startswith("cuda:"):
            yield device
        else:
            expected = "auto, cpu, cuda, cuda:N or a list of GPUs"
            raise UsageError(f"--device {devices}", "unknown", expected=expected)


def _guarded(function: Callable[..., _T], device: str) -> Callable[..., _T]:
    """Wrap what computes on a GPU: running out of its memory raises `WorkerError`."""

    def call(*arguments: Any) -> _T:
        try:
            return function(*arguments)
        except RuntimeError as error:  # torch, CUDA and Triton share no more specific class
            if "out of memory" not in str(error):
                raise
            raise WorkerError(
                f"--device {device}",
                "the GPU has too little free memory",
                hint="use fewer --threads or another GPU, or leave the flag out: a CPU is enough",
            ) from error

    return call
