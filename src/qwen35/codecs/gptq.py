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
from qwen35.codecs.engine_modules import LOADED, fused_findings, loaded_as
from qwen35.errors import Finding
from qwen35.linear_regex import MOST_PATTERNS, LinearPattern, compile_linear

__all__ = ["findings", "quantization_config"]

_EXCLUDED = "-:"


def quantization_config(modules: Sequence[LoaderModule], group: int) -> dict[str, Any]:
    """Return the config of the official checkpoints, with what stays unpacked here."""
    return {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {f"{_EXCLUDED}{pattern}": {} for pattern in _excluded(modules)},
        "group_size": group,
        "lm_head": any(m.module == "lm_head" and _is_packed(m) for m in modules),
        "quant_method": "gptq",
        "sym": True,
    }


def _is_packed(module: LoaderModule) -> bool:
    return module.codec.endswith("gptq")


def _excluded(modules: Sequence[LoaderModule]) -> list[str]:
    """Return patterns that match every unpacked linear layer and no packed one."""
    loaded = [m for m in modules if m.role.info.kind in LOADED and m.module != "lm_head"]
    packed = [module.module for module in loaded if _is_packed(module)]
    plain = [module for module in loaded if not _is_packed(module)]
    patterns = []
    for wide in (".*visual.*", ".*mtp.*", ".*attn.*", ".*shared_expert.*"):
        compiled = compile_linear(wide)
        matched = [module for module in plain if compiled.match(module.module)]
        if matched and not any(compiled.match(name) for name in packed):
            patterns.append(wide)
            plain = [module for module in plain if not compiled.match(module.module)]
    return [*patterns, *dict.fromkeys(f"{re.escape(loaded_as(m.module))}$" for m in plain)]


def findings(
    quantization: Mapping[str, Any], modules: Sequence[LoaderModule], group: int
) -> Iterator[Finding]:
    """Yield contradictions between ``quantization_config`` and the weights."""
    if not any(_is_packed(module) for module in modules):
        yield Finding("quantization-config", "config.json", "promises GPTQ, but nothing is packed")
        return
    for key, expected in (("bits", 4), ("group_size", group)):
        if quantization.get(key) != expected:
            message = f"{key} is {quantization.get(key)!r}, expected {expected!r}"
            yield Finding("quantization-config", "config.json", message)
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        yield Finding("skip-list", "config.json", "dynamic is not a table of patterns")
        return
    if len(dynamic) > MOST_PATTERNS:
        message = f"dynamic has {len(dynamic)} patterns, expected {MOST_PATTERNS} at most"
        yield Finding("skip-list", "config.json", message)
        return
    yield from _excluded_findings(dynamic, modules)
    yield from fused_findings(modules)


def _excluded_findings(
    dynamic: Mapping[str, Any], modules: Sequence[LoaderModule]
) -> Iterator[Finding]:
    excluded = list(_compiled(key for key in dynamic if key.startswith(_EXCLUDED)))
    for module in modules:
        if module.role.info.kind not in LOADED or module.module == "lm_head":
            continue
        skipped = any(pattern.match(module.module) for pattern in excluded)
        if _is_packed(module) and skipped:
            yield Finding("skip-list", module.module, "packed, but excluded by dynamic")
        elif not _is_packed(module) and not skipped and module.role.info.kind != "router":
            yield Finding("skip-list", module.module, "not packed, and not excluded by dynamic")


def _compiled(keys: Iterator[str]) -> Iterator[LinearPattern]:
    for key in keys:
        try:
            yield compile_linear(key.removeprefix(_EXCLUDED))
        except ValueError:  # no engine here reads it: what it would exclude is then missing
            continue
