"""FP8 on a GPU: one program a tile, which reads it once and tries all scales in registers.

The arithmetic is that of `qwen35.codecs.fp8.kernels`, so the codes for a given scale are the same
to the bit, and so are the scales of ``max``. Sums are added in another order: where two candidates
of ``search`` or ``mse`` are equally good but for rounding, the choice may differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from qwen35.array_types import F32, U8, U16, Array
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8.kernels import CANDIDATES, MODES
from qwen35.codecs.fp8.layout import BLOCK, ScaleChoice
from qwen35.errors import UsageError

__all__ = ["TritonEncoder"]

_STEP = tl.constexpr(128 // CANDIDATES)
_RMS = tl.constexpr(MODES.index("rms"))
_PERCENTILE = tl.constexpr(MODES.index("percentile"))
_MSE = tl.constexpr(MODES.index("mse"))
_SEARCH = tl.constexpr(MODES.index("search"))


@triton.jit
def _magic_bits(magnitude: Any) -> Any:
    """Return the bits of 1.5 * 2**(e + 20): adding it rounds to a step of E4M3."""
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    return exponent + ((20 << 23) + (1 << 22))


@triton.jit
def _stored(scale: Any) -> Any:
    """Round a scale to bfloat16, ties to even; at least the least normal one."""
    bits = tl.maximum(scale, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _loss(magnitudes: Any, scale: Any, weights: Any) -> Any:
    """Return the weighted squared error of a tile with a scale."""
    values = magnitudes * tl.div_rn(1.0, scale)
    clipped = tl.minimum(values, 448.0)
    magic = _magic_bits(clipped).to(tl.float32, bitcast=True)
    errors = ((clipped + magic) - magic) - values
    columns = tl.sum(errors * errors, axis=0)
    squared = scale.to(tl.float64) * scale.to(tl.float64)
    return tl.sum(columns * weights, axis=0).to(tl.float64) * squared


@triton.jit
def _encode_tiles(
    values: Any,
    weights: Any,
    levels: Any,
    codes: Any,
    stored: Any,
    bad: Any,
    columns: Any,
    parameter: Any,
    mode: tl.constexpr,
    candidates: tl.constexpr,
) -> None:
    """Choose the scale of one tile and encode it.

    values: [rows, columns] bfloat16 or float32; weights: [columns] float32; levels: a percentile
    for each tile -> codes: [rows, columns] uint8, stored: [tiles] float32, bad: [1] int32.
    """
    row, column = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, 128)
    places = (row * 128 + inside).to(tl.int64)[:, None] * columns
    places += (column * 128 + inside)[None, :]
    tile = tl.load(values + places).to(tl.float32)
    magnitudes = tl.abs(tile)
    bits = magnitudes.to(tl.int32, bitcast=True)
    largest = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    weight = tl.load(weights + column * 128 + inside)
    weight = tl.where(tl.sum(weight, axis=0) > 0.0, weight, 1.0)
    number = row * tl.num_programs(1) + column

    base = tl.div_rn(largest, 448.0)
    scale = _stored(base)
    if mode == _RMS:
        ratios = tl.div_rn(magnitudes, tl.where(largest > 0.0, largest, 1.0))
        squares = tl.sum(ratios * ratios, axis=0)
        mean = tl.div_rn(tl.sum(squares * weight, axis=0), tl.sum(weight, axis=0) * 128.0)
        rms = largest * tl.sqrt_rn(mean)
        wide = rms.to(tl.float64) * parameter / 448.0  # the product may be beyond float32
        scale = tl.where(rms > 0.0, _stored(wide.to(tl.float32)), scale)
    if mode == _PERCENTILE:
        level = tl.load(levels + number)
        scale = tl.where(level > 0.0, _stored(tl.div_rn(level, 448.0)), scale)
    if mode == _MSE or mode == _SEARCH:  # noqa: SIM109 - Triton knows no `in`
        first = scale
        least = _loss(magnitudes, first, weight)
        for i in range(1, candidates):
            if mode == _MSE:
                part = tl.div_rn(i * 1.0, (candidates - 1) * 1.0)
                other = _stored(base * (1.0 - 0.5 * part))
            else:
                moved = first.to(tl.int32, bitcast=True) + ((i * _STEP) << 16)
                other = moved.to(tl.float32, bitcast=True)
            loss = _loss(magnitudes, other, weight)
            scale = tl.where(loss < least, other, scale)
            least = tl.where(loss < least, loss, least)
    scale = tl.where(largest > 0.0, scale, 1.0)

    units = tl.div_rn(tile, tl.zeros_like(tile) + scale)
    clipped = tl.minimum(tl.abs(units), 448.0)
    magic = _magic_bits(clipped)
    total = clipped + magic.to(tl.float32, bitcast=True)
    steps = total.to(tl.int32, bitcast=True) - magic
    exponent = (magic - ((20 << 23) + (1 << 22))) >> 20
    code = exponent - (121 << 3) + steps
    sign = (tile.to(tl.int32, bitcast=True) >> 24) & 128
    tl.store(codes + places, (code | sign).to(tl.uint8))
    tl.store(stored + number, scale)
    tl.atomic_max(bad, tl.where(largest < float("inf"), 0, 1))


class TritonEncoder:
    """Encodes rows of tiles on a torch device such as ``cuda`` or ``cuda:1``.

    Raises:
        UsageError: torch has no such device.
    """

    def __init__(self, device: str) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(
                f"--device {device}",
                "torch does not see such a GPU",
                hint="leave the flag out: a CPU is enough",
            )
        self._device = torch.device(device)

    def __call__(
        self,
        values: Array,
        dtype: str,
        scale_choice: ScaleChoice,
        weights: F32 | None,
        codes: U8,
        scales: U16,
    ) -> bool:
        """Encode as `qwen35.codecs.fp8.arrays.encode_rows` does."""
        if self._device.index is not None:
            torch.cuda.set_device(self._device)  # where Triton starts kernels, for this thread
        tile_rows, tile_columns = scales.shape
        tensor = torch.from_numpy(values if dtype == "BF16" else f32_from(values, dtype))
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        tensor = tensor.to(self._device)
        even = weights is None or not scale_choice.weighted
        columns = np.ones(values.shape[1], np.float32) if even else weights
        on_device = torch.empty(tensor.shape, dtype=torch.uint8, device=self._device)
        stored = torch.empty(scales.shape, dtype=torch.float32, device=self._device)
        bad = torch.zeros(1, dtype=torch.int32, device=self._device)
        _encode_tiles[(tile_rows, tile_columns)](
            tensor,
            torch.from_numpy(columns).to(self._device),
            _levels(tensor, scale_choice),
            on_device,
            stored,
            bad,
            tensor.shape[1],
            scale_choice.rms_factor,
            mode=MODES.index(scale_choice.mode),
            candidates=scale_choice.grid_size if scale_choice.mode == "mse" else CANDIDATES,
            num_warps=8,
        )
        codes[:] = on_device.cpu().numpy()
        scales[:] = stored.to(torch.bfloat16).view(torch.uint16).cpu().numpy()
        return not int(bad)


def _levels(tensor: torch.Tensor, scale_choice: ScaleChoice) -> torch.Tensor:
    """Return the percentile of each tile's magnitudes; nothing in the other modes."""
    if scale_choice.mode != "percentile":
        return torch.zeros(1, device=tensor.device)
    rows, columns = (size // BLOCK for size in tensor.shape)
    tiles = tensor.float().abs().reshape(rows, BLOCK, columns, BLOCK)
    ordered = tiles.transpose(1, 2).reshape(rows * columns, -1).sort(dim=1).values
    place = scale_choice.percentile / 100 * (BLOCK**2 - 1)
    lower = int(place)
    low = ordered[:, lower]
    high = ordered[:, min(lower + 1, BLOCK**2 - 1)]
    return (low.double() + (high - low).double() * (place - lower)).float()
