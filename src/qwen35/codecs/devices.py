"""Where weights are encoded: the processor, or one or several GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.codecs.fp8 import Calibration
from qwen35.codecs.fp8_arrays import encode_rows
from qwen35.codecs.nf4_arrays import encode_blocks
from qwen35.errors import UsageError

__all__ = ["Encoders", "encoders_for"]

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

    ``auto`` is the CPU: its kernels are faster than disks are, and need no torch.

    Raises:
        UsageError: a device is unknown or not there.
    """
    if devices in ("auto", "cpu"):
        return (Encoders(encode_blocks, encode_rows),)
    found = []
    for device in devices.split(","):
        if device != "cuda" and not device.startswith("cuda:"):
            expected = "auto, cpu, cuda, cuda:N or a list of GPUs"
            raise UsageError(f"--device {devices}", "unknown", expected=expected)
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
        found.append(Encoders(nf4, TritonEncoder(device)))
    return tuple(found)
