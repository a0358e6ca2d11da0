"""``quantization_config`` of GPTQ, as the official Qwen3.5 checkpoints have it.

``dynamic`` maps regular expressions to settings; with ``-:`` in front, modules that one matches
from the start of their names are not quantized. Source: the config.json of
Qwen/Qwen3.5-397B-A17B-GPTQ-Int4; GPTQModel 7.7 ``quantization/config.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.engine_modules import LOADED, Tool, fused_findings, loaded_as, skip_findings
from qwen35.codecs.int4.layout import FORMATS
from qwen35.errors import Finding, UsageError
from qwen35.linear_regex import MOST_PATTERNS, LinearPattern, compile_linear

__all__ = ["METHOD", "TOOL", "findings", "quantization_config"]

METHOD = "gptq"
_GROUPS = {name: kind.group for name, kind in FORMATS.items() if kind.gptq}
"""Codec to columns of a group."""

_EXCLUDED = "-:"


def quantization_config(modules: Sequence[LoaderModule]) -> dict[str, Any]:
    """Return the config of the official checkpoints, with what stays unpacked here."""
    return {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {f"{_EXCLUDED}{pattern}": {} for pattern in _excluded(modules)},
        "group_size": _group_of(modules),
        "lm_head": any(m.module == "lm_head" and m.codec in _GROUPS for m in modules),
        "quant_method": METHOD,
        "sym": True,
    }


def _group_of(modules: Sequence[LoaderModule]) -> int:
    groups = sorted({_GROUPS[module.codec] for module in modules if module.codec in _GROUPS})
    if len(groups) > 1:
        found = f"would leave groups of {groups[0]} and {groups[1]} in one checkpoint"
        raise UsageError("recipe", found, expected="one: GPTQ's config.json has one group_size")
    return groups[0]


def _excluded(modules: Sequence[LoaderModule]) -> list[str]:
    """Return patterns that match every unpacked linear layer and no packed one."""
    loaded = [m for m in modules if m.role.info.kind in LOADED and m.module != "lm_head"]
    packed = [module.module for module in loaded if module.codec in _GROUPS]
    plain = [module for module in loaded if module.codec not in _GROUPS]
    patterns = []
    for wide in (".*visual.*", ".*mtp.*", ".*attn.*", ".*shared_expert.*", r".*\.mlp\.gate$"):
        compiled = compile_linear(wide)
        matched = [module for module in plain if compiled.match(module.module)]
        if matched and not any(compiled.match(name) for name in packed):
            patterns.append(wide)
            plain = [module for module in plain if not compiled.match(module.module)]
    return [*patterns, *dict.fromkeys(f"{re.escape(loaded_as(m.module))}$" for m in plain)]


def findings(quantization: Mapping[str, Any], modules: Sequence[LoaderModule]) -> Iterator[Finding]:
    """Yield contradictions between ``quantization_config`` and the weights."""
    groups = {_GROUPS[module.codec] for module in modules if module.codec in _GROUPS}
    if not groups:
        yield Finding("quantization-config", "config.json", "promises GPTQ, but nothing is packed")
        return
    for key, expected in (("bits", 4), *(("group_size", group) for group in sorted(groups))):
        if quantization.get(key) != expected:
            message = f"{key} is {quantization.get(key)!r}, expected {expected!r}"
            yield Finding("quantization-config", "config.json", message)
    head = any(module.module == "lm_head" and module.codec in _GROUPS for module in modules)
    if bool(quantization.get("lm_head")) != head:
        message = f"lm_head is {quantization.get('lm_head')!r}"[:80]
        yield Finding("quantization-config", "config.json", f"{message}, expected {head}")
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        yield Finding("skip-list", "config.json", "dynamic is not a table of patterns")
        return
    if len(dynamic) > MOST_PATTERNS:
        message = f"dynamic has {len(dynamic)} patterns, expected {MOST_PATTERNS} at most"
        yield Finding("skip-list", "config.json", message)
        return
    listed = _listed(quantization.get("modules_in_block_to_quantize"))
    if listed is None or len(listed) > MOST_PATTERNS:
        message = "modules_in_block_to_quantize is no list of names, or too long"
        yield Finding("skip-list", "config.json", message)
        return
    excluded = list(_compiled(key for key in dynamic if key.startswith(_EXCLUDED)))
    where = "dynamic or modules_in_block_to_quantize" if listed else "dynamic"
    yield from skip_findings(
        modules,
        _GROUPS,
        skipped=lambda name: (
            any(pattern.match(name) for pattern in excluded)
            or (bool(listed) and not any(part in name for part in listed))
        ),
        asked=lambda module: module.role.info.kind != "router",
        words=(f"excluded by {where}", f"not excluded by {where}"),
    )
    yield from fused_findings(modules)


def _listed(value: object) -> list[str] | None:
    """Return parts of names of modules; engines quantize no others if there are any.

    None: it is malformed. Source: vLLM ``quantization/utils/gptq_utils.py``.
    """
    if not value:
        return []
    if not isinstance(value, list):
        return None
    flat = [name for one in value for name in (one if isinstance(one, list) else [one])]
    return flat if all(isinstance(name, str) for name in flat) else None


def _compiled(keys: Iterator[str]) -> Iterator[LinearPattern]:
    for key in keys:
        try:
            yield compile_linear(key.removeprefix(_EXCLUDED))
        except ValueError:  # no engine here reads it: what it would exclude is then missing
            continue


TOOL = Tool(quantization_config, findings, title="GPTQ")
