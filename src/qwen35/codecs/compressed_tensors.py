"""``quantization_config`` of compressed-tensors, for all codecs that it describes.

A group of modules has a scheme: how its weights and inputs are quantized. ``targets`` and
``ignore`` hold names of modules, ``re:`` and a regular expression that matches from the start of a
name, or ``Linear`` for every linear layer. Source: compressed-tensors 0.20
``quantization/quant_config.py``, ``utils/match.py``; what the loaders of transformers 5.24 and vLLM
0.32 do with it was tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.engine_modules import Tool, fused_findings, skip_findings, unpacked
from qwen35.errors import Finding
from qwen35.linear_regex import MOST_PATTERNS, LinearPattern, compile_linear

__all__ = ["METHOD", "SCHEMES", "TOOL", "Scheme", "findings", "quantization_config"]

METHOD = "compressed-tensors"
_LINEAR = "Linear"


@dataclass(frozen=True)
class Scheme:
    """How a group of modules is quantized.

    Args:
        format: the layout of its tensors.
        weights: arguments of the weights' quantization.
        inputs: those of the inputs, if they are quantized when the model runs.
    """

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        """Return the entry of ``config_groups``."""
        return {
            "format": self.format,
            "input_activations": dict(self.inputs) if self.inputs else None,
            "output_activations": None,
            "targets": list(targets),
            "weights": dict(self.weights),
        }


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **more}


_FP4 = _arguments(
    4, "float", "tensor_group", group_size=16, dynamic=False, scale_dtype="torch.float8_e4m3fn"
)
_FP4_INPUTS = _FP4 | {"dynamic": "local", "observer": "static_minmax"}
"""The scale of the whole is stored, those of blocks are found when the model runs."""


def _int4(group: int, *, symmetric: bool = True) -> Scheme:
    weights = _arguments(4, "int", "group", group_size=group, dynamic=False)
    return Scheme("pack-quantized", weights | {"symmetric": symmetric})


SCHEMES: Mapping[str, Scheme] = {
    "nvfp4": Scheme("nvfp4-pack-quantized", _FP4),
    "nvfp4-a4": Scheme("nvfp4-pack-quantized", _FP4, _FP4_INPUTS),
    "int4": _int4(128),
    "int4-g32": _int4(32),
    "int4-asym": _int4(128, symmetric=False),
    "int4-g32-asym": _int4(32, symmetric=False),
    "fp8-channel": Scheme(
        "float-quantized",
        _arguments(8, "float", "channel", dynamic=False),
        _arguments(8, "float", "token", dynamic=True),
    ),
}
"""Codec to scheme."""


def quantization_config(modules: Sequence[LoaderModule]) -> dict[str, Any]:
    """Return the config that llm-compressor writes for these weights."""
    used = [name for name in SCHEMES if any(module.codec == name for module in modules)]
    groups = {
        f"group_{i}": SCHEMES[name].group(_targets(name, modules, alone=len(used) == 1))
        for i, name in enumerate(used)
    }
    formats = {SCHEMES[name].format for name in used}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(used) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignored_modules(modules),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def _targets(codec: str, modules: Sequence[LoaderModule], *, alone: bool) -> list[str]:
    """Return the targets of a scheme; what is ignored may match too, since that is asked first."""
    if alone:
        return [_LINEAR]
    packed = [module for module in modules if module.codec in SCHEMES]
    return _entries(
        [module for module in packed if module.codec == codec],
        [module for module in packed if module.codec != codec],
    )


def ignored_modules(modules: Sequence[LoaderModule]) -> list[str]:
    """Return ``ignore``: what covers every unpacked linear layer, and no packed one.

    The head is listed even where it is tied and has no tensor. MTP and the vision tower are covered
    by patterns where nothing of them is packed: SGLang drops MTP layers, without a word, if their
    parts are listed one by one, and vLLM asks for modules under names of its own.
    """
    whole = {scope: f"re:.*{scope}.*" for scope in ("visual", "mtp")}
    entries, rest, packed = unpacked(modules, SCHEMES, whole)
    return entries + _entries(rest, packed)


def _entries(wanted: Sequence[LoaderModule], others: Sequence[LoaderModule]) -> list[str]:
    """Return patterns, or where those would match others, names that cover modules."""
    entries: list[str] = []
    for role in sorted({_loaded_as(module.role.name) for module in wanted}):
        name = role.removeprefix("mtp.layers.").removeprefix("mtp.").removeprefix("visual.blocks.")
        end = r"(\..*)?$" if name.endswith(".experts") else "$"
        pattern = rf"re:.*\.{re.escape(name)}{end}"
        if any(_matches(pattern, module.module) for module in others):
            names = (m.module for m in wanted if _loaded_as(m.role.name) == role)
            entries += dict.fromkeys(names)
        else:
            entries.append(pattern)
    return list(dict.fromkeys(entries))


def _loaded_as(role: str) -> str:
    """Return a role; all experts of a layer are one module."""
    before, experts, _ = role.partition("mlp.experts.")
    return f"{before}mlp.experts" if experts else role


def _matches(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return entry == module
    pattern = _compiled(entry)
    return pattern is not None and bool(pattern.match(module))


@cache
def _compiled(entry: str) -> LinearPattern | None:
    try:
        return compile_linear(entry.removeprefix("re:"))
    except ValueError:
        return None


# --- checks


def findings(quantization: Mapping[str, Any], modules: Sequence[LoaderModule]) -> Iterator[Finding]:
    """Yield contradictions between ``quantization_config`` and the weights."""
    if not any(module.codec in SCHEMES for module in modules):
        message = f"promises {METHOD}, but nothing is packed"
        yield Finding("quantization-config", "config.json", message)
        return
    ignore, groups = quantization.get("ignore"), quantization.get("config_groups")
    if not (isinstance(ignore, list) and _is_names(ignore)):
        yield Finding("skip-list", "config.json", "ignore is not a list of names")
        return
    if not (isinstance(groups, dict) and all(_is_group(group) for group in groups.values())):
        message = "config_groups is not a table of schemes with targets"
        yield Finding("quantization-config", "config.json", message)
        return
    targets = [target for group in groups.values() for target in group["targets"]]
    patterns = [entry for entry in {*ignore, *targets} if entry.startswith("re:")]
    if len(patterns) > MOST_PATTERNS:
        message = f"ignore and targets have {len(patterns)} patterns, expected {MOST_PATTERNS}"
        yield Finding("skip-list", "config.json", f"{message} at most")
        return
    for entry in [e for e in ignore if e.startswith("re:") and _compiled(e) is None]:
        message = f"ignore has {entry!r}, no regular expression that RE2 reads"
        yield Finding("skip-list", "config.json", message)
    yield from _scheme_findings(groups, modules)
    yield from _ignore_findings(ignore, groups, modules)
    yield from fused_findings(modules)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_group(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("weights"), dict)
        and _is_names(value.get("targets"))
    )


def _scheme_findings(
    groups: Mapping[str, Any], modules: Sequence[LoaderModule]
) -> Iterator[Finding]:
    """Yield modules whose group describes another packing, once for each group and codec."""
    told = set()
    for module in modules:
        scheme, name = SCHEMES.get(module.codec), _group_of(module.module, groups)
        if scheme is None or (name, module.codec) in told:
            continue
        told.add((name, module.codec))
        if name is None:
            message = f"packed as {module.codec}, but no group of config_groups has it as a target"
            yield Finding("quantization-config", module.spec.name, message)
            continue
        for key, value in scheme.weights.items():
            found = groups[name]["weights"].get(key)
            if found != value and not (found is None and key == "scale_dtype"):
                message = f"{name}: {key} of the weights is {found!r}, expected {value!r}"
                yield Finding("quantization-config", "config.json", message)


def _group_of(module: str, groups: Mapping[str, Any]) -> str | None:
    """Return the first group that has a module as a target, by name before by class."""
    for name, group in groups.items():
        if any(_matches(target, module) for target in group["targets"]):
            return name
    return next((name for name, group in groups.items() if _LINEAR in group["targets"]), None)


def _ignore_findings(
    ignore: Sequence[str], groups: Mapping[str, Any], modules: Sequence[LoaderModule]
) -> Iterator[Finding]:
    def ignored(module: str) -> bool:
        return any(_matches(entry, module) for entry in ignore)

    head = any(m.module == "lm_head" and m.codec in SCHEMES for m in modules)
    if not head and not ignored("lm_head") and _group_of("lm_head", groups):
        message = "not in ignore, so engines would look for its scales, also if it is tied"
        yield Finding("skip-list", "lm_head", message)
    yield from skip_findings(
        modules,
        SCHEMES,
        skipped=ignored,
        asked=lambda module: _group_of(module.module, groups) is not None,
    )
    mtp = [module for module in modules if module.role.scope == "mtp"]
    packed_mtp = any(module.codec in SCHEMES for module in mtp)
    if mtp and not packed_mtp and not ignored("mtp.layers.0.self_attn.qkv_proj"):
        message = "in ignore by single names: SGLang then drops MTP; give a pattern, re:.*mtp.*"
        yield Finding("skip-list", "mtp", message)


TOOL = Tool(quantization_config, findings)
