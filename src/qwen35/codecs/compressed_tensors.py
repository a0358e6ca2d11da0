"""``quantization_config`` of compressed-tensors, for all codecs that it describes.

A group of modules has a scheme: how its weights and inputs are quantized. ``targets`` and
``ignore`` hold names of modules, ``re:`` and a regular expression that matches from the start of a
name, or ``Linear`` for every linear layer. Source: compressed-tensors 0.20
``quantization/quant_config.py``, ``utils/match.py``; what the loaders of transformers 5.24 and vLLM
0.32 do with it was tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.engine_modules import Tool, fused_findings, skip_findings, unpacked
from qwen35.codecs.kv_cache import CacheForm
from qwen35.errors import Finding
from qwen35.linear_regex import MOST_PATTERNS, LinearPattern, compile_linear

__all__ = ["METHOD", "SCHEMES", "TOOL", "Scheme", "findings", "matcher", "quantization_config"]

METHOD = "compressed-tensors"
_LINEAR = "Linear"
_MIXED = "mixed-precision"
_DEFAULTS = {"dynamic": False, "symmetric": True}
_OPTIONAL = ("scale_dtype",)
_UNCOMPARED = ("observer",)
"""Arguments of a quantization: what they are if not given, which need not be, which say nothing of
tensors."""


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
        "format": formats.pop() if len(used) == 1 else _MIXED,
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
        begin = r"(.*\.)?" if role == "lm_head" else r".*\."  # no part of anything, or of a wrapper
        end = r"(\..*)?$" if name.endswith(".experts") else "$"
        pattern = rf"re:{begin}{re.escape(name)}{end}"
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


def matcher(entries: Sequence[str]) -> Callable[[str], bool]:
    """Return whether any of these entries has a module, for checks of many."""
    names = {entry for entry in entries if not entry.startswith("re:")}
    found = (_compiled(entry) for entry in entries if entry.startswith("re:"))
    patterns = [pattern for pattern in found if pattern is not None]
    return lambda module: module in names or any(pattern.match(module) for pattern in patterns)


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
        if not quantization.get("kv_cache_scheme"):  # which may be all that is quantized
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
    group_of = _grouping(groups)
    yield from _scheme_findings(groups, group_of, modules, quantization.get("format"))
    yield from _ignore_findings(ignore, group_of, modules)
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
    groups: Mapping[str, Any],
    group_of: Callable[[str], str | None],
    modules: Sequence[LoaderModule],
    whole: object,
) -> Iterator[Finding]:
    """Yield modules whose group describes another packing, once for each group and codec.

    `whole` is the format of all groups that name none.
    """
    told = set()
    known = [_MIXED, *{one for m in modules if m.codec in SCHEMES for one in _formats(m.codec)}]
    if whole is not None and whole not in known:
        message = f"format is {_shown(whole)}, expected {' or '.join(sorted(known))}"
        yield Finding("quantization-config", "config.json", message)
    for module in modules:
        scheme, name = SCHEMES.get(module.codec), group_of(module.module)
        if scheme is None or (name, module.codec) in told:
            continue
        told.add((name, module.codec))
        if name is None:
            message = f"packed as {module.codec}, but no group of config_groups has it as a target"
            yield Finding("quantization-config", module.spec.name, message)
            continue
        for message in _contradictions(groups[name], module.codec, whole):
            yield Finding("quantization-config", "config.json", f"{name}: {message}")


def _formats(codec: str) -> tuple[str, ...]:
    """Return the names of a layout; naive-quantized stores 8-bit floats in the same way."""
    name = SCHEMES[codec].format
    return (name, "naive-quantized") if name == "float-quantized" else (name,)


def _contradictions(group: Mapping[str, Any], codec: str, whole: object) -> Iterator[str]:
    """Yield where a group describes other tensors than those of a codec."""
    scheme, found = SCHEMES[codec], group.get("format") or whole
    if found not in _formats(codec):
        yield f"format is {_shown(found)}, expected {scheme.format!r}"
    yield from _differences("weights", group["weights"], scheme.weights)
    inputs = group.get("input_activations")
    if scheme.inputs is None:
        if inputs:
            yield f"input_activations are given, but weights packed as {codec} have none"
    elif inputs:
        yield from _differences("inputs", inputs, scheme.inputs)
    elif scheme.inputs["dynamic"] is not True:  # without a stored scale, either is right
        yield f"no input_activations, but weights packed as {codec} have scales of their inputs"


def _differences(what: str, found: object, expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield which arguments of a quantization are others than expected."""
    if not isinstance(found, dict):
        yield f"{what} are {_shown(found)}, expected a table"
        return
    for key, value in expected.items():
        given = found.get(key)
        given = _DEFAULTS.get(key, value if key in _OPTIONAL else None) if given is None else given
        if given != value and key not in _UNCOMPARED:
            yield f"{key} of the {what} is {_shown(given)}, expected {value!r}"


def _shown(value: object) -> str:
    return repr(value)[:80]


def _grouping(groups: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Return what gives the first group that has a module as a target, by name before by class."""
    matchers = {name: matcher(group["targets"]) for name, group in groups.items()}
    of_class = next((name for name, group in groups.items() if _LINEAR in group["targets"]), None)
    return lambda module: next((n for n, has in matchers.items() if has(module)), of_class)


def _ignore_findings(
    ignore: Sequence[str],
    group_of: Callable[[str], str | None],
    modules: Sequence[LoaderModule],
) -> Iterator[Finding]:
    ignored = matcher(ignore)
    head = any(m.module == "lm_head" and m.codec in SCHEMES for m in modules)
    if not head and not ignored("lm_head") and group_of("lm_head"):
        message = "not in ignore, so engines would look for its scales, also if it is tied"
        yield Finding("skip-list", "lm_head", message)
    yield from skip_findings(
        modules,
        SCHEMES,
        skipped=ignored,
        asked=lambda module: group_of(module.module) is not None,
    )
    mtp = [module for module in modules if module.role.scope == "mtp"]
    packed_mtp = any(module.codec in SCHEMES for module in mtp)
    if mtp and not packed_mtp and not ignored("mtp.layers.0.self_attn.qkv_proj"):
        message = "in ignore by single names: SGLang then drops MTP; give a pattern, re:.*mtp.*"
        yield Finding("skip-list", "mtp", message)


def _quantizes_inputs(quantization: Mapping[str, Any], codec: str) -> Callable[[str], bool | None]:
    expected, groups = SCHEMES[codec].inputs, quantization.get("config_groups")
    if not (isinstance(groups, dict) and all(_is_group(group) for group in groups.values())):
        return lambda _: None if expected else False
    group_of = _grouping(groups)

    def quantizes(module: str) -> bool | None:
        name = group_of(module)
        found = groups[name].get("input_activations") if name is not None else None
        if not found:
            return False
        return None if expected is None or any(_differences("", found, expected)) else True

    return quantizes


_CACHE = CacheForm(
    (".k_scale", ".v_scale"),
    (1,),
    {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
)
TOOL = Tool(
    quantization_config,
    findings,
    cache=_CACHE,
    inputs=_quantizes_inputs,
    title=METHOD,
    needs=METHOD,
)
