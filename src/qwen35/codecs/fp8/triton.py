"""FP8 encoding on a GPU: one program per tile, 32 candidate scales at once in registers.

Operations and the order of sums are those of `qwen35.codecs.fp8.kernels`, so the bytes are the same
in all modes. Annotations of kernels are read by Triton's compiler, which refuses most types.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from qwen35.array_types import F32, F64, U8, U16, Array
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8.kernels import CANDIDATES, MODES
from qwen35.codecs.fp8.layout import BLOCK, ScaleChoice
from qwen35.errors import UsageError

__all__ = ["TritonEncoder"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Compiler options; without fused multiply-adds, products are rounded as on the CPU."""

_LANES = tl.constexpr(CANDIDATES)
"""Number of scales tried at once."""

_STEP = tl.constexpr(128 // CANDIDATES)
_RMS = tl.constexpr(MODES.index("rms"))
_PERCENTILE = tl.constexpr(MODES.index("percentile"))
_MSE = tl.constexpr(MODES.index("mse"))
_SEARCH = tl.constexpr(MODES.index("search"))


@triton.jit
def _magic_bits(magnitude: tl.tensor) -> tl.tensor:
    """Return the bits of 1.5 * 2**(e + 20): adding it rounds to a step of E4M3."""
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    return exponent + ((20 << 23) + (1 << 22))


@triton.jit
def _stored(scale: tl.tensor) -> tl.tensor:
    """Round a scale to bfloat16, ties to even; at least the smallest normal one."""
    bits = tl.maximum(scale, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _weighed(sums: tl.tensor, weights: tl.tensor) -> tl.tensor:
    """Return the weighted mean of 128 column sums; unweighted if all weights are zero.

    sums: pointers to the first column's, one per scale; weights: pointer to the first. They are
    added one by one, in the CPU kernel's order.
    """
    total = tl.load(sums).to(tl.float64) * 0.0
    even = total
    weight = tl.load(weights).to(tl.float64) * 0.0
    for column in range(128):
        own = tl.load(sums + column).to(tl.float64)
        share = tl.load(weights + column).to(tl.float64)
        even += own
        total += own * share
        weight += share
    return tl.where(weight > 0.0, total / tl.where(weight > 0.0, weight, 1.0), even / 128.0)


@triton.jit
def _squares(first: tl.tensor, columns: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """Sum (value / largest)**2 down each column; `first` points to the tile's first row."""
    sums = tl.zeros([128], tl.float32)
    for row in range(128):
        ratios = tl.div_rn(tl.load(first + row * columns).to(tl.float32), largest)
        sums += ratios * ratios
    return sums


@triton.jit
def _errors(first: tl.tensor, columns: tl.tensor, scales: tl.tensor) -> tl.tensor:
    """Sum (code - value / scale)**2 down each column, for each scale."""
    inverses = tl.div_rn(1.0, scales)
    sums = tl.zeros([_LANES, 128], tl.float32)
    for row in range(128):
        magnitudes = tl.abs(tl.load(first + row * columns).to(tl.float32))
        values = magnitudes[None, :] * inverses[:, None]
        clipped = tl.minimum(values, 448.0)
        magic = _magic_bits(clipped).to(tl.float32, bitcast=True)
        errors = ((clipped + magic) - magic) - values
        sums += errors * errors
    return sums


@triton.jit
def encode_tiles(
    values: tl.tensor,
    weights: tl.tensor,
    levels: tl.tensor,
    parameters: tl.tensor,
    scratch: tl.tensor,
    codes: tl.tensor,
    stored: tl.tensor,
    bad: tl.tensor,
    columns: tl.tensor,
    mode: tl.constexpr,
    candidates: tl.constexpr,
) -> None:
    """Choose the scale of one tile and encode it.

    values: [rows, columns] bfloat16 or float32; weights: [columns] float32; levels: one percentile
    per tile; parameters: float64, the factor of ``rms`` or the factors of ``mse``; scratch: [tiles,
    32, 128] float32 -> codes: [rows, columns] uint8, stored: [tiles] float32, bad: [1] int32.
    """
    row, column = tl.program_id(0), tl.program_id(1)
    number = row * tl.num_programs(1) + column
    inside = tl.arange(0, 128)
    first = (row * 128).to(tl.int64) * columns + column * 128 + inside
    places = first[None, :] + inside.to(tl.int64)[:, None] * columns
    tile = tl.load(values + places).to(tl.float32)
    bits = tl.abs(tile).to(tl.int32, bitcast=True)
    largest = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    own = scratch + number.to(tl.int64) * (_LANES * 128)
    own_weights = weights + column * 128

    base = tl.div_rn(largest, 448.0)
    scale = _stored(base)
    if mode == _RMS:
        sums = _squares(values + first, columns, tl.where(largest > 0.0, largest, 1.0))
        tl.store(own + inside, sums)
        tl.debug_barrier()
        mean = _weighed(own, own_weights) / 128.0
        rms = largest.to(tl.float64) * tl.sqrt(mean)
        wide = rms * tl.load(parameters) / 448.0
        scale = tl.where(rms > 0.0, _stored(wide.to(tl.float32)), scale)
    if mode == _PERCENTILE:
        level = tl.load(levels + number)
        scale = tl.where(level > 0.0, _stored(tl.div_rn(level, 448.0)), scale)
    if mode == _MSE or mode == _SEARCH:  # noqa: SIM109 - Triton knows no `in`
        first_bits = scale.to(tl.int32, bitcast=True)
        least = (largest * 0.0).to(tl.float64) + float("inf")
        for begin in range(0, candidates, _LANES):
            lane = tl.arange(0, _LANES)
            if mode == _MSE:
                factors = tl.load(parameters + begin + lane).to(tl.float32)
                scales = _stored(base * factors)
            else:
                moved = first_bits + (((begin + lane) * _STEP) << 16)
                scales = moved.to(tl.float32, bitcast=True)
            sums = _errors(values + first, columns, scales)
            tl.debug_barrier()  # the previous sums have been read
            tl.store(own + lane[:, None] * 128 + inside[None, :], sums)
            tl.debug_barrier()
            wide_scales = scales.to(tl.float64)
            losses = _weighed(own + lane * 128, own_weights) * wide_scales * wide_scales
            losses = tl.where(begin + lane < candidates, losses, float("inf"))
            loss = tl.min(losses, axis=0)
            chosen = tl.min(tl.where(losses == loss, lane, _LANES), axis=0)
            other = tl.sum(tl.where(lane == chosen, scales, 0.0), axis=0)
            scale = tl.where(loss < least, other, scale)
            least = tl.where(loss < least, loss, least)
    scale = tl.where(largest > 0.0, scale, 1.0)

    tile = tl.load(values + places).to(tl.float32)  # read again to spare registers
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
        tensor = torch.from_numpy(values if dtype == "BF16" else f32_from(values, dtype))
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        even = weights is None or not scale_choice.weighted
        columns = np.ones(values.shape[1], np.float32) if even else weights
        found = self.encode(
            tensor.to(self._device), scale_choice, torch.from_numpy(columns).to(self._device)
        )
        codes[:] = found[0].cpu().numpy()
        scales[:] = found[1].to(torch.bfloat16).view(torch.uint16).cpu().numpy()
        return not int(found[2])

    def encode(
        self, tensor: torch.Tensor, scale_choice: ScaleChoice, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode a tensor that is on the device.

        Args:
            tensor: [rows, columns] bfloat16 or float32.
            scale_choice: how scales are chosen.
            columns: [columns] float32 error weights.

        Returns:
            Codes [rows, columns] uint8, scales [rows / 128, columns / 128] float32, and [1] int32
            that is nonzero if a value is not finite. The device may still be computing them.
        """
        rows, width = (size // BLOCK for size in tensor.shape)
        room = rows * width * CANDIDATES * BLOCK if scale_choice.weighted else 1
        codes = torch.empty(tensor.shape, dtype=torch.uint8, device=self._device)
        scales = torch.empty((rows, width), dtype=torch.float32, device=self._device)
        bad = torch.zeros(1, dtype=torch.int32, device=self._device)
        encode_tiles[(rows, width)](
            tensor,
            columns,
            _levels(tensor, scale_choice),
            torch.from_numpy(_parameters(scale_choice)).to(self._device),
            torch.empty(room, dtype=torch.float32, device=self._device),
            codes,
            scales,
            bad,
            tensor.shape[1],
            mode=MODES.index(scale_choice.mode),
            candidates=scale_choice.grid_size if scale_choice.mode == "mse" else CANDIDATES,
            **OPTIONS,
        )
        return codes, scales, bad


def _parameters(scale_choice: ScaleChoice) -> F64:
    """Return the factor of ``rms``, or those by which ``mse`` multiplies the scale of ``max``."""
    if scale_choice.mode != "mse":
        return np.array([scale_choice.rms_factor])
    size = scale_choice.grid_size
    factors = np.zeros(-(-size // CANDIDATES) * CANDIDATES)
    factors[:size] = 1.0 - 0.5 * np.arange(size) / max(1, size - 1)
    return factors


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
