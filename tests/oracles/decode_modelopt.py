"""Decode, and encode, weights with NVIDIA's library ModelOpt.

PYTHONPATH=tests python tests/oracles/decode_modelopt.py WORK
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

from oracles.answers import Answers, load, read_cases

ALONE = ("o_proj", "out_proj", "down_proj")
"""Weights with a scale of the whole of their own; others share it with what engines fuse."""

BLOCK = 16

Tensors = dict[str, torch.Tensor]


def decoded_nvfp4(packed: Any, scales: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return an NVFP4 weight as the library decodes it in float32."""
    decoded: torch.Tensor = packed.dequantize(
        dtype=torch.float32,
        scale=scales,
        double_scale=whole,
        block_sizes={-1: BLOCK},
        fast=False,
    )
    return decoded


def decode(tensors: Tensors, module: str) -> torch.Tensor:
    """Return a weight as the library decodes it in float32."""
    codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if codes.dtype == torch.float8_e4m3fn:
        whole = FP8QTensor(codes.shape, torch.float32, codes)
        decoded: torch.Tensor = whole.dequantize(torch.float32, scale=scale)
        return decoded
    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    packed = NVFP4QTensor(shape, torch.float32, codes)
    return decoded_nvfp4(packed, scale, tensors[f"{module}.weight_scale_2"])


def far(exact: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether there is a number to which one of two is visibly nearer than the other."""
    middle = (one.double() + other.double()) / 2
    apart = (one != other) & ((exact - middle).abs() > 1e-6 * exact.abs())
    return bool(apart.any())


def encoding_differences(case: dict[str, Any]) -> Iterator[str]:
    """Yield parts of weights that the library encodes to what is not as near as ours.

    We divide by the scale of the whole as compressed-tensors does, so that both layouts have the
    same codes; the library multiplies. They differ where a number is halfway between two.
    """
    tensors, ours = load(case["artifact"]), load(case["decoded"])
    source = load(case["source"])
    for name in case["packed"]:
        module = name.removesuffix(".weight")
        scales, whole = tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
        weight = source[name].float()
        given = None if module.endswith(ALONE) else whole
        _, found, found_whole = NVFP4QTensor.quantize(weight, BLOCK, weights_scaling_factor_2=given)
        largest = weight.unflatten(1, (-1, BLOCK)).abs().amax(-1)
        if not torch.equal(found_whole, whole):
            yield f"{module}.weight_scale_2"
        if far(largest.double() / (6 * whole.double()), found.float(), scales.float()):
            yield f"{module}.weight_scale"
        codes, _, _ = NVFP4QTensor.quantize(weight, BLOCK, scales.float(), whole)
        if far(weight.double(), decoded_nvfp4(codes, scales, whole), ours[name]):
            yield name


def main(work: Path) -> int:
    """Ask about every artifact in its layout; 1 if one differs."""
    answers = Answers(work, "modelopt")
    for name, case in read_cases(work).items():
        config = json.loads(Path(case["artifact"], "config.json").read_text())
        if config["quantization_config"]["quant_method"] != "modelopt":
            continue
        tensors, ours = load(case["artifact"]), load(case["decoded"])
        theirs = {n: decode(tensors, n.removesuffix(".weight")) for n in case["packed"]}
        answers.decoded(name, theirs)
        wrong = [n for n, t in theirs.items() if not torch.equal(t, ours[n])]
        answers.tell(name, f"{len(theirs)} weights decoded in float32", wrong)
        if case["by_largest"]:
            answers.tell(name, f"{len(theirs)} weights encoded", encoding_differences(case))
    return answers.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
