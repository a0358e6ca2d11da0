"""Write and check ``quantization_config`` of NF4 checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.nf4.layout import parts_layout
from qwen35.errors import Finding, UsageError
from qwen35.linear_regex import MOST_PATTERNS, LinearPattern, compile_linear
from qwen35.tensors import DTYPE_NAMES

__all__ = ["findings", "is_skipped", "quantization_config", "skip_modules"]

_LIST = "llm_int8_skip_modules"
_NESTED = ".nested_absmax"

DEFAULT_SKIPS = ("lm_head",)
"""Linear modules of this family that transformers leaves alone if no list is given (null or
absent): the output embedding (5.23 ``quantizers.base.get_keys_to_not_convert``)."""


def quantization_config(modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
    """Return the config that transformers writes for bitsandbytes 4-bit weights.

    Args:
        modules: every weight in the output.
        prefix: prefix of the names of text tensors.
        dtype: the checkpoint's dtype, which bitsandbytes computes in.

    Raises:
        UsageError: some weights are doubly quantized and some are not.
    """
    nested = {_is_nested(module) for module in modules if module.codec == "nf4"}
    if len(nested) > 1:
        raise UsageError(
            "recipe",
            "would mix weights with and without double quantization",
            hint="start from the unquantized checkpoint",
        )
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
        "bnb_4bit_use_double_quant": nested == {True},
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        _LIST: skip_modules(modules, prefix),
    }


def _is_nested(module: LoaderModule) -> bool:
    return any(part.name.endswith(_NESTED) for part in module.parts)


def skip_modules(modules: Sequence[LoaderModule], prefix: str) -> list[str]:
    """Return ``llm_int8_skip_modules``: every linear module that stays unpacked.

    transformers skips a module if an entry equals its name, its prefix up to a dot, or its suffix
    (5.23 ``quantizers_utils.should_convert_module``). Any list disables the default exception for
    the head, so the list always contains ``lm_head``.
    """
    skip = ["lm_head"]
    packed = [module.module for module in modules if module.codec == "nf4"]
    plain = [m for m in modules if m.role.info.kind == "linear" and m.codec == "plain"]
    if not any(name.startswith("model.visual.") for name in packed):
        if any(module.role.scope == "visual" for module in modules):
            skip.append("model.visual")
        plain = [module for module in plain if module.role.scope != "visual"]
    skip.append(f"{prefix}embed_tokens")
    if any(module.role.scope == "mtp" for module in modules):
        skip.append("mtp")
    for role in sorted({module.role.name for module in plain if module.role.scope != "mtp"}):
        skip += _entries(role, [m.module for m in plain if m.role.name == role], packed)
    return skip


def _entries(role: str, modules: list[str], packed: list[str]) -> list[str]:
    """Return the shortest suffix of `role` that no packed module shares, else the full names."""
    segments = role.split(".")
    for length in range(1, len(segments) + 1):
        ending = ".".join(segments[-length:])
        if not any(module.endswith(ending) for module in packed):
            return [ending]
    return modules


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    """Return whether transformers leaves `module` unpacked, given ``llm_int8_skip_modules``.

    An entry matches as a regular expression for a prefix up to a dot, or as a plain suffix.
    Source: transformers 5.23 ``quantizers_utils.should_convert_module``.
    """
    return any(_matches_prefix(entry, module) or module.endswith(entry) for entry in skip)


def _matches_prefix(entry: str, module: str) -> bool:
    r"""Return what ``re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)`` finds, sooner."""
    patterns = _patterns(entry)
    if patterns is None or not patterns[0].match(module):
        return False
    whole, up_to_dot = patterns
    ends = (i + 1 for i, char in enumerate(module) if char == ".")
    return bool(up_to_dot.match(module)) or any(whole.fullmatch(module[:end]) for end in ends)


@cache
def _patterns(entry: str) -> tuple[LinearPattern, LinearPattern] | None:
    """Return `entry` compiled, alone and followed by a dot or the end; None if malformed."""
    try:
        return compile_linear(f"(?:{entry})"), compile_linear(rf"(?:{entry})(?:\.|$)")
    except ValueError:
        return None


def findings(
    quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
) -> Iterator[Finding]:
    """Yield contradictions between ``quantization_config`` and the weights.

    Args:
        quantization: ``quantization_config`` of config.json.
        modules: every weight of the artifact.
        vision: whether the architecture has a vision tower.
    """
    packed = [module for module in modules if module.codec == "nf4"]
    if not packed:
        yield Finding("quantization-config", "config.json", "promises NF4, but nothing is packed")
    for key, expected in (("load_in_4bit", True), ("bnb_4bit_quant_type", "nf4")):
        if quantization.get(key) != expected:
            message = f"{key} is {quantization.get(key)!r}, expected {expected!r}"
            yield Finding("quantization-config", "config.json", message)
    # transformers lets the tensors win over the config; other loaders may not.
    double = bool(quantization.get("bnb_4bit_use_double_quant"))
    for module in packed:
        yield from _companion_findings(module, double)
    yield from _skip_findings(quantization, modules, vision=vision)


def _companion_findings(module: LoaderModule, double: bool) -> Iterator[Finding]:
    name, nested = module.spec.name, _is_nested(module)
    if nested != double:
        found = "doubly quantized" if nested else "quantized once"
        message = f"{found}, but bnb_4bit_use_double_quant is {double}"
        yield Finding("quantization-config", name, message)
    parts = {part.name.removeprefix(name): part for part in module.parts}
    for suffix, (dtype, shape) in parts_layout(module.spec, nested=nested).items():
        part = parts[suffix]  # present: grouping requires it
        if (part.dtype, part.shape) != (dtype, shape):
            message = f"{part.dtype} {list(part.shape)}, expected {dtype} {list(shape)}"
            yield Finding("companions", f"{name}{suffix}", message)


def _skip_findings(
    quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
) -> Iterator[Finding]:
    skip = quantization.get(_LIST)
    if skip is None:
        skip = list(DEFAULT_SKIPS)
    if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
        yield Finding("skip-list", "config.json", f"{_LIST} is not a list of names")
        return
    if len(skip) > MOST_PATTERNS:
        message = f"{_LIST} has {len(skip)} entries, expected at most {MOST_PATTERNS}"
        yield Finding("skip-list", "config.json", message)
        return
    for entry in (entry for entry in skip if _patterns(entry) is None):
        message = f"{_LIST} has {entry!r}, no regular expression that RE2 reads"
        yield Finding("skip-list", "config.json", message)
    yield from _packing_findings(skip, modules, vision=vision)


def _packing_findings(
    skip: Sequence[str], modules: Sequence[LoaderModule], *, vision: bool
) -> Iterator[Finding]:
    if not is_skipped("lm_head", skip):
        message = f"lm_head is not in {_LIST}, so transformers would pack the head"
        yield Finding("skip-list", "lm_head", message)
    for module in modules:
        if module.role.info.kind != "linear" or module.role.scope == "mtp":
            continue
        name = module.module
        if not vision:
            # Text-only models load under the shorter prefix; the list must match that name.
            name = name.replace("model.language_model.", "model.", 1)
        packed = module.codec == "nf4"
        if is_skipped(name, skip) == packed:
            message = (
                f"packed, but {_LIST} says it is not"
                if packed
                else f"not packed, and missing from {_LIST}"
            )
            yield Finding("skip-list", name, message)
