"""What servers do to the inputs of packed layers when a model runs, on torch tensors.

Each function quantizes an input and decodes it again, in float32. Sources: compressed-tensors 0.20
``quantization/lifecycle/forward.py``, with which these agree to the bit, and vLLM
``csrc/quantization/fp8/common.cu`` and ``fp4/nvfp4_utils.cuh`` (`cvt_warp_fp16_to_fp4`), which
multiply by approximate inverses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "SMALLEST_INPUT",
    "InputQuantizer",
    "eight_bits",
    "fp4_blocks",
    "fp8_fixed",
    "fp8_tokens",
    "sixteen_bits",
]

SMALLEST_INPUT = 2.0**-116
"""The smallest largest magnitude of inputs whose scale, and its inverse, every form can store."""

InputQuantizer = Callable[[Any], Any]
"""Takes and returns a float32 tensor, [..., columns]."""

_BLOCK = 16
_FP4, _FP8 = 6.0, 448.0
"""The largest numbers of E2M1 and of E4M3."""


def fp8_tokens(x: Any, group: int | None = None) -> Any:
    """Return E4M3 numbers, with a scale for each token: its largest magnitude / 448.

    Args:
        x: [..., columns].
        group: columns that share a scale, the last ones fewer; None for all of a token.
    """
    from torch.nn.functional import pad

    columns = x.shape[-1]
    size = group or columns
    groups = pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / _FP8
    return _scaled(groups, scale, _e4m3).flatten(-2)[..., :columns]


def fp8_fixed(x: Any, scale: float) -> Any:
    """Return E4M3 numbers times a stored scale; magnitudes above 448 times it become that."""
    return _e4m3(x / scale) * scale


def fp4_blocks(x: Any, whole: float) -> Any:
    """Return E2M1 numbers with E4M3 scales: s = E4M3(largest of 16 / 6 * whole), in 1 / whole.

    Args:
        x: [..., columns], a multiple of 16.
        whole: 2688 / the largest magnitude to expect; blocks with more than that are cut off.
    """
    blocks = x.unflatten(-1, (-1, _BLOCK))
    scale = _e4m3(blocks.abs().amax(-1, keepdim=True) / _FP4 * whole)
    return _scaled(blocks, scale / whole, _e2m1).flatten(-2)


def eight_bits(x: Any, block: int, *, half: bool) -> Any:
    """Return integers of -127 to 127 times a scale for each block, as llama.cpp does on CPUs.

    Source: `quantize_row_q8_0_ref` and `quantize_row_q8_K_ref` of llama.cpp 0c1e5709.

    Args:
        x: [..., columns], a multiple of `block`.
        block: columns that share a scale.
        half: whether the scale is stored in float16, after the division by it.
    """
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    numbers = (blocks / scale.where(scale > 0, 1)).round()
    return (numbers * (scale.half().float() if half else scale)).flatten(-2)


def sixteen_bits(x: Any, *, brain: bool) -> Any:
    """Return numbers of bfloat16, if `brain`, or else of float16."""
    return (x.bfloat16() if brain else x.half()).to(x.dtype)


def _scaled(x: Any, unit: Any, rounded: InputQuantizer) -> Any:
    """Round in multiples of a unit; where it is zero, all is."""
    return rounded(x / unit.where(unit > 0, 1)) * unit


def _e4m3(x: Any) -> Any:
    from torch import float8_e4m3fn

    return x.clamp(-_FP8, _FP8).to(float8_e4m3fn).to(x.dtype)


def _e2m1(x: Any) -> Any:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even codes."""
    size = x.abs().clamp(max=_FP4)
    step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    return ((size / step).round() * step).copysign(x)
