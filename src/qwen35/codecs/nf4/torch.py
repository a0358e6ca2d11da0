"""NF4 codes computed by bitsandbytes on a torch device; same bytes as the kernel on the CPU.

For bf16 weights no quotient comes near a bound (the nearest is 14.8 units in the last place of
float32 away), so how a device rounds the division cannot change a code. For fp16 sources a code in
some millions may differ. A block of zeros is the one systematic difference (bitsandbytes on CUDA
divides by zero there) and is set right.
"""

from __future__ import annotations

from typing import Any

from qwen35.array_types import F32, U8, Array
from qwen35.codecs.nf4.layout import BLOCK
from qwen35.errors import UsageError

__all__ = ["TorchEncoder", "gpu_count"]

_ZERO_PAIR = 0x77


class TorchEncoder:
    """Encodes blocks on a torch device such as ``cuda`` or ``cuda:1``.

    Raises:
        UsageError: torch or bitsandbytes is not installed, or torch has no such device.
    """

    def __init__(self, device: str) -> None:
        try:
            import bitsandbytes.functional
            import torch
        except ImportError as error:
            raise UsageError(
                f"--device {device}",
                f"{error.name} is not installed",
                hint="pip install 'qwen35[nf4]', or leave the flag out: a CPU is enough",
            ) from error
        if device.startswith("cuda") and not _has_cuda(torch, device):
            raise UsageError(
                f"--device {device}",
                "torch does not see such a GPU",
                hint="leave the flag out: a CPU is enough",
            )
        self._torch = torch
        self._quantize = bitsandbytes.functional.quantize_4bit
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
        tensor = torch.from_numpy(values)
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        codes, state = self._quantize(
            tensor.to(self._device), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        absmax[:] = state.absmax.cpu().numpy()
        packed[:] = codes.cpu().numpy().reshape(-1)
        packed.reshape(-1, BLOCK // 2)[absmax == 0] = _ZERO_PAIR
        return bool(tensor.isfinite().all())


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
    number = device.partition(":")[2] or "0"
    return number.isdigit() and int(number) < torch.cuda.device_count()
