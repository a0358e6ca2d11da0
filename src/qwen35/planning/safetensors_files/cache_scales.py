"""The scales of a KV cache in an output: those of its source, or new ones from statistics."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.kv_cache import (
    LARGEST_CODE,
    SMALLEST_SCALE,
    CacheForm,
    attention_of,
    cache_scale,
    check_cache_scale,
)
from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError
from qwen35.planning.output_plan import Constant
from qwen35.planning.safetensors_files.safetensors_options import KV_CACHES

if TYPE_CHECKING:
    from qwen35.planning.activations import Activations
    from qwen35.planning.safetensors_files.safetensors_options import SafetensorsOptions
    from qwen35.planning.safetensors_files.safetensors_steps import DraftStep

__all__ = ["CacheScales", "output_scales"]

CacheScales = Mapping[str, tuple[Constant, ...]]
"""The source's name of a weight of keys to the scales of its layer, which lie beside it."""

_KEYS = "self_attn.k_proj"


def output_scales(
    checkpoint: Checkpoint, drafts: Sequence[DraftStep], options: SafetensorsOptions
) -> CacheScales:
    """Return the scales of the KV cache that an output has.

    Args:
        checkpoint: the source; the values of its scales are read.
        drafts: the steps of the output.
        options: of the output.

    Raises:
        UsageError: new ones are asked for where they have no place, or without statistics.
        TensorError: one of the source is no number above 0.
    """
    packed = [CODECS[draft.codec] for draft in drafts if draft.outputs]
    form = next((codec.cache_form for codec in packed if codec.cache_form is not None), None)
    layers = [draft for draft in drafts if draft.outputs and draft.role.name.endswith(_KEYS)]
    if options.kv_cache is not None:
        form = _checked_form(checkpoint, form, options.kv_cache)
        values = _from_statistics(layers, options.activations)
    elif form is not None:
        values = _from_source(checkpoint, layers)
    else:
        return {}
    return {name: tuple(_constants(form, *found)) for name, found in values.items()}


def _checked_form(checkpoint: Checkpoint, form: CacheForm | None, kv_cache: str) -> CacheForm:
    if kv_cache not in KV_CACHES:
        raise UsageError("--kv-cache", repr(kv_cache), expected=" or ".join(KV_CACHES))
    if form is None:
        found = "this output has no place for scales of a KV cache"
        expected = "weights in the layout of compressed-tensors or ModelOpt"
        raise UsageError("--kv-cache", found, expected=expected)
    if checkpoint.cache_scales:
        found = "the source has scales of its KV cache, which are kept"
        raise UsageError("--kv-cache", found, hint="leave it out")
    return form


_Values = Mapping[str, tuple["DraftStep", tuple[float, float]]]
"""A weight of keys to its step, and to the scales of keys and values."""


def _from_source(checkpoint: Checkpoint, layers: Sequence[DraftStep]) -> _Values:
    stored = {attention_of(scale.spec.name): scale for scale in checkpoint.cache_scales}
    place, values = checkpoint.place, {}
    for draft in layers:
        module = draft.item.module.removesuffix(".k_proj")
        found = [stored[module, kind] for kind in (0, 1) if (module, kind) in stored]
        if not found or place is None:
            continue
        of_keys, of_values = (
            cache_scale(place.read(one.file, one.begin, one.spec.nbytes), one.spec.dtype)
            for one in found  # `inventory` found both
        )
        for one, value in zip(found, (of_keys, of_values), strict=True):
            check_cache_scale(one.spec.name, value)
        values[draft.item.weight.name] = draft, (of_keys, of_values)
    return values


def _from_statistics(layers: Sequence[DraftStep], activations: Activations | None) -> _Values:
    if activations is None:
        found = "takes statistics of keys and values"
        hint = "give them: --activation-stats FILE, from `qwen35 calibrate`"
        raise UsageError("--kv-cache", found, hint=hint)
    values = {}
    for draft in layers:
        role = draft.role
        names = (role.name, f"{role.name.removesuffix('k_proj')}v_proj")
        largest = [activations.cached.get((name, role.layer, None)) for name in names]
        if role.scope == "mtp" and None in largest:  # which engines may leave unscaled
            continue
        if not all(one and one / LARGEST_CODE >= SMALLEST_SCALE for one in largest):
            found = f"no keys and values of {draft.item.module}, or only zeros"
            hint = "calibrate again, with this version of qwen35 and more text"
            raise UsageError(activations.name, found, expected="their largest ones", hint=hint)
        of_keys, of_values = (one / LARGEST_CODE for one in largest if one)
        values[draft.item.weight.name] = draft, (of_keys, of_values)
    return values


def _constants(
    form: CacheForm, draft: DraftStep, scales: tuple[float, float]
) -> Iterator[Constant]:
    specs = form.specs(draft.module.removesuffix(".k_proj"))
    for spec, scale in zip(specs, scales, strict=True):
        yield Constant(spec, struct.pack("<f", scale))
