"""``quantization_config`` and hf_quant_config.json of NVIDIA's Model-Optimizer.

``ignore`` holds names of modules and shell patterns (``mtp*``). Source: the config files of
nvidia/Qwen3.5-397B-A17B-NVFP4, Qwen3.5-122B-A10B-NVFP4, Qwen3.6-27B-NVFP4 and
Qwen3.6-35B-A3B-NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from qwen35.codecs.kv_cache import CacheForm
from qwen35.errors import Finding, InputError
from qwen35.linear_regex import MOST_PATTERNS
from qwen35.version import __version__

__all__ = ["ALGORITHMS", "METHOD", "TOOL", "findings", "hf_quant_config", "quantization_config"]

METHOD = "modelopt"
_DOCUMENT = "hf_quant_config.json"

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
            "kv_cache_quant_algo": "FP8" if quantization.get("kv_cache_scheme") else None,
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
        if not quantization.get("kv_cache_scheme"):  # which may be all that is quantized
            message = f"promises {METHOD}, but nothing is packed"
            yield Finding("quantization-config", "config.json", message)
        return
    yield from _algorithm_findings(quantization, modules)
    yield from _group_findings(quantization.get("config_groups"), _quantized_layers(modules))
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
        found = stored.get(module)
        entry = found if isinstance(found, dict) else {}
        if entry.get("quant_algo") != algorithm:
            named = entry.get("quant_algo")
            message = f"packed as {algorithm}, but quantized_layers says {named!r}"
            yield Finding("quantization-config", module, message)
        for key, value in _layer(algorithm).items():
            if entry.get(key, value) != value and key != "quant_algo":
                message = f"{key} is {entry[key]!r} in quantized_layers, expected {value!r}"
                yield Finding("quantization-config", module, message)
    for module in sorted(set(stored) - set(layers)):
        message = "in quantized_layers, but not packed"
        yield Finding("quantization-config", module, message)


def _group_findings(groups: object, layers: Mapping[str, str]) -> Iterator[Finding]:
    """Yield groups that describe other tensors than those of their targets.

    NVIDIA's files may name inputs beside an algorithm that has none: engines go by ``quant_algo``.
    """
    if groups is None:  # nor do all of them have groups
        return
    if not (isinstance(groups, dict) and all(isinstance(one, dict) for one in groups.values())):
        message = "config_groups is not a table of schemes"
        yield Finding("quantization-config", "config.json", message)
        return
    for name, group in groups.items():
        for algorithm in sorted(_algorithms(group.get("targets"), layers)):
            for part, expected in _GROUPS[algorithm].items():
                if not _agrees(group.get(part), expected):
                    message = f"{name}: {part} are {group.get(part)!r}"[:160]
                    yield Finding(
                        "quantization-config",
                        "config.json",
                        f"{message}, expected {dict(expected)!r}, as {algorithm} has them",
                    )


def _algorithms(targets: object, layers: Mapping[str, str]) -> set[str]:
    """Return the algorithms of the packed modules that a group has as targets."""
    if not isinstance(targets, list):
        return set()
    algorithms = set(layers.values())
    if len(algorithms) == 1 and "Linear" in targets:
        return algorithms
    return {layers[one] for one in targets if isinstance(one, str) and one in layers}


def _agrees(found: object, expected: Mapping[str, Any]) -> bool:
    if not isinstance(found, dict):
        return False
    return {"dynamic": False, **found}.items() >= expected.items()


def _documents_findings(
    quantization: Mapping[str, Any], read: Callable[[str], Any]
) -> Iterator[Finding]:
    """Yield where hf_quant_config.json says something else than config.json."""
    try:
        document = read(_DOCUMENT)
    except InputError as error:
        yield Finding("quantization-config", _DOCUMENT, error.message)
        return
    found = document.get("quantization") if isinstance(document, dict) else None
    if not isinstance(found, dict):
        message = "no table of the name quantization in it"
        yield Finding("quantization-config", _DOCUMENT, message)
        return
    pairs = {key: quantization.get(key) for key in ("quant_algo", "quantized_layers")}
    pairs["exclude_modules"] = quantization.get("ignore")
    for key, expected in pairs.items():
        if _unordered(found.get(key)) != _unordered(expected):
            message = f"{key} is not that of config.json"
            yield Finding("quantization-config", _DOCUMENT, message)
    algorithm = _GROUPS.get(str(quantization.get("quant_algo")), {"weights": {}})
    group = algorithm["weights"].get("group_size")
    if group and (found.get("group_size") or group) != group:
        message = f"group_size is {found['group_size']!r}"[:80]
        yield Finding("quantization-config", _DOCUMENT, f"{message}, expected {group}")
    # Model-Optimizer says FP8 here alone if all scales are 1, and then stores none.
    allowed = ("FP8",) if quantization.get("kv_cache_scheme") else (None, "FP8")
    cache = found.get("kv_cache_quant_algo")
    if cache not in allowed:
        expected = " or ".join(str(one or "null") for one in allowed)
        message = f"kv_cache_quant_algo is {cache!r}"[:80]
        yield Finding("quantization-config", _DOCUMENT, f"{message}, expected {expected}")


def _unordered(value: object) -> object:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return frozenset(value)
    return value


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
    return {_DOCUMENT: hf_quant_config(quantization)}


def _quantizes_inputs(quantization: Mapping[str, Any], codec: str) -> Callable[[str], bool | None]:
    expected, whole = ALGORITHMS[codec], quantization.get("quant_algo")
    stored = quantization.get("quantized_layers")
    layers = stored if whole == _MIXED and isinstance(stored, dict) else {}

    def quantizes(module: str) -> bool | None:
        entry = layers.get(loaded_as(module))
        found = entry.get("quant_algo") if isinstance(entry, dict) else whole
        return "input_activations" in _GROUPS[expected] if found == expected else None

    return quantizes


_CACHE = CacheForm((".k_proj.k_scale", ".v_proj.v_scale"), (), _FP8)
TOOL = Tool(
    quantization_config,
    findings,
    _documents,
    _CACHE,
    inputs=_quantizes_inputs,
    documents_findings=_documents_findings,
    title="ModelOpt",
)
