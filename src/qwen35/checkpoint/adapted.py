"""A checkpoint whose weights adapters change as they are read."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from qwen35.checkpoint.adapter_config import ADAPTER_CONFIG
from qwen35.checkpoint.adapter_files import ADAPTER_WEIGHTS, Adapter, LoraTensors
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.weight_changes import LowRank, Replacement, WeightChange
from qwen35.codecs.registry import is_packed
from qwen35.errors import TensorError, UsageError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import Role, role_of
from qwen35.tensors import StoredTensor, TensorSpec, Weight

__all__ = ["adapter_notes", "changed_items", "with_adapters"]

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens"
_LINEAR = ("lora_A", "lora_B")
_LOOKED_UP = ("lora_embedding_A", "lora_embedding_B")
_LENGTHS = "lora_magnitude_vector"
_WITH_PEFT = "merge it with peft"


class _Key(NamedTuple):
    """What names a weight, whatever the prefix before it."""

    role: str
    layer: int | None
    expert: int | None

    @classmethod
    def of(cls, role: Role) -> _Key:
        return cls(role.name, role.layer, role.expert)


def with_adapters(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the checkpoint with adapters, applied in this order.

    One that trained the embedding or the head alone unties them, as peft's merge does.

    Raises:
        TensorError: it would have to untie packed weights.
    """
    if not adapters:
        return checkpoint
    if any(map(_unties, adapters)) and checkpoint.config.tied:
        checkpoint = _untied(checkpoint)
    return replace(checkpoint, adapters=tuple(adapters))


def _unties(adapter: Adapter) -> bool:
    modules = (name.removesuffix(".weight") for name in adapter.whole)
    ends = (_EMBEDDING, _HEAD.removesuffix(".weight"))
    return any(module.endswith(ends) and adapter.config.saves(module) for module in modules)


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose head is the embedding, stored under its own name."""
    raw = copy.deepcopy(dict(checkpoint.config.raw))
    for section in (raw, raw.get("text_config")):
        if isinstance(section, dict) and (section is raw or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
    name = f"{checkpoint.layout.prefix}{_EMBEDDING}.weight"
    kept = tuple(weight for weight in checkpoint.weights if weight.name != _HEAD)
    found = next((weight for weight in kept if weight.name == name), None)
    if found is None or is_packed(found):
        message = "packed or missing, and the adapter needs a head of its own"
        raise TensorError(name, message, hint="decode the base first, with --recipe bf16")
    spec = TensorSpec(_HEAD, found.main.spec.dtype, found.main.spec.shape)
    head = Weight(_HEAD, found.storage, (StoredTensor(spec, found.main.file, found.main.begin),))
    return replace(
        checkpoint,
        config=parse_config(raw),
        weights=(*kept, head),
        layout=replace(checkpoint.layout, head=True),
    )


def changed_items(
    checkpoint: Checkpoint, items: tuple[InventoryItem, ...], *, tower: bool
) -> tuple[InventoryItem, ...]:
    """Return the weights of a checkpoint with what its adapters do to them.

    Args:
        checkpoint: with its adapters.
        items: its weights.
        tower: whether the vision tower is among them for certain.

    Raises:
        TensorError: an adapter does not fit the base, or holds what cannot be merged.
        UsageError: adapters do not fit together.
    """
    if not checkpoint.adapters:
        return items
    by_key = {_Key.of(item.role): item for item in items}
    changes: dict[str, list[tuple[Adapter, WeightChange]]] = defaultdict(list)
    for adapter in checkpoint.adapters:
        base = _Base(checkpoint, by_key, tower=tower)
        for item, change in base.changes(adapter):
            changes[item.spec.name].append((adapter, change))
    return tuple(
        replace(item, changes=_combined(item, changes[item.spec.name]))
        if item.spec.name in changes
        else item
        for item in items
    )


def _combined(
    item: InventoryItem, found: Sequence[tuple[Adapter, WeightChange]]
) -> tuple[WeightChange, ...]:
    """Return the changes of a weight in order: what replaces it comes first."""
    if len({adapter for adapter, _ in found}) > 1 and any(_alone(change) for _, change in found):
        message = f"{item.spec.name} is changed by two adapters, and one holds it whole or as DoRA"
        raise UsageError("--adapter", message, hint="merge them one after the other")
    changes = [change for _, change in found]
    return tuple(sorted(changes, key=lambda change: not isinstance(change, Replacement)))


def _alone(change: WeightChange) -> bool:
    return not isinstance(change, LowRank) or change.lengths is not None


def adapter_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what users should know about the adapters of a checkpoint."""
    for adapter in checkpoint.adapters:
        factor = f" (weight {adapter.factor:g})" if adapter.factor != 1 else ""
        trained = f", trained on {adapter.config.base}" if adapter.config.base else ""
        count = len(adapter.loras) + len(adapter.whole)
        yield f"merged with the adapter {adapter.title}{factor}: {count} weights{trained}"
        looked_up = any(_LOOKED_UP[0] in lora.parts for lora in adapter.loras.values())
        if looked_up and checkpoint.config.tied:
            yield "the adapter changes the embedding, and with it the head, which is tied to it"


class _Base:
    """The weights of a base, by key, that an adapter is held against."""

    def __init__(
        self, checkpoint: Checkpoint, by_key: dict[_Key, InventoryItem], *, tower: bool
    ) -> None:
        self._checkpoint, self._by_key, self._tower = checkpoint, by_key, tower

    def changes(self, adapter: Adapter) -> Iterator[tuple[InventoryItem, WeightChange]]:
        """Yield what an adapter does to each weight.

        Raises:
            TensorError: it does not fit, or is not complete.
        """
        found = set()
        for name, stored in adapter.whole.items():
            item = self._item(name, stored.spec.name)
            if item is not None:
                yield item, _replacement(adapter, name, stored, item)
        for module, lora in adapter.loras.items():
            some = next(iter(lora.parts.values()))
            item = self._item(f"{module}.weight", some.spec.name)
            if item is None:
                continue
            found.add(item.spec.name)
            yield item, _low_rank(adapter, lora, item)
        self._check_complete(adapter, found)

    def _item(self, name: str, tensor: str) -> InventoryItem | None:
        """Return the weight of a name; None if it is part of a tower that is left out."""
        try:
            role = role_of(name)
        except TensorError as error:
            found = f"in {ADAPTER_WEIGHTS}, but Qwen3.5 has no {name[:200]}"
            raise TensorError(tensor[:200], found, hint="is it an adapter of this base?") from error
        item = self._by_key.get(_Key.of(role))
        if item is not None:
            if role.info.kind in ("experts", "router", "conv"):
                found = f"a change of {role.name}, which is not supported"
                raise TensorError(tensor[:200], found, hint=_WITH_PEFT)
            return item
        if role.scope == "visual" and not self._tower:
            return None
        found = f"in {ADAPTER_WEIGHTS}, but the base has no {name[:200]}"
        hint = "is it an adapter of this base?"
        if name == _HEAD and self._checkpoint.config.tied:
            found = "a change of the head alone, which the base ties to its embedding"
            hint = "untie it: store lm_head.weight, and set tie_word_embeddings to false"
        raise TensorError(tensor[:200], found, hint=hint)

    def _check_complete(self, adapter: Adapter, found: set[str]) -> None:
        """Refuse an adapter without the matrices of a module that its settings name."""
        names = (*adapter.loras, *adapter.whole)
        whole_model = any(n.startswith(("model.language_model.", "model.visual.")) for n in names)
        for item in self._by_key.values():
            role, kind = item.role, item.role.info.kind
            if role.scope == "mtp" or (role.scope == "visual" and not whole_model):
                continue
            module = self._trained_name(item, whole_model=whole_model)
            targeted = kind in ("linear", "head", "embedding") and adapter.config.changes(
                module, linear=kind == "linear"
            )
            if targeted and item.spec.name not in found:
                message = f"no matrices for {module}, which target_modules names"
                hint = "was it trained on another model? or save it again"
                raise TensorError(ADAPTER_WEIGHTS, message, hint=hint)
        _check_saved(adapter)

    def _trained_name(self, item: InventoryItem, *, whole_model: bool) -> str:
        """Return a module's name in the class that the adapter was trained with."""
        before = self._checkpoint.layout.prefix
        if not item.module.startswith(before) or item.role.scope != "text":
            return item.module
        prefix = "model.language_model." if whole_model else "model."
        return prefix + item.module.removeprefix(before)


def _check_saved(adapter: Adapter) -> None:
    for name in adapter.config.saved:
        if not any(_within(parameter, (name,)) for parameter in adapter.whole):
            message = f"no tensors for {name[:80]}, which modules_to_save names"
            raise TensorError(ADAPTER_WEIGHTS, message, hint="save the adapter again")


def _within(parameter: str, ends: tuple[str, ...]) -> bool:
    """Return whether a parameter lies in a module whose name ends so."""
    parts = parameter.split(".")[:-1]
    return any(".".join(parts[: i + 1]).endswith(ends) for i in range(len(parts)))


def _replacement(
    adapter: Adapter, name: str, stored: StoredTensor, item: InventoryItem
) -> Replacement:
    """Return the change of a weight that an adapter holds whole."""
    vocabulary = item.role.info.shape[:1] == ("vocab",)
    listed = bool(adapter.config.saved) and _within(name, adapter.config.saved)
    bias = adapter.config.biases and name.endswith("bias")
    if not (listed or bias or vocabulary):  # peft saves embeddings beside resized vocabularies
        message = "held whole, but modules_to_save does not name it"
        raise TensorError(stored.spec.name[:200], message, hint=_WITH_PEFT)
    here, there = list(stored.spec.shape), list(item.spec.shape)
    if here != there:
        message = f"shape {str(here)[:80]}, the base has {there}"
        if vocabulary and here[1:] == there[1:]:
            message = f"a vocabulary of {here[0]} tokens, the base has {there[0]}"
        raise TensorError(stored.spec.name[:200], message, hint=_WITH_PEFT)
    if adapter.factor != 1 and (listed or bias):
        message = f"held whole, so that no weight ({adapter.factor:g}) applies to it"
        raise TensorError(stored.spec.name[:200], message, hint="leave the weight out")
    return Replacement(adapter.reader, stored)


def _low_rank(adapter: Adapter, lora: LoraTensors, item: InventoryItem) -> LowRank:
    """Return the change of a weight by two matrices."""
    kind = item.role.info.kind
    looked_up = kind == "embedding"
    right_name, left_name = reversed(_LOOKED_UP) if looked_up else _LINEAR
    _check_parts(adapter, lora, item)
    config = adapter.config
    if not config.changes(lora.module, linear=kind == "linear"):
        message = f"changes {lora.module[:200]}, which target_modules does not name"
        raise TensorError(ADAPTER_WEIGHTS, message, hint="are both files of one adapter?")
    rows, columns = item.spec.shape
    rank = config.rank_of(lora.module)
    left, right = lora.parts[left_name], lora.parts[right_name]
    shapes = {left: (rows, rank), right: (rank, columns)}
    for stored, shape in shapes.items():
        expected = shape[::-1] if looked_up else shape
        _check_shape(stored, expected)
    lengths = lora.parts.get(_LENGTHS)
    if lengths is not None:
        _check_shape(lengths, (rows,))
    scale = adapter.factor * config.scale_of(lora.module)
    return LowRank(adapter.reader, left, right, scale, looked_up, lengths)


def _check_parts(adapter: Adapter, lora: LoraTensors, item: InventoryItem) -> None:
    """Check that the parts of a module are those that its kind and the settings call for."""
    kind = item.role.info.kind
    some = next(iter(lora.parts.values())).spec.name[:200]
    if kind not in ("linear", "head", "embedding"):
        message = f"a low-rank change of {item.role.name}, which is no matrix of a linear layer"
        raise TensorError(some, message, hint=_WITH_PEFT)
    if adapter.config.dora and kind == "embedding":
        raise TensorError(some, "DoRA of an embedding is not supported", hint=_WITH_PEFT)
    if adapter.config.dora and adapter.factor != 1:
        message = f"DoRA, to which no weight ({adapter.factor:g}) applies"
        raise TensorError(some, message, hint="leave the weight out")
    expected = set(_LOOKED_UP if kind == "embedding" else _LINEAR)
    if adapter.config.dora:
        expected.add(_LENGTHS)
    if lora.parts.keys() != expected:
        found = ", ".join(sorted(lora.parts))
        message = f"{lora.module[:200]} has {found}"
        wanted = ", ".join(sorted(expected))
        raise TensorError(ADAPTER_WEIGHTS, message, expected=wanted)


def _check_shape(stored: StoredTensor, expected: tuple[int, ...]) -> None:
    if stored.spec.shape != expected:
        found = f"shape {str(list(stored.spec.shape))[:80]}"
        wanted = f"{list(expected)} by the base and {ADAPTER_CONFIG}"
        raise TensorError(stored.spec.name[:200], found, expected=wanted)
