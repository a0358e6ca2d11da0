"""A checkpoint with adapters: what has to change before any weight is read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from qwen35.checkpoint.adapter_files import ADAPTER_WEIGHTS, Adapter
from qwen35.checkpoint.overlaid import OverlaidFiles
from qwen35.checkpoint.sidecars import SIDECARS
from qwen35.checkpoint.source import Checkpoint, read_json
from qwen35.codecs.registry import is_packed
from qwen35.errors import TensorError
from qwen35.model.model_config import parse_config
from qwen35.tensors import StoredTensor, TensorSpec, Weight

__all__ = ["adapted"]

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens"
_TEMPLATE = "chat_template.jinja"


def adapted(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the checkpoint with adapters, applied in this order.

    One that trained the embedding or the head alone unties them, as peft's merge does. One with
    another number of tokens changes ``vocab_size``. A tokenizer or chat template beside an adapter
    takes the place of the base's.

    Raises:
        TensorError: it would have to untie or resize packed weights, or is not complete.
    """
    if not adapters:
        return checkpoint
    if any(map(_unties, adapters)) and checkpoint.config.tied:
        checkpoint = _untied(checkpoint)
    checkpoint = _resized(checkpoint, adapters)
    return replace(_with_files(checkpoint, adapters), adapters=tuple(adapters))


def _with_files(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the checkpoint with the tokenizer and the chat template of its adapters."""
    added = {name: adapter.place for adapter in adapters for name in adapter.files}
    if not added or checkpoint.place is None:
        return checkpoint
    hidden = set()
    if "tokenizer_config.json" in added and _TEMPLATE not in added:
        settings = read_json(added["tokenizer_config.json"], "tokenizer_config.json")
        if isinstance(settings, dict) and settings.get("chat_template"):
            hidden.add(_TEMPLATE)  # the base's file would have precedence over the adapter's
    place = OverlaidFiles(checkpoint.place, added, hidden)
    sizes, known = place.sizes(), {row.name for row in SIDECARS}
    return replace(
        checkpoint,
        place=place,
        sidecars={name: size for name, size in sorted(sizes.items()) if name in known},
        dangling=place.dangling(),
    )


def _resized(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the checkpoint with as many tokens as its adapters hold embeddings of.

    Raises:
        TensorError: one holds only one of embedding and head, or the base's are packed.
    """
    names = [f"{checkpoint.layout.prefix}{_EMBEDDING}.weight"]
    names += [] if checkpoint.config.tied else [_HEAD]
    sizes = {size for adapter in adapters for size in _vocabulary(adapter).values()}
    count = next(iter(sizes - {checkpoint.config.dims["vocab"]}), 0)
    if not count:
        return checkpoint
    for adapter in adapters:
        held = _vocabulary(adapter)
        lacking = [name for name in names if _short(name) not in held]
        if count in held.values() and lacking:
            message = f"embeddings of {count} tokens, the base has "
            message += f"{checkpoint.config.dims['vocab']}, and no {_short(lacking[0])}"
            raise TensorError(ADAPTER_WEIGHTS, message, hint="save the adapter with both")
    raw = copy.deepcopy(dict(checkpoint.config.raw))
    for section in (raw, raw.get("text_config")):
        if isinstance(section, dict) and "vocab_size" in section:
            section["vocab_size"] = count
    weights = (_sized(w, count) if w.name in names else w for w in checkpoint.weights)
    return replace(checkpoint, config=parse_config(raw), weights=tuple(weights))


def _vocabulary(adapter: Adapter) -> dict[str, int]:
    """Return the rows of the embedding and of the head that an adapter holds whole."""
    ends = (f"{_EMBEDDING}.weight", _HEAD)
    held = {n: s.spec.shape for n, s in adapter.whole.items() if n.endswith(ends)}
    return {_short(name): shape[0] for name, shape in held.items() if len(shape) == 2}


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _sized(weight: Weight, count: int) -> Weight:
    """Return an embedding with `count` rows, all of which an adapter replaces."""
    spec = weight.main.spec
    if is_packed(weight) or len(spec.shape) != 2:
        message = "packed, and the adapter has another number of tokens"
        raise TensorError(weight.name, message, hint="decode the base first, with --recipe bf16")
    sized = TensorSpec(spec.name, spec.dtype, (count, spec.shape[1]))
    stored = StoredTensor(sized, weight.main.file, weight.main.begin)
    return Weight(weight.name, weight.storage, (stored,))


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
