"""A checkpoint as its tensors have it, where config.json promises more or less than they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qwen35.checkpoint.adapter_changes import adapter_notes, changed_items
from qwen35.checkpoint.inventory import InventoryItem, inventory
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import codec_of
from qwen35.errors import TensorError
from qwen35.model.model_config import ModelConfig
from qwen35.model.roles import MTP, TOWER, mtp_tensors, tower_tensors
from qwen35.tensors import Weight

__all__ = ["has_tower", "reconciled", "source_notes", "take"]

_LAYER = f"{MTP}layers."
_GRAFT = "convert and gguf take that of the original with --mtp-from"


def reconciled(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the MTP layers that it holds whole, whatever config.json says.

    transformers drops them when it saves, and leaves the promise in config.json.
    """
    stored, _ = _whole_layers(checkpoint)
    config = replace(checkpoint.config, mtp_layers=stored)
    if not checkpoint.layout.mtp:
        return replace(checkpoint, config=config)
    weights = tuple(w for w in checkpoint.weights if not _beyond(w.name, stored))
    scales = tuple(s for s in checkpoint.cache_scales if not _beyond(s.spec.name, stored))
    layout = replace(checkpoint.layout, mtp=stored > 0)
    return replace(checkpoint, config=config, weights=weights, layout=layout, cache_scales=scales)


def take(
    checkpoint: Checkpoint, *, tower: bool = True
) -> tuple[Checkpoint, tuple[InventoryItem, ...]]:
    """Return the checkpoint, `reconciled`, and its weights, as its adapters change them.

    All else is as for `inventory`.
    """
    fitting = reconciled(checkpoint)
    try:
        items = inventory(fitting, tower=tower)
    except TensorError:
        inventory(checkpoint, tower=tower)  # what hides MTP layers is part of the cause
        raise
    return fitting, changed_items(fitting, items, tower=tower)


def source_notes(checkpoint: Checkpoint, *, mtp: bool, tower: bool) -> Iterator[str]:
    """Yield what users should know about a checkpoint that is not as its config.json says.

    Args:
        checkpoint: as opened.
        mtp: whether the output takes its MTP layers.
        tower: whether the output takes its vision tower.
    """
    yield from checkpoint.notes
    yield from adapter_notes(checkpoint)
    if mtp:
        yield from _mtp_notes(checkpoint)
    if not tower:
        yield from _tower_notes(checkpoint)


def _mtp_notes(checkpoint: Checkpoint) -> Iterator[str]:
    stored, why = _whole_layers(checkpoint)
    promised = checkpoint.config.promised_mtp
    if why:
        kept = f"{stored} layer(s) of it kept" if stored else "left out"
        yield f"multi-token prediction is not whole, {why}: {kept}"
    elif stored != promised:
        there = (
            f"{stored}: so has the output"
            if stored
            else f"none: the output promises none; {_GRAFT}"
        )
        yield (
            f"config.json promises {promised} multi-token-prediction layer(s), but the checkpoint "
            f"has {there}"
        )


def _whole_layers(checkpoint: Checkpoint) -> tuple[int, str]:
    """Return the number of whole MTP layers, and what is wrong with the next one, if it is there.

    Layers count from the first on; without the tensors around them there is none.
    """
    held = {weight.name: weight for weight in checkpoint.weights if weight.name.startswith(MTP)}
    if not held:
        return 0, ""
    numbers = {name.removeprefix(_LAYER).partition(".")[0] for name in held if _LAYER in name}
    present = next(i for i in range(len(numbers) + 1) if str(i) not in numbers)
    config = replace(checkpoint.config, mtp_layers=present)
    for name, problem in _problems(checkpoint, config, held):
        number = name.removeprefix(_LAYER).partition(".")[0] if name.startswith(_LAYER) else "0"
        return int(number), problem
    if not present:
        return 0, f"{len(held)} tensors of {MTP} are no whole one"
    later = next((f"{_LAYER}{n} follows no other" for n in numbers - _first(present)), "")
    return present, later


def _first(count: int) -> set[str]:
    return {str(i) for i in range(count)}


def _problems(
    checkpoint: Checkpoint, config: ModelConfig, held: Mapping[str, Weight]
) -> Iterator[tuple[str, str]]:
    for expected in mtp_tensors(config, checkpoint.layout):
        weight = held.get(expected.name)
        if weight is None:
            yield expected.name, f"{expected.name} is missing"
            continue
        misfit = codec_of(weight).mismatch(weight, expected)
        if misfit is not None:
            yield expected.name, f"{expected.name} does not fit ({misfit.message})"


def _beyond(name: str, stored: int) -> bool:
    """Return whether a tensor belongs to multi-token prediction beyond `stored` layers."""
    if not name.startswith(MTP):
        return False
    if not stored:
        return True
    number = name.removeprefix(_LAYER).partition(".")[0]
    return name.startswith(_LAYER) and number not in _first(stored)


def has_tower(checkpoint: Checkpoint) -> bool:
    """Return whether an engine can load the vision tower with the rest."""
    if checkpoint.prefix is not None and checkpoint.prefix.refusal is not None:
        return False
    names = {weight.name for weight in checkpoint.weights}
    expected = {spec.name for spec in tower_tensors(checkpoint.config)}
    return bool(expected) and expected <= names


def _tower_notes(checkpoint: Checkpoint) -> Iterator[str]:
    held = {w.name: w for w in checkpoint.weights if w.name.startswith(TOWER)}
    expected = list(tower_tensors(checkpoint.config))
    if held and not expected:
        yield f"{len(held)} tensors of a vision tower, which config.json does not have: left out"
    missing = [spec.name for spec in expected if spec.name not in held]
    if expected and not held:
        yield "config.json describes a vision tower, but the checkpoint has none"
    elif missing:
        count = f"{len(missing)} of {len(expected)} tensors are missing"
        yield f"the vision tower is not whole, {count} ({missing[0]}): left out"
