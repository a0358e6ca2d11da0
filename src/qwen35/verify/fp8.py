"""What serving engines need of an FP8 checkpoint: lists, groups, tiles. Headers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen35.checkpoint.inventory import Item
from qwen35.checkpoint.storage import FP8_BLOCK
from qwen35.errors import Finding, UsageError
from qwen35.model.config import ModelConfig
from qwen35.model.fused import fused_group

__all__ = ["fp8_findings", "tensor_parallel_findings"]

_LIST = "modules_to_not_convert"
_ROW_SPLIT = ("o_proj", "out_proj", "down_proj")
"""Layers whose input an engine splits; all others are split by their output."""


def fp8_findings(config: ModelConfig, items: Sequence[Item]) -> Iterator[Finding]:
    """Check config.json against the weights, as vLLM, SGLang and transformers read both."""
    quantization = config.quantization or {}
    if not any(item.weight.storage == "fp8" for item in items):
        yield Finding("quantization-config", "config.json", "promises FP8, but nothing is packed")
        return
    expected = {"weight_block_size": [FP8_BLOCK, FP8_BLOCK], "activation_scheme": "dynamic"}
    for key, value in expected.items():
        if quantization.get(key) != value:
            message = f"{key} is {quantization.get(key)!r}, expected {value!r}"
            yield Finding("quantization-config", "config.json", message)
    yield from _list_findings(quantization.get(_LIST), items)
    yield from _group_findings(items)


def _module(item: Item) -> str:
    """Name the module that engines make of a weight; all experts of a layer are one."""
    name = item.spec.name.removesuffix(".weight")
    layer, found, _ = name.partition(".mlp.experts.")
    return f"{layer}.mlp.experts" if found else name


def _list_findings(entries: object, items: Sequence[Item]) -> Iterator[Finding]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        yield Finding("skip-list", "config.json", f"{_LIST} is not a list of names")
        return
    listed = set(entries)
    if "lm_head" not in listed:
        message = f"not in {_LIST}, so transformers would look for its scale"
        yield Finding("skip-list", "lm_head", message)
    names = {"lm_head"}
    for item in items:
        module, full = _module(item), item.spec.name.removesuffix(".weight")
        names |= {module, full}
        packed = item.weight.storage == "fp8"
        found = module in listed or full in listed
        if packed and found:
            yield Finding("skip-list", full, f"packed, but {_LIST} says it is not")
        elif not packed and not found and item.role.info.kind in ("linear", "router", "experts"):
            yield Finding("skip-list", full, f"not packed, and missing from {_LIST}")
    for entry in sorted(listed - names):
        yield Finding("skip-list", entry, f"in {_LIST}, but no module of this model")


def _group_findings(items: Sequence[Item]) -> Iterator[Finding]:
    first: dict[object, Item] = {}
    reported = set()
    for item in items:
        key = fused_group(item.role)
        if key is None or key in reported:
            continue
        other = first.setdefault(key, item)
        if (item.weight.storage == "fp8") != (other.weight.storage == "fp8"):
            reported.add(key)
            packed, plain = (item, other) if item.weight.storage == "fp8" else (other, item)
            message = f"packed, but not {plain.spec.name}: engines load both as {key[2]}"
            yield Finding("fused-group", packed.spec.name, message)


def tensor_parallel_findings(
    config: ModelConfig, items: Sequence[Item], ranks: int
) -> list[Finding]:
    """Return the FP8 weights that `ranks` GPUs could not share in whole tiles.

    An engine splits the output of most layers and the input of those that end a block; each part
    must be a multiple of 128 (vLLM 0.32 ``fp8_utils.validate_fp8_block_shape``). Queries, keys and
    values of linear attention are parts of one matrix, each split by itself; key and value heads
    of full attention fewer than `ranks` are repeated instead.

    Raises:
        UsageError: the config does not say FP8, nor is any weight stored so.
    """
    said = (config.quantization or {}).get("quant_method") == "fp8"
    if not said and not any(item.weight.storage == "fp8" for item in items):
        hint = "leave it out"
        raise UsageError("--tensor-parallel", "there are no FP8 weights here", hint=hint)
    findings: dict[tuple[str, tuple[int, ...]], Finding] = {}
    for item in items:
        if item.weight.storage != "fp8" or item.role.scope == "visual":
            continue
        leaf = item.role.name.rpartition(".")[2]
        axis = 1 if leaf in _ROW_SPLIT else 0
        size, parts = item.spec.shape[axis], ranks
        if leaf == "in_proj_qkv":  # values have as many rows as in_proj_z, which is checked
            size = (config.dims["linear_qkv"] - config.dims["linear_value"]) // 2
        if leaf in ("k_proj", "v_proj"):
            parts = min(ranks, size // config.dims["head"])
        if size % (parts * FP8_BLOCK):
            message = (
                f"{item.role.name}: {size} {'columns' if axis else 'rows'} over {parts} GPUs are "
                f"{size / parts:g} each, expected a multiple of {FP8_BLOCK}"
            )
            findings.setdefault(
                (item.role.name, item.spec.shape),
                Finding("tensor-parallel", item.spec.name, message),
            )
    return list(findings.values())
