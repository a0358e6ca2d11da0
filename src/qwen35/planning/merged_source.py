"""A source with what changes it, adapters and an MTP layer: the one way in which verbs open it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.adapted import adapted
from qwen35.checkpoint.adapter_files import Adapter, open_adapters
from qwen35.checkpoint.grafted import with_mtp_of
from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.reconciled import has_tower
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import CODECS, TRAINED_ON, is_lossy
from qwen35.errors import UsageError
from qwen35.model.roles import MTP
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Rule
from qwen35.planning.sources import describe_source, fetch_source

__all__ = ["changed", "opened_adapters", "opened_source", "with_adapters"]


def opened_adapters(texts: Sequence[str | Path], onto: str | None = None) -> tuple[Adapter, ...]:
    """Open adapters; errors of `qwen35.checkpoint.adapter_files.open_adapters` too.

    Args:
        texts: folders, as ``DIR`` or ``DIR=WEIGHT``; at least one, if there is a format.
        onto: merge them into the base's weights as this format holds them, one of
            `qwen35.codecs.registry.TRAINED_ON`; None for the weights as they are.

    Raises:
        UsageError: the format is unknown, or there is no adapter.
    """
    adapters = open_adapters(texts)
    if onto is None:
        return adapters
    if onto not in TRAINED_ON:
        raise UsageError("--onto", repr(onto)[:80], expected=" or ".join(TRAINED_ON))
    if not adapters:
        raise UsageError("--onto", "given without an adapter", hint="add --adapter DIR")
    return tuple(replace(adapter, onto=onto) for adapter in adapters)


def opened_source(
    model: str | Path,
    adapters: Sequence[Adapter] = (),
    mtp_from: str | Path | None = None,
    *,
    headers: bool = False,
    token: str | None = None,
    extra: Sequence[str] = (),
) -> Checkpoint:
    """Open a source and change it; errors as for the functions of which this is made.

    Args:
        model: as for `qwen35.planning.sources.fetch_source`.
        adapters: merged into it, in this order.
        mtp_from: the checkpoint whose MTP layer it takes.
        headers: fetch no weights, which published sizes do not have.
        token: access token for the Hub.
        extra: optional files to download along with the source's own.
    """
    if headers:
        base = describe_source(str(model), token=token)
    else:
        base = fetch_source(str(model), token=token, extra=extra)
    return changed(base, adapters, mtp_from, headers=headers, token=token)


def changed(
    base: Checkpoint,
    adapters: Sequence[Adapter] = (),
    mtp_from: str | Path | None = None,
    *,
    headers: bool = False,
    token: str | None = None,
) -> Checkpoint:
    """Change a source that is open; arguments and errors as for `opened_source`."""
    opened = describe if headers else fetch
    donor = None if mtp_from is None else opened(str(mtp_from), token=token, only=MTP)
    return with_adapters(with_mtp_of(base, donor), adapters)


def with_adapters(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the checkpoint with adapters, applied in this order.

    Raises:
        TensorError: it would have to untie or resize packed weights, or an adapter is incomplete.
        UsageError: adapters are merged onto a format, and the base is quantized already.
    """
    merged = adapted(checkpoint, adapters)
    formats = {adapter.onto for adapter in adapters} - {""}
    if not formats:
        return merged
    if len({adapter.onto for adapter in adapters}) > 1:
        raise UsageError("--onto", "not the same for all adapters", hint="merge one at a time")
    if any(map(is_lossy, checkpoint.weights)):
        hint = "leave it out: packed weights are decoded"
        raise UsageError("--onto", "given with a base that is quantized already", hint=hint)
    return replace(merged, rounded=_packed_by(checkpoint, *formats))


def _packed_by(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Return the weights that a built-in recipe packs, each with its codec."""
    recipe = load_recipe(name)
    if checkpoint.config.architecture.vision and not has_tower(checkpoint):
        recipe = recipe.preceded([Rule("visual", "drop", "not whole")])
    plan = make_plan(checkpoint, recipe)
    return {
        step.weight.name: target.codec
        for step in plan.written
        for target in step.targets
        if CODECS[target.codec].packed
    }
