"""Block-wise FP8 in plain PyTorch: one tile after the other, as the documents describe it."""

from __future__ import annotations

import numpy as np
import torch

from qwen35.codecs.fp8.arrays import encode_rows
from qwen35.codecs.fp8.layout import ScaleChoice

__all__ = ["E4M3", "Encoded", "decode", "encode", "expected_scale", "losses", "tiles", "to_codes"]

E4M3 = torch.float8_e4m3fn
Encoded = tuple[torch.Tensor, torch.Tensor]
"""Codes [rows, columns] E4M3 and scales [rows / 128, columns / 128] bfloat16."""

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def encode(
    weight: torch.Tensor, scale_choice: ScaleChoice, weights: torch.Tensor | None = None
) -> Encoded:
    """Encode with the package; the weight must be finite."""
    codes, scales, finite = try_encode(weight, scale_choice, weights)
    assert finite
    return codes, scales


def try_encode(
    weight: torch.Tensor, scale_choice: ScaleChoice, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Encode with the package; also return whether the weight is finite."""
    rows, columns = weight.shape
    bf16 = weight.dtype == torch.bfloat16
    values = (weight.view(torch.uint16) if bf16 else weight).contiguous().numpy()
    codes = np.full((rows, columns), 0x55, np.uint8)
    scales = np.full((rows // 128, columns // 128), 0x5555, np.uint16)
    columns_weight = None if weights is None else weights.float().numpy()
    finite = encode_rows(values, _NAMES[weight.dtype], scale_choice, columns_weight, codes, scales)
    as_torch = torch.from_numpy(codes).view(E4M3), torch.from_numpy(scales).view(torch.bfloat16)
    return *as_torch, finite


def tiles(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix as [rows / 128, columns / 128, 128, 128]."""
    rows, columns = (size // 128 for size in weight.shape)
    return weight.reshape(rows, 128, columns, 128).transpose(1, 2)


def spread(scales: torch.Tensor) -> torch.Tensor:
    """Return a scale for every element."""
    return scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)


def to_codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the codes of a weight for given scales."""
    return (weight.float() / spread(scales)).clamp(-448, 448).to(E4M3)


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return what a loader makes of both, in float32."""
    return codes.float() * spread(scales)


def bf16(scale: float | torch.Tensor) -> torch.Tensor:
    """Round a scale as it is stored: at least the least normal number."""
    rounded = torch.as_tensor(scale, dtype=torch.float32).bfloat16()
    return rounded.clamp(min=torch.finfo(torch.bfloat16).tiny)


def expected_scale(
    tile: torch.Tensor, scale_choice: ScaleChoice, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scale of a tile in the modes that have a formula."""
    values = tile.double().abs()
    if not values.any():
        return torch.tensor(1.0).bfloat16()
    if scale_choice.mode == "rms":
        column = torch.ones(128) if weights is None or not weights.any() else weights
        column = column.double() / column.double().sum()
        level = (values.square().mean(0) @ column).sqrt() * scale_choice.rms_factor
    elif scale_choice.mode == "percentile":
        level = torch.quantile(values.flatten(), scale_choice.percentile / 100)
    else:
        level = values.max()
    return bf16((level / 448).float())


def candidates(tile: torch.Tensor, scale_choice: ScaleChoice) -> torch.Tensor:
    """Return the scales that ``mse`` may choose from."""
    assert scale_choice.mode == "mse"
    largest = tile.double().abs().max()
    alphas = torch.linspace(1, 0.5, scale_choice.grid_size, dtype=torch.float64)
    return bf16((alphas * largest / 448).float())


def losses(
    tile: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the squared error of a tile with each scale, its columns weighed."""
    column = torch.ones(128) if weights is None or not weights.any() else weights
    found = []
    for scale in scales.float().flatten():
        codes = (tile.float() / scale).clamp(-448, 448).to(E4M3)
        error = (codes.double() * scale.double() - tile.double()).square().sum(0)
        found.append(error @ column.double())
    return torch.stack(found)
