"""What the adapters of a checkpoint do to each of its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from qwen35.checkpoint.adapter_config import ADAPTER_CONFIG, ends
from qwen35.checkpoint.adapter_files import ADAPTER_WEIGHTS, Adapter, LoraTensors, same_values
from qwen35.checkpoint.expert_changes import matrices_in, stack_of, stacked_change, stacks_in
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Checkpoint, FolderReader
from qwen35.checkpoint.weight_changes import (
    LowRank,
    ReplacedRows,
    Replacement,
    RoundedValues,
    ShiftedChange,
    WeightChange,
)
from qwen35.errors import TensorError, UsageError
from qwen35.model.roles import Role, role_of
from qwen35.tensors import StoredTensor

__all__ = ["adapter_notes", "changed_items"]

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens"
_LINEAR = ("lora_A", "lora_B")
_LOOKED_UP = ("lora_embedding_A", "lora_embedding_B")
_TOKENS = ("token_adapter.trainable_tokens_delta",)
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
    reader = FolderReader(checkpoint.root, checkpoint.stamps) if checkpoint.root else None
    changed = []
    for item in items:
        combined = _combined(item, changes.get(item.spec.name, ()))
        codec = checkpoint.rounded.get(item.spec.name)
        if codec is not None:
            dtype = checkpoint.config.dtype
            combined = (RoundedValues(reader, item.weight, item.spec, codec, dtype), *combined)
        changed.append(replace(item, changes=combined) if combined else item)
    return tuple(changed)


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
    whole = isinstance(change, Replacement | ReplacedRows)
    return whole or (isinstance(change, LowRank) and change.lengths is not None)


def adapter_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what users should know about the adapters of a checkpoint."""
    if checkpoint.rounded:
        codecs = ", ".join(sorted(set(checkpoint.rounded.values())))
        count = len(checkpoint.rounded)
        yield f"{count} weights are taken as {codecs} holds them, and adapters merged into that"
    for adapter in checkpoint.adapters:
        trained = f", trained on {adapter.config.base}" if adapter.config.base else ""
        count = len(adapter.loras) + len(adapter.whole)
        yield f"merged with the adapter {adapter.weighted_title}: {count} weights{trained}"
        if adapter.config.grouped:
            yield (
                f"the stacks of experts in {adapter.title} are in the order in which Unsloth saves "
                "them, not in peft's"
            )
        if "bnb-4bit" in adapter.config.base and not adapter.onto:
            yield (
                f"{adapter.title} was trained on 4-bit weights and is merged into the base's own; "
                "--onto nf4 merges it into weights such as it saw"
            )
        looked_up = any(_LOOKED_UP[0] in lora.parts for lora in adapter.loras.values())
        if looked_up and checkpoint.config.tied:
            yield "the adapter changes the embedding, and with it the head, which is tied to it"
        if adapter.files:
            yield f"from the adapter {adapter.title}: {', '.join(sorted(adapter.files))}"


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
        stacks = stacks_in(adapter)
        found = set(stacks)
        for name, stored in adapter.whole.items():
            if name == _HEAD and self._checkpoint.config.tied and _repeats(adapter, stored):
                continue  # peft saves both where it saves one
            item = self._item(name, stored.spec.name, adapter)
            if item is not None:
                yield item, _replacement(adapter, name, stored, item)
        for name, lora in stacks.items():
            yield from self._stacked(adapter, name, lora)
        wrapped = {lora.module for lora in stacks.values()}
        for module, lora in adapter.loras.items():
            if module in wrapped:
                continue
            some = next(iter(lora.parts.values()))
            item = self._item(f"{module}.weight", some.spec.name, adapter)
            if item is None:
                continue
            if adapter.config.tokens_of(module):
                yield item, _replaced_rows(adapter, lora, item)
                continue
            found.add(item.spec.name)
            yield item, _low_rank(adapter, lora, item)
        self._check_complete(adapter, found)

    def _stacked(
        self, adapter: Adapter, name: str, lora: LoraTensors
    ) -> Iterator[tuple[InventoryItem, WeightChange]]:
        """Yield the change of a stack of experts, or of each matrix if the base has no stacks."""
        dims = self._checkpoint.config.dims
        some = next(iter(lora.parts.values())).spec.name
        try:
            key = _Key.of(role_of(name))
        except TensorError as error:
            raise _unknown(name, some) from error
        change = stacked_change(adapter, name, lora, dims)
        if key in self._by_key:
            yield self._by_key[key], change
            return
        for matrix, first in matrices_in(name, dims):
            item = self._by_key.get(_Key.of(role_of(matrix)))
            if item is None:
                raise _missing(name, some)
            yield item, ShiftedChange(change, first)

    def _item(self, name: str, tensor: str, adapter: Adapter) -> InventoryItem | None:
        """Return the weight of a name; None if it is part of a tower that is left out."""
        try:
            role = role_of(name)
        except TensorError as error:
            raise _unknown(name, tensor) from error
        item = self._by_key.get(_Key.of(role))
        if item is not None:
            routed = role.info.kind == "router" and adapter.config.changes_parameter(name)
            if role.info.kind in ("experts", "router", "conv") and not routed:
                found = f"a change of {role.name}, which is not supported"
                raise TensorError(tensor[:200], found, hint=_WITH_PEFT)
            return item
        if role.scope == "visual" and not self._tower:
            return None
        if name == _HEAD and self._checkpoint.config.tied:
            found = "a change of the head alone, which the base ties to its embedding"
            hint = "untie it: store lm_head.weight, and set tie_word_embeddings to false"
            raise TensorError(tensor[:200], found, hint=hint)
        raise _missing(name, tensor)

    def _check_complete(self, adapter: Adapter, found: set[str]) -> None:
        """Refuse an adapter without the matrices of a module that its settings name."""
        names = (*adapter.loras, *adapter.whole)
        whole_model = any(n.startswith(("model.language_model.", "model.visual.")) for n in names)
        for item in self._by_key.values():
            role, kind = item.role, item.role.info.kind
            if role.scope == "mtp" or (role.scope == "visual" and not whole_model):
                continue
            module = self._trained_name(item, whole_model=whole_model)
            named = kind in ("linear", "head", "embedding") and adapter.config.changes(
                module, linear=kind == "linear"
            )
            key, known = "target_modules", item.spec.name in found
            if kind == "experts" and adapter.config.parameters:
                module = stack_of(module)
                known = module in found
            if not named and adapter.config.parameters:
                key = "target_parameters"
                name = module if kind == "experts" else f"{module}.weight"
                named = adapter.config.changes_parameter(name)
            if named and not known:
                message = f"no matrices for {module}, which {key} names"
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


def _repeats(adapter: Adapter, head: StoredTensor) -> bool:
    """Return whether an adapter's head is its embedding once more."""
    ends = f"{_EMBEDDING}.weight"
    embedding = next((s for n, s in adapter.whole.items() if n.endswith(ends)), None)
    return embedding is not None and same_values(adapter.reader, embedding, head)


def _unknown(name: str, tensor: str) -> TensorError:
    found = f"in {ADAPTER_WEIGHTS}, but Qwen3.5 has no {name[:200]}"
    return TensorError(tensor[:200], found, hint="is it an adapter of this base?")


def _missing(name: str, tensor: str) -> TensorError:
    found = f"in {ADAPTER_WEIGHTS}, but the base has no {name[:200]}"
    return TensorError(tensor[:200], found, hint="is it an adapter of this base?")


def _check_saved(adapter: Adapter) -> None:
    for name in adapter.config.saved:
        if not any(_within(parameter, (name,)) for parameter in adapter.whole):
            message = f"no tensors for {name[:80]}, which modules_to_save names"
            raise TensorError(ADAPTER_WEIGHTS, message, hint="save the adapter again")
    held = [lora.module for lora in adapter.loras.values() if _TOKENS[0] in lora.parts]
    for name, _ in adapter.config.tokens:
        if not any(ends(module, name) for module in held):
            message = f"no rows for {name[:80]}, which trainable_token_indices names"
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


def _replaced_rows(adapter: Adapter, lora: LoraTensors, item: InventoryItem) -> ReplacedRows:
    """Return the change of a weight some of whose rows were trained."""
    rows = adapter.config.tokens_of(lora.module)
    if lora.parts.keys() != set(_TOKENS):
        message = f"{lora.module[:200]} has {', '.join(sorted(lora.parts))}"
        raise TensorError(ADAPTER_WEIGHTS, message, expected=_TOKENS[0], hint=_WITH_PEFT)
    [stored] = lora.parts.values()
    _check_shape(stored, (len(rows), item.spec.shape[-1]))
    if max(rows) >= item.spec.shape[0]:
        message = f"row {max(rows)}, which trainable_token_indices names"
        raise TensorError(stored.spec.name[:200], message, expected=f"below {item.spec.shape[0]}")
    if adapter.factor != 1:
        message = f"rows held whole, so that no weight ({adapter.factor:g}) applies to them"
        raise TensorError(stored.spec.name[:200], message, hint="leave the weight out")
    return ReplacedRows(adapter.reader, stored, rows)


def _low_rank(adapter: Adapter, lora: LoraTensors, item: InventoryItem) -> LowRank:
    """Return the change of a weight by two matrices."""
    kind = item.role.info.kind
    looked_up = kind == "embedding"
    right_name, left_name = reversed(_LOOKED_UP) if looked_up else _LINEAR
    _check_parts(adapter, lora, item)
    config = adapter.config
    by_name = config.changes_parameter(f"{lora.module}.weight")
    if not by_name and not config.changes(lora.module, linear=kind == "linear"):
        message = f"changes {lora.module[:200]}, which target_modules does not name"
        raise TensorError(ADAPTER_WEIGHTS, message, hint="are both files of one adapter?")
    rows, columns = item.spec.shape
    named = f"{lora.module}.weight" if by_name else lora.module
    rank = config.rank_of(named)
    left, right = lora.parts[left_name], lora.parts[right_name]
    shapes = {left: (rows, rank), right: (rank, columns)}
    for stored, shape in shapes.items():
        expected = shape[::-1] if looked_up else shape
        _check_shape(stored, expected)
    lengths = lora.parts.get(_LENGTHS)
    if lengths is not None:
        _check_shape(lengths, (rows,))
    scale = adapter.factor * config.scale_of(named)
    return LowRank(adapter.reader, left, right, scale, looked_up, lengths)


def _check_parts(adapter: Adapter, lora: LoraTensors, item: InventoryItem) -> None:
    """Check that the parts of a module are those that its kind and the settings call for."""
    kind = item.role.info.kind
    some = next(iter(lora.parts.values())).spec.name[:200]
    if kind not in ("linear", "head", "embedding", "router"):
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
