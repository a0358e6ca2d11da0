"""Encode with the Triton kernel and compare with the processor's; prints what differs as JSON.

``TRITON_INTERPRET=1 python tests/encode_on.py cpu`` needs no GPU, ``cuda`` does; ``cpu some`` tries
a part of the cases.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import torch

from qwen35.codecs.fp8.arrays import encode_rows
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.fp8.triton import TritonEncoder

SCALE_CHOICES = [
    ScaleChoice("max"),
    ScaleChoice("rms"),
    ScaleChoice("rms", rms_factor=100),
    ScaleChoice("percentile"),
    ScaleChoice("percentile", percentile=100),
    ScaleChoice("rms", rms_factor=2.7),
    ScaleChoice("mse", grid_size=1),
    ScaleChoice("mse"),
    ScaleChoice("search"),
]


def weight(kind: str, rows: int = 128) -> torch.Tensor:
    """Return [rows, 256], the second column of tiles zeros if `kind` says so."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(rows, 256, generator=generator) * 0.02
    if kind == "tails":
        chi = torch.randn(4, rows, 256, generator=generator).square().sum(0)
        values = values / (chi / 4).sqrt()
    elif kind == "zero tile":
        values[:, 128:] = 0
    elif kind == "tiny":
        values *= 1e-32
    elif kind == "denormal":
        values *= 1e-38
    elif kind == "huge":
        values = values.sign() * 3.3e38
    return values


def both(
    encoder: TritonEncoder,
    values: torch.Tensor,
    scale_choice: ScaleChoice,
    weights: np.ndarray | None,
) -> list[tuple[bool, np.ndarray, np.ndarray]]:
    """Encode by both; return whether finite, codes and scales of each."""
    bf16 = values.dtype == torch.bfloat16
    array = (values.view(torch.uint16) if bf16 else values).numpy()
    dtype = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[values.dtype]
    found = []
    for encode in (encode_rows, encoder):
        codes = np.full(array.shape, 1, np.uint8)
        scales = np.full((array.shape[0] // 128, array.shape[1] // 128), 1, np.uint16)
        finite = encode(array, dtype, scale_choice, weights, codes, scales)
        found.append((finite, codes, scales))
    return found


def differences(device: str, *, every: bool) -> dict[str, int]:
    """Return the number of other codes and scales of each case that is not the same.

    A GPU gets more tiles, so that sums in another order would choose other scales. If not `every`
    case is asked for, normal weights are encoded in all ways, and others in a sixth of them each.
    """
    encoder = TritonEncoder(device)
    rows = 128 if device == "cpu" else 128 * 128
    columns = np.linspace(0, 3, 256, dtype=np.float32) ** 4
    columns[:128] = 0
    found: dict[str, int] = {}
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    dtypes = {
        "normal": [bf16, f16, f32],
        "tails": [bf16, f32],
        "zero tile": [bf16],
        "tiny": [bf16],
        "denormal": [f32]
        if device == "cpu"
        else [bf16, f32],  # Triton's interpreter misreads bf16 ones
        "huge": [bf16],
    }
    ways = [(choice, weights) for choice in SCALE_CHOICES for weights in (None, columns)]
    for number, (kind, dtype) in enumerate((k, d) for k, row in dtypes.items() for d in row):
        values = weight(kind, rows).to(dtype)
        for scale_choice, weights in ways if every or not number else ways[number % 6 :: 6]:
            cpu, other = both(encoder, values, scale_choice, weights)
            assert cpu[0]
            wrong = int((cpu[1] != other[1]).sum() + (cpu[2] != other[2]).sum())
            if wrong or not other[0]:
                weighed = "even" if weights is None else "weighed"
                found[f"{kind}, {dtype}, {scale_choice}, {weighed}"] = wrong
    return found


def untold(device: str) -> list[str]:
    """Return the values that are not finite and that the kernel says nothing of."""
    encoder = TritonEncoder(device)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for bad in (math.nan, math.inf, -math.inf):
            values = weight("normal").to(dtype)
            values[127, 255] = bad
            cpu, other = both(encoder, values, ScaleChoice("max"), None)
            assert not cpu[0]
            if other[0]:
                found.append(f"{bad} {dtype}")
    return found


def main(device: str, *, every: bool) -> None:
    """Print both as JSON."""
    found = {"differences": differences(device, every=every), "untold": untold(device)}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], every=sys.argv[2:] != ["some"])
