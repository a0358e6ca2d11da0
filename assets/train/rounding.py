"""Two things done to the language model's linear weights, block by block of 64 values.

`to_nf4` rounds as a 4-bit NF4 quantizer would; a trained checkpoint must survive it.
`shuffle_scales` gives every block the scale of another block of its tensor, the fault of a
quantizer that stores its scales in the wrong order; a checkpoint that survives this proves
nothing, so it must fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCK = 64
SCALE_NOISE = 0.04
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> unit blocks [n, 64] float32 and their largest magnitudes [n, 1]."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    return blocks / scales, scales


def to_nf4(weight: Tensor, scale_noise: float = 0.0) -> Tensor:
    """The weight after rounding to the nearest NF4 level times the block's largest magnitude.

    scale_noise: standard deviation of a relative error of the magnitudes, which are stored in 8
    bits themselves.
    """
    units, scales = _blocks(weight)
    levels = torch.tensor(NF4_LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(units, middles)]
    if scale_noise:
        scales = scales * (1.0 + scale_noise * torch.randn_like(scales))
    return (nearest * scales).reshape(weight.shape).to(weight.dtype)


def shuffle_scales(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The weight with the scales of its blocks in a random order."""
    units, scales = _blocks(weight)
    order = torch.randperm(len(scales), generator=generator)
    return (units * scales[order]).reshape(weight.shape).to(weight.dtype)


def language_linears(model: nn.Module) -> list[nn.Linear]:
    """Every linear of the language model's layers, in order; not the tied head."""
    return [
        part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and ".language_model.layers." in f".{name}"
    ]


def round_model(model: nn.Module) -> None:
    """NF4-round every linear of the language model in place."""
    for linear in language_linears(model):
        linear.weight.data.copy_(to_nf4(linear.weight))


def shuffle_model(model: nn.Module, seed: int) -> None:
    """Shuffle the block scales of every linear of the language model in place."""
    generator = torch.Generator().manual_seed(seed)
    for linear in language_linears(model):
        linear.weight.data.copy_(shuffle_scales(linear.weight, generator))


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """NF4-rounded linears with noisy scales inside the context, the weights as they were after it.

    A gradient taken inside is one at the rounded weights (a straight-through estimate).
    """
    linears = language_linears(model)
    kept = [linear.weight.detach().clone() for linear in linears]
    for linear in linears:
        linear.weight.data.copy_(to_nf4(linear.weight, SCALE_NOISE))
    try:
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data.copy_(weight)
