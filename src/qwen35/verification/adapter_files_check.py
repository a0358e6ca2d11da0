"""Check GGUF files of adapters: what llama.cpp needs to add them to a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from qwen35.checkpoint.gguf_header import LORA_A, LORA_ALPHA, LORA_B, GgufHeader, GgufTensor
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import cut
from qwen35.errors import Finding
from qwen35.planning.gguf_files.adapter_tensors import only_adapter, stored_alpha
from qwen35.planning.gguf_files.metadata import architecture_of
from qwen35.planning.gguf_files.tensor_names import matrix_names
from qwen35.verification.settings_comparison import SettingsComparison, same_value, shown

__all__ = ["adapter_findings", "compare_adapter_keys"]

_ARCHITECTURES = ("qwen35", "qwen35moe")
_BLOCK = re.compile(r"blk\.\d{1,6}\.", re.ASCII)


def adapter_findings(container: GgufHeader) -> Iterator[Finding]:
    """Check keys and tensors of an adapter."""
    name, keys = container.path.name, container.keys
    if container.architecture not in _ARCHITECTURES:
        found = f"architecture {cut(repr(container.architecture), 80)}"
        yield Finding("metadata", name, f"{found}, expected {' or '.join(_ARCHITECTURES)}")
    kind = keys.get("adapter.type")
    if kind != "lora":
        found = f"adapter.type {cut(repr(kind), 80)}" if kind is not None else "no key adapter.type"
        yield Finding("metadata", name, f"{found}, expected 'lora'")
    alpha = keys.get(LORA_ALPHA)
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha == 0:
        found = f"{LORA_ALPHA} is {cut(repr(alpha), 80)}"
        message = f"{found}: llama.cpp adds products as if alpha were the rank"
        yield Finding("metadata", name, message)
    if not container.tensors:
        yield Finding("tensors", name, "no tensors in it, expected those of an adapter")
    yield from _tensors(container)


def _tensors(container: GgufHeader) -> Iterator[Finding]:
    known, sizes = matrix_names(), dict[str, tuple[int, ...]]()
    for name, entry in container.tensors.items():
        subject = container.labelled(name)
        weight, end = name[: -len(LORA_A)], name[-len(LORA_A) :]
        if end not in (LORA_A, LORA_B):
            message = f"no part of an adapter, expected {LORA_A} or {LORA_B}"
            yield Finding("tensors", subject, message)
            continue
        pattern = _BLOCK.sub("blk.*.", weight, count=1)
        if pattern not in known:
            yield Finding("tensors", subject, f"changes {cut(weight, 80)}, which no model has")
            continue
        other = container.tensors.get(weight + (LORA_B if end == LORA_A else LORA_A))
        if other is None:
            missing = LORA_B if end == LORA_A else LORA_A
            yield Finding("tensors", subject, f"{weight}{missing} is missing")
        elif end == LORA_B:
            yield from _shape_findings(subject, pattern, (other, entry), sizes)


def _shape_findings(
    subject: str,
    pattern: str,
    pair: tuple[GgufTensor, GgufTensor],
    sizes: dict[str, tuple[int, ...]],
) -> Iterator[Finding]:
    """Yield pairs that do not multiply, or whose product is of another size in another layer."""
    right, left = pair[0].shape, pair[1].shape
    if len(right) < 2 or len(left) < 2 or right[:-2] != left[:-2] or right[-2] != left[-1]:
        message = f"shape {list(left)}, which does not multiply {list(right)} of {pair[0].name}"
        yield Finding("tensors", subject, message)
        return
    size = (*left[:-1], right[-1])
    usual = sizes.setdefault(pattern, size)
    if size != usual:
        message = f"changes a weight of {list(size)}, in other layers one of {list(usual)}"
        yield Finding("tensors", subject, message)


def compare_adapter_keys(
    container: GgufHeader, source: Checkpoint, result: SettingsComparison
) -> None:
    """Compare the keys that decide what an adapter does with those that its source gives.

    Raises:
        TensorError: the source's adapter holds what such a file cannot.
        UsageError: the source has no adapter, or several.
    """
    adapter = only_adapter(source)
    expected: Mapping[str, object] = {
        "general.architecture": architecture_of(source.config),
        LORA_ALPHA: stored_alpha(adapter),
    }
    for key, theirs in expected.items():
        ours = container.keys.get(key)
        if not same_value(ours, theirs):
            message = f"{key} is {shown(ours, theirs)}, the source gives {shown(theirs, ours)}"
            result.findings.append(Finding("metadata", container.path.name, message))
