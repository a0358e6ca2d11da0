"""``quantization_config`` and hf_quant_config.json of NVIDIA's Model-Optimizer.

``ignore`` holds names of modules and shell patterns (``mtp*``). Source: the config files of
nvidia/Qwen3.5-397B-A17B-NVFP4, Qwen3.5-122B-A10B-NVFP4, Qwen3.6-27B-NVFP4 and
Qwen3.6-35B-A3B-NVFP4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.engine_modules import (
    Tool,
    fused_findings,
    loaded_as,
    skip_findings,
    unpacked,
)
from qwen35.errors import Finding
from qwen35.linear_regex import MOST_PATTERNS
from qwen35.version import __version__

__all__ = ["ALGORITHMS", "METHOD", "TOOL", "findings", "hf_quant_config", "quantization_config"]

METHOD = "modelopt"

ALGORITHMS: Mapping[str, str] = {
    "fp8-modelopt": "FP8",
    "nvfp4-modelopt": "W4A16_NVFP4",
    "nvfp4-a4-modelopt": "NVFP4",
}
"""Codec to ``quant_algo``."""

_MIXED = "MIXED_PRECISION"
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"}
_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "W4A16_NVFP4": {"weights": _FP4},
    "NVFP4": {"input_activations": _FP4, "weights": _FP4},
}


def quantization_config(modules: Sequence[LoaderModule]) -> dict[str, Any]:
    """Return the section that Model-Optimizer writes into config.json."""
    layers = _quantized_layers(modules)
    used = [name for name in _GROUPS if name in layers.values()]
    targets = {name: sorted(m for m, one in layers.items() if one == name) for name in used}
    mixed = len(used) > 1
    groups = {
        f"group_{i}": {**_GROUPS[name], "targets": targets[name] if mixed else ["Linear"]}
        for i, name in enumerate(used)
    }
    each = {"quantized_layers": {m: _layer(one) for m, one in sorted(layers.items())}}
    return {
        "config_groups": groups,
        "ignore": ignored_modules(modules),
        "producer": {"name": "qwen35", "version": __version__},
        "quant_algo": _MIXED if mixed else used[0],
        "quant_method": METHOD,
        **(each if mixed else {}),
    }


def _quantized_layers(modules: Sequence[LoaderModule]) -> dict[str, str]:
    """Return the algorithm of each packed module; the experts of a layer are one."""
    packed = [module for module in modules if module.codec in ALGORITHMS]
    return {loaded_as(module.module): ALGORITHMS[module.codec] for module in packed}


def _layer(algorithm: str) -> dict[str, Any]:
    weights = _GROUPS[algorithm]["weights"]
    group = {key: weights[key] for key in ("group_size",) if key in weights}
    return {"quant_algo": algorithm, **group}


def hf_quant_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return hf_quant_config.json, which says the same to TensorRT."""
    keys = ("quant_algo", "quantized_layers")
    same = {key: quantization[key] for key in keys if key in quantization}
    group = {} if "quantized_layers" in same else _layer(quantization["quant_algo"])
    return {
        "producer": quantization["producer"],
        "quantization": {
            **group,
            "exclude_modules": quantization["ignore"],
            "kv_cache_quant_algo": None,
            **same,
        },
    }


def ignored_modules(modules: Sequence[LoaderModule]) -> list[str]:
    """Return ``ignore``: names of unpacked linear layers; one pattern each for tower and MTP."""
    whole = {"visual": "model.visual*", "mtp": "mtp*"}
    entries, rest, _ = unpacked(modules, ALGORITHMS, whole)
    names = {loaded_as(module.module) for module in rest}
    return entries + sorted(f"{one}*" if one.endswith(".experts") else one for one in names)


def findings(quantization: Mapping[str, Any], modules: Sequence[LoaderModule]) -> Iterator[Finding]:
    """Yield contradictions between ``quantization_config`` and the weights."""
    packed = {module.codec for module in modules if module.codec in ALGORITHMS}
    if not packed:
        message = f"promises {METHOD}, but nothing is packed"
        yield Finding("quantization-config", "config.json", message)
        return
    yield from _algorithm_findings(quantization, modules)
    ignore = quantization.get("ignore")
    if not (isinstance(ignore, list) and all(isinstance(entry, str) for entry in ignore)):
        yield Finding("skip-list", "config.json", "ignore is not a list of names")
        return
    mixed = quantization.get("quant_algo") == _MIXED
    yield from _ignore_findings(ignore, modules, complete=not mixed)
    yield from fused_findings(modules)


def _algorithm_findings(
    quantization: Mapping[str, Any], modules: Sequence[LoaderModule]
) -> Iterator[Finding]:
    layers = _quantized_layers(modules)
    used = sorted(set(layers.values()))
    found, expected = quantization.get("quant_algo"), _MIXED if len(used) > 1 else used[0]
    if found != expected and found != _MIXED:
        message = f"quant_algo is {found!r}, expected {expected}"
        yield Finding("quantization-config", "config.json", message)
    if found != _MIXED:
        return
    stored = quantization.get("quantized_layers")
    if not isinstance(stored, dict):
        message = "quantized_layers is not a table of modules"
        yield Finding("quantization-config", "config.json", message)
        return
    for module, algorithm in layers.items():
        entry = stored.get(module)
        named = entry.get("quant_algo") if isinstance(entry, dict) else None
        if named != algorithm:
            message = f"packed as {algorithm}, but quantized_layers says {named!r}"
            yield Finding("quantization-config", module, message)
    for module in sorted(set(stored) - set(layers)):
        message = "in quantized_layers, but not packed"
        yield Finding("quantization-config", module, message)


def _ignore_findings(
    ignore: Sequence[str], modules: Sequence[LoaderModule], *, complete: bool
) -> Iterator[Finding]:
    """Yield contradictions between ``ignore`` and the weights.

    Args:
        ignore: names and patterns.
        modules: every weight of the artifact.
        complete: whether it must cover all that is not packed; mixed precision lists what is.
    """
    names = {entry for entry in ignore if "*" not in entry}
    patterns = [entry for entry in ignore if "*" in entry]
    if len(patterns) > MOST_PATTERNS:
        message = f"ignore has {len(patterns)} patterns, expected {MOST_PATTERNS} at most"
        yield Finding("skip-list", "config.json", message)
        return

    def ignored(module: str) -> bool:
        return module in names or any(fnmatchcase(module, pattern) for pattern in patterns)

    head = any(m.module == "lm_head" and m.codec in ALGORITHMS for m in modules)
    if complete and not head and not ignored("lm_head"):
        message = "not in ignore, so engines would look for its scales, also if it is tied"
        yield Finding("skip-list", "lm_head", message)
    yield from skip_findings(
        modules,
        ALGORITHMS,
        skipped=ignored,
        asked=lambda module: complete and module.role.info.kind != "router",  # as NVIDIA's files
    )


def _documents(quantization: Mapping[str, Any]) -> dict[str, Any]:
    return {"hf_quant_config.json": hf_quant_config(quantization)}


TOOL = Tool(quantization_config, findings, _documents)
