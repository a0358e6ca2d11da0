"""NF4 as bitsandbytes stores it: names, shapes and sizes of the six tensors per weight.

A weight ``[N, K]`` is split into blocks of 64 in memory order. Each block is divided by its largest
magnitude (absmax); each quotient becomes the index of the nearest of 16 levels. Two indices share a
byte, the first in the high half. The absmax values are quantized again (double quantization): their
mean is subtracted, and blocks of 256 become indices into a dynamic 8-bit map.

Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, and bitsandbytes 0.50
``functional.quantize_4bit`` / ``QuantState.as_dict``.

Three differences from the bytes that bitsandbytes writes, all of which it reads:

- the mean is computed in float64 and rounded once, so that it does not depend on the number of
  threads (bitsandbytes' float32 sum can be off by one unit in the last place);
- the JSON blob is padded with spaces to a fixed width, so that its size is known in advance;
- a block of zeros decodes to zeros, as on a CPU; bitsandbytes on CUDA writes level -1.
"""

from __future__ import annotations

import json

from qwen35.tensors import DTYPE_NAMES, TensorSpec

__all__ = [
    "BLOCK",
    "NESTED_BLOCK",
    "PARTS",
    "STATE",
    "layout",
    "parts_layout",
    "state_blob",
    "state_width",
]

BLOCK = 64
"""Weights that share an absmax (bitsandbytes' default ``blocksize``)."""

NESTED_BLOCK = 256
"""Absmax values that share a nested absmax (``functional.quantize_4bit``)."""

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
"""Suffixes of the companions' names, after a dot (bitsandbytes 0.50 `QuantState.as_dict`)."""

_OFFSET_CHARS = 24
"""Longest repr of a float: sign, 17 digits, point and a five-character exponent."""


def layout(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """Return the tensors that `spec` becomes, the packed one first.

    Args:
        spec: ``[N, K]`` BF16, F16 or F32, with N * K a multiple of 64.

    >>> [(t.name, t.dtype, t.shape) for t in layout(TensorSpec("w", "BF16", (8, 64)))][:2]
    [('w', 'U8', (256, 1)), ('w.absmax', 'U8', (8,))]
    """
    blocks = spec.numel // BLOCK
    name = spec.name
    return (
        TensorSpec(name, "U8", (spec.numel // 2, 1)),
        TensorSpec(f"{name}.absmax", "U8", (blocks,)),
        TensorSpec(f"{name}.quant_map", "F32", (16,)),
        TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
        TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
        TensorSpec(f"{name}.{STATE}", "U8", (state_width(spec),)),
    )


def parts_layout(spec: TensorSpec, *, nested: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and shape required of each tensor of a stored NF4 weight.

    The JSON blob is not included: its width is free, since other writers do not pad it.
    """
    expected = {t.name.removeprefix(spec.name): (t.dtype, t.shape) for t in layout(spec)}
    del expected[f".{STATE}"]
    if not nested:
        del expected[".nested_absmax"], expected[".nested_quant_map"]
        expected[".absmax"] = ("F32", (spec.numel // BLOCK,))
    return expected


def _state_text(spec: TensorSpec, offset: float) -> str:
    return json.dumps(
        {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    )


def state_width(spec: TensorSpec) -> int:
    """Return the fixed length in bytes of the JSON blob for `spec`, a multiple of 8."""
    longest = len(_state_text(spec, 0.0)) - len(repr(0.0)) + _OFFSET_CHARS
    return -(-longest // 8) * 8


def state_blob(spec: TensorSpec, offset: float) -> bytes:
    """Return the JSON blob of `spec` with the mean absmax `offset`, padded with spaces."""
    return _state_text(spec, offset).encode().ljust(state_width(spec))
