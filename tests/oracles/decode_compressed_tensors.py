"""Decode and encode weights with the library compressed-tensors, and parse its configs.

PYTHONPATH=tests python tests/oracles/decode_compressed_tensors.py WORK
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from compressed_tensors.utils.match import match_name

from oracles.answers import Answers, load, read_cases

ALONE = ("o_proj", "out_proj", "down_proj")
"""Weights with a scale of the whole of their own; others share it with what engines fuse."""

BLOCKS = QuantizationScheme(
    targets=["Linear"],
    weights={"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    format="float-quantized",
)
"""Block FP8 of the official checkpoints: the library's format under other names."""

Tensors = dict[str, torch.Tensor]


def scheme_of(module: str, stored: dict[str, Any]) -> QuantizationScheme:
    """Return how a module is quantized, as the library parses and matches what config.json says."""
    if stored["quant_method"] == "fp8":
        return BLOCKS
    config = QuantizationConfig.model_validate(stored)
    if any(match_name(module, entry) for entry in config.ignore):
        raise LookupError(f"{module} is ignored")
    for group in config.config_groups.values():
        if any(entry == "Linear" or match_name(module, entry) for entry in group.targets):
            return group
    raise LookupError(f"{module} is in no group")


def parts_of(tensors: Tensors, module: str) -> Tensors:
    """Return the tensors of a module by the library's names for them."""
    start = f"{module}."
    parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    if "weight_scale_inv" in parts:
        parts["weight_scale"] = parts.pop("weight_scale_inv")
    return parts


def decode(parts: Tensors, scheme: QuantizationScheme) -> torch.Tensor:
    """Return a weight as the library decodes it."""
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    decoded: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
    return decoded


def encode(weight: torch.Tensor, whole: torch.Tensor | None, scheme: QuantizationScheme) -> Tensors:
    """Return the tensors of a module as the library encodes them, in float32.

    The scales are rounded to bfloat16 first, as they are stored; the library rounds them last.
    """
    arguments = scheme.weights
    groups = weight.unflatten(1, (-1, arguments.group_size or weight.shape[1]))
    extremes = groups.amin(-1), groups.amax(-1)
    scales, zeros = calculate_qparams(*extremes, arguments, global_scale=whole)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    if whole is None:
        state["weight_scale"] = scales.bfloat16().float()
    else:
        state["weight_global_scale"] = whole
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    encoded: Tensors = compressor.compress(state, scheme)
    if whole is None:
        encoded["weight_scale"] = encoded["weight_scale"].bfloat16()
    return encoded


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same, bit for bit."""
    both = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    return one.dtype == other.dtype and bool(torch.equal(*both))


def as_near(parts: Tensors, others: Tensors, weight: torch.Tensor, scheme: Any) -> bool:
    """Return whether two encodings have equal errors: they differ where two codes are as near."""
    errors = [(decode(one, scheme).float() - weight).abs() for one in (parts, others)]
    return bool(((errors[0] - errors[1]).abs() <= 2**-7 * weight.abs()).all())


def encoding_differences(case: dict[str, Any], stored: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of weights that the library encodes to other bytes."""
    tensors, source = load(case["artifact"]), load(case["source"])
    for name in case["packed"]:
        module = name.removesuffix(".weight")
        scheme, parts = scheme_of(module, stored), parts_of(tensors, module)
        weight, whole = source[name].float(), parts.get("weight_global_scale")
        if whole is not None and module.endswith(ALONE):
            whole = generate_gparam(weight.min(), weight.max())
        encoded = encode(weight, whole, scheme)
        if parts.keys() != encoded.keys():
            yield f"{module}: has {sorted(parts)}, the library {sorted(encoded)}"
            continue
        differing = {part for part in parts if not same(parts[part], encoded[part])}
        sums = differing == {"weight_packed"} and not scheme.weights.symmetric
        if sums and as_near(parts, encoded, weight, scheme):
            continue  # it rounds sums with a zero point, halves to even ones
        yield from (f"{module}.{part}" for part in sorted(differing))


def main(work: Path) -> int:
    """Ask about every artifact that the library reads; 1 if one differs."""
    answers = Answers(work, "compressed-tensors")
    for name, case in read_cases(work).items():
        config = json.loads(Path(case["artifact"], "config.json").read_text())
        stored = config["quantization_config"]
        if stored["quant_method"] not in ("compressed-tensors", "fp8"):
            continue
        tensors, ours = load(case["artifact"]), load(case["decoded"])
        modules = {weight: weight.removesuffix(".weight") for weight in case["packed"]}
        theirs = {
            weight: decode(parts_of(tensors, module), scheme_of(module, stored))
            for weight, module in modules.items()
        }
        answers.decoded(name, theirs)
        wrong = [n for n, tensor in theirs.items() if not same(tensor, ours[n].bfloat16())]
        answers.tell(name, f"{len(theirs)} weights decoded", wrong)
        if case["by_largest"]:
            answers.tell(name, f"{len(theirs)} weights encoded", encoding_differences(case, stored))
    return answers.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
