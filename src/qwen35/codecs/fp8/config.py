"""``quantization_config`` of block FP8, and checks of what serving engines require."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.engine_modules import fused_findings, loaded_as
from qwen35.codecs.fp8.layout import BLOCK
from qwen35.errors import Finding
from qwen35.model.model_config import ModelConfig

__all__ = ["findings", "quantization_config", "tensor_parallel_findings", "unconverted_modules"]

_LIST = "modules_to_not_convert"
_ROW_SPLIT = ("o_proj", "out_proj", "down_proj")
"""Layers that tensor parallelism splits by input; all others are split by output."""


def quantization_config(modules: Sequence[LoaderModule]) -> dict[str, Any]:
    """Return the config of the official FP8 checkpoints plus ``fmt``, which some readers need."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "weight_block_size": [BLOCK, BLOCK],
        _LIST: unconverted_modules(modules),
    }


def unconverted_modules(modules: Sequence[LoaderModule]) -> list[str]:
    """Return ``modules_to_not_convert``: full names of all modules with a matrix that is not FP8.

    The head is always listed: any list disables transformers' default exception for it, and a tied
    head has no tensor. Unpacked experts are listed as the single module that engines create.
    """
    return sorted(
        {"lm_head"}
        | {loaded_as(m.module) for m in modules if m.codec == "plain" and len(m.spec.shape) > 1}
    )


def findings(quantization: Mapping[str, Any], modules: Sequence[LoaderModule]) -> Iterator[Finding]:
    """Check config.json against the weights, as vLLM, SGLang and transformers read both."""
    if not any(module.codec == "fp8" for module in modules):
        yield Finding("quantization-config", "config.json", "promises FP8, but nothing is packed")
        return
    expected = {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    for key, value in expected.items():
        if quantization.get(key) != value:
            message = f"{key} is {quantization.get(key)!r}, expected {value!r}"
            yield Finding("quantization-config", "config.json", message)
    yield from _list_findings(quantization.get(_LIST), modules)
    yield from fused_findings(modules)


def _list_findings(entries: object, modules: Sequence[LoaderModule]) -> Iterator[Finding]:
    if entries is None:  # transformers then leaves the head alone (`get_keys_to_not_convert`)
        entries = ["lm_head"]
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        yield Finding("skip-list", "config.json", f"{_LIST} is not a list of names")
        return
    listed = set(entries)
    if "lm_head" not in listed:
        message = f"not in {_LIST}, so transformers would look for its scale"
        yield Finding("skip-list", "lm_head", message)
    names = {"lm_head"}
    for module in modules:
        full, joint = module.module, loaded_as(module.module)
        names |= {joint, full}
        packed = module.codec == "fp8"
        skip = joint in listed or full in listed
        if packed and skip:
            yield Finding("skip-list", full, f"packed, but {_LIST} says it is not")
        elif not packed and not skip and module.role.info.kind in ("linear", "router", "experts"):
            yield Finding("skip-list", full, f"not packed, and missing from {_LIST}")
    for entry in sorted(listed - names):
        yield Finding("skip-list", entry, f"in {_LIST}, but no module of this model")


def tensor_parallel_findings(
    config: ModelConfig, modules: Sequence[LoaderModule], ranks: int
) -> list[Finding]:
    """Return the FP8 weights that `ranks` GPUs cannot split into whole tiles.

    Engines split most layers by output and those that end a block by input; each part must be a
    multiple of 128 (vLLM 0.32 ``fp8_utils.validate_fp8_block_shape``). Queries, keys and values of
    linear attention share a matrix but are split separately; full attention replicates key and
    value heads if there are fewer than `ranks`.
    """
    findings: dict[tuple[str, tuple[int, ...]], Finding] = {}
    for module in modules:
        if module.codec != "fp8" or module.role.scope == "visual":
            continue
        leaf = module.role.name.rpartition(".")[2]
        axis = 1 if leaf in _ROW_SPLIT else 0
        size, parts = module.spec.shape[axis], ranks
        if leaf == "in_proj_qkv":  # rows of the keys; in_proj_z covers those of the values
            size = (config.dims["linear_qkv"] - config.dims["linear_value"]) // 2
        if leaf in ("k_proj", "v_proj"):
            parts = min(ranks, size // config.dims["head"])
        if size % (parts * BLOCK):
            message = (
                f"{module.role.name}: {size} {'columns' if axis else 'rows'} over {parts} GPUs are "
                f"{size / parts:g} each, expected a multiple of {BLOCK}"
            )
            findings.setdefault(  # one finding per role and shape, not one per layer
                (module.role.name, module.spec.shape),
                Finding("tensor-parallel", module.spec.name, message),
            )
    return list(findings.values())
