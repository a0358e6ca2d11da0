"""NF4 encoding in torch, on any device; same bytes as the CPU kernel.

The operations are those of `qwen35.codecs.nf4.kernels`. The CUDA kernel of bitsandbytes is not
used: it divides approximately and flushes subnormal numbers to zero.
"""

from __future__ import annotations

from typing import Any

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.floats import f32_from
from qwen35.codecs.nf4.layout import BLOCK
from qwen35.codecs.nf4.tables import BOUNDS, TINY
from qwen35.errors import UsageError, extra_hint

__all__ = ["TorchEncoder", "gpu_count"]


class TorchEncoder:
    """Encodes blocks on a torch device such as ``cuda`` or ``cuda:1``.

    Raises:
        UsageError: torch is not installed, or has no such device.
    """

    def __init__(self, device: str) -> None:
        try:
            import torch
        except ImportError as error:
            raise UsageError(
                f"--device {device}",
                f"{error.name} is not installed",
                hint=f"{extra_hint('cuda')}, or leave the flag out: a CPU is enough",
            ) from error
        if device.startswith("cuda") and not _has_cuda(torch, device):
            raise UsageError(
                f"--device {device}",
                "torch does not see such a GPU",
                hint="leave the flag out: a CPU is enough",
            )
        self._torch = torch
        self._device = device

    def __call__(
        self,
        values: Array,
        dtype: str,
        absmax: F32,
        packed: U8,
    ) -> bool:
        """Encode as `qwen35.codecs.nf4.arrays.encode_blocks` does."""
        torch = self._torch
        tensor = torch.from_numpy(values if dtype == "BF16" else f32_from(values, dtype))
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        codes, largest = self.encode(tensor.to(self._device))
        packed[:] = codes.cpu().numpy()
        absmax[:] = largest.cpu().numpy()
        return bool(largest.isfinite().all())

    def encode(self, tensor: Any) -> tuple[Any, Any]:
        """Encode a flat tensor on the device. -> codes [n / 2] uint8, absmax [n / 64] float32."""
        torch = self._torch
        blocks = tensor.float().reshape(-1, BLOCK)
        largest = blocks.abs().amax(1, keepdim=True)
        units = blocks * largest.clamp(min=float(TINY)).reciprocal()
        bounds = torch.from_numpy(BOUNDS).to(tensor.device)
        codes = torch.bucketize(units, bounds, out_int32=True).to(torch.uint8)
        return (codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1), largest.reshape(-1)


def gpu_count() -> int:
    """Return how many GPUs torch sees."""
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def _has_cuda(torch: Any, device: str) -> bool:
    if not torch.cuda.is_available():
        return False
    _, colon, number = device.partition(":")
    if not colon:
        return True
    return number.isdecimal() and int(number) < torch.cuda.device_count()
