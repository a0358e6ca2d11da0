"""What serving engines make of the weights of an artifact: modules, and matrices of several."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.kv_cache import CacheForm
from qwen35.codecs.plain.codec import Plain
from qwen35.errors import Finding
from qwen35.model.fused import fused_group

__all__ = ["LOADED", "Tool", "fused_findings", "loaded_as", "skip_findings", "unpacked"]

LOADED = ("linear", "head", "experts", "router")
"""Kinds of weights for which a loader makes a linear layer, or a stack of them."""


@dataclass(frozen=True)
class Tool:
    """What a quantization tool tells loaders, for all codecs whose tensors it lays out.

    Args:
        config: returns ``quantization_config`` for the weights of an output.
        findings: yields contradictions between that section and the weights.
        documents: returns the JSON files beside config.json, given the section.
        cache: how scales of a KV cache are written; None if the tool has none.
        inputs: returns what `Codec.quantizes_inputs` does, given the section and the codec's name;
            None if its section says nothing about them.
        documents_findings: yields contradictions between the files beside config.json and the
            section, given what reads one, or raises an `InputError`.
        title: its name.
        needs: what transformers needs to load its layout; empty if it does not.
    """

    config: Callable[[Sequence[LoaderModule]], dict[str, Any]]
    findings: Callable[[Mapping[str, Any], Sequence[LoaderModule]], Iterator[Finding]]
    documents: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
    cache: CacheForm | None = None
    inputs: Callable[[Mapping[str, Any], str], Callable[[str], bool | None]] | None = None
    documents_findings: Callable[[Mapping[str, Any], Callable[[str], Any]], Iterator[Finding]] = (
        lambda _, __: iter(())
    )
    title: str = ""
    needs: str = ""


def unpacked(
    modules: Sequence[LoaderModule], codecs: Container[str], whole: Mapping[str, str]
) -> tuple[list[str], list[LoaderModule], list[LoaderModule]]:
    """Return how to exclude what is not packed.

    Args:
        modules: every weight of an output.
        codecs: the codecs that pack.
        whole: scope (tower, MTP) to the pattern that covers all of it.

    Returns:
        Entries for the head, even where it is tied and has no tensor, and for scopes of which
        nothing is packed; the unpacked linear layers that they do not cover; the packed ones.
    """
    loaded = [module for module in modules if module.role.info.kind in LOADED]
    packed = [module for module in loaded if module.codec in codecs]
    rest = [module for module in loaded if module.codec not in codecs]
    entries = [] if any(module.module == "lm_head" for module in packed) else ["lm_head"]
    for scope, pattern in whole.items():
        some = any(module.role.scope == scope for module in rest)
        if some and not any(module.role.scope == scope for module in packed):
            entries.append(pattern)
            rest = [module for module in rest if module.role.scope != scope]
    return entries, [module for module in rest if module.module != "lm_head"], packed


def skip_findings(
    modules: Sequence[LoaderModule],
    codecs: Container[str],
    *,
    skipped: Callable[[str], bool],
    asked: Callable[[LoaderModule], bool],
    words: tuple[str, str] = ("in ignore", "missing from ignore"),
) -> Iterator[Finding]:
    """Yield packed modules that a loader would skip, and unpacked ones that it would not.

    Args:
        modules: every weight of an artifact.
        codecs: the codecs that pack.
        skipped: whether the config excludes a module of this name.
        asked: whether the loader looks for the scales of a module that is not excluded.
        words: how to say that a module is excluded, and that it is not.
    """
    for module in modules:
        if module.role.info.kind not in LOADED or module.module == "lm_head":
            continue
        packed, without = module.codec in codecs, skipped(module.module)
        if packed and without:
            yield Finding("skip-list", module.module, f"packed, but {words[0]}")
        elif not packed and not without and asked(module):
            yield Finding("skip-list", module.module, f"not packed, and {words[1]}")


def loaded_as(module: str) -> str:
    """Return the module into which engines load a weight; all experts of a layer share one.

    >>> loaded_as("model.layers.0.mlp.experts.7.up_proj"), loaded_as("lm_head")
    ('model.layers.0.mlp.experts', 'lm_head')
    """
    layer, separator, _ = module.partition(".mlp.experts.")
    return f"{layer}.mlp.experts" if separator else module


def fused_findings(modules: Sequence[LoaderModule]) -> Iterator[Finding]:
    """Yield a finding for each fused group with weights in different codecs."""
    first: dict[object, LoaderModule] = {}
    reported = set()
    for module in modules:
        key = fused_group(module.role)
        if key is None or key in reported:
            continue
        # Comparing with the first member suffices: if all agree with it, they agree.
        other = first.setdefault(key, module)
        if module.codec != other.codec:
            reported.add(key)
            packed, rest = (other, module) if module.codec == Plain.name else (module, other)
            found = "packed, but not" if rest.codec == Plain.name else f"{packed.codec}, unlike"
            message = f"{found} {rest.spec.name}: engines load both as {key[2]}"
            yield Finding("fused-group", packed.spec.name, message)
