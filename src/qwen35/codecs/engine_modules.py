"""What serving engines make of the weights of an artifact: modules, and matrices of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.plain.codec import Plain
from qwen35.errors import Finding
from qwen35.model.fused import fused_group

__all__ = ["LOADED", "fused_findings", "loaded_as"]

LOADED = ("linear", "head", "experts", "router")
"""Kinds of weights for which a loader makes a linear layer, or a stack of them."""


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
