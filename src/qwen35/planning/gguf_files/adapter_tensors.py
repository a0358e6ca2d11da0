"""The tensors of an adapter's GGUF file: two for each weight that it changes.

llama.cpp adds ``alpha / rank * (B @ A)`` to a weight (``src/llama-graph.cpp``, `build_lora_mm`),
with one alpha for all. What else decides a factor (rsLoRA, `rank_pattern`, `alpha_pattern`, the
weight of an adapter) goes into B. Source of names, order and values: ``convert_lora_to_gguf.py``,
which leaves that out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qwen35.checkpoint.adapter_files import Adapter
from qwen35.checkpoint.expert_changes import stacks_in
from qwen35.checkpoint.gguf_header import LORA_A, LORA_B
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.weight_changes import LowRank
from qwen35.codecs.plain.codec import Plain
from qwen35.errors import TensorError, UsageError
from qwen35.model.roles import MTP, TOWER
from qwen35.planning.gguf_files.tensor_names import UntypedTensor, text_tensors
from qwen35.planning.rows import Rows, WeightSlab
from qwen35.planning.transforms import Scaled, Transform
from qwen35.tensors import StoredTensor, Weight

__all__ = ["adapter_tensors", "only_adapter", "stored_alpha"]

_LARGEST = 2.0**127
_PRODUCT = ("lora_A", "lora_B")
_MERGE = "merge it: `qwen35 gguf MODEL OUT --adapter DIR`, without --adapter-only"


def stored_alpha(adapter: Adapter) -> float:
    """Return ``adapter.lora.alpha``, an F32; llama.cpp takes 0 for none."""
    return float(np.float32(adapter.config.alpha)) or 1.0


def only_adapter(checkpoint: Checkpoint) -> Adapter:
    """Return the one adapter of a checkpoint.

    Raises:
        TensorError: it holds what llama.cpp cannot add to a model.
        UsageError: there is no adapter, or there are several.
    """
    if len(checkpoint.adapters) != 1:
        number = len(checkpoint.adapters)
        hint = "make a file of each: llama.cpp adds several" if number else "add --adapter DIR"
        expected = "one for an adapter's file"
        raise UsageError("--adapter", f"{number or 'none'} given", expected=expected, hint=hint)
    (adapter,) = checkpoint.adapters
    _check(adapter)
    return adapter


def adapter_tensors(checkpoint: Checkpoint, items: Sequence[InventoryItem]) -> list[UntypedTensor]:
    """Return the tensors of an adapter's file, in the converter's order.

    Args:
        checkpoint: the base, with this adapter alone.
        items: all weights of the base, with their changes.

    Raises:
        TensorError: it holds what llama.cpp cannot add to a model.
        UsageError: there is no adapter, or there are several.
    """
    adapter = only_adapter(checkpoint)
    changed = [item for item in items if item.changes]
    tensors = text_tensors(changed, checkpoint.config, mtp=False)
    pairs = [list(_pair(adapter, tensor)) for tensor in tensors]
    pairs.sort(key=lambda pair: pair[0].rows.item.weight.name)
    return [tensor for pair in pairs for tensor in pair]


def _check(adapter: Adapter) -> None:
    """Refuse what is not a product of two matrices for a weight of the text model."""
    for name, problem in _problems(adapter):
        raise TensorError(name[:200], f"{problem}, which llama.cpp cannot add", hint=_MERGE)


def _problems(adapter: Adapter) -> Iterator[tuple[str, str]]:
    for stored in adapter.whole.values():
        yield stored.spec.name, "a weight held whole (modules_to_save or a bias)"
    stacks = stacks_in(adapter).values()
    for module, lora in adapter.loras.items():
        name = next(iter(lora.parts.values())).spec.name
        if "lora_magnitude_vector" in lora.parts:
            yield name, "DoRA"
        elif any(part not in _PRODUCT for part in lora.parts):
            yield name, "a change of the embedding"
        elif module.startswith(TOWER):
            yield name, "a change of the vision tower"
        elif module.startswith(MTP):
            yield name, "a change of the MTP layer"
        elif lora in stacks:
            yield name, "a change of a stack of experts (target_parameters)"


def _pair(adapter: Adapter, tensor: UntypedTensor) -> Iterator[UntypedTensor]:
    """Yield A and B of a weight, with the order of value heads that its rows or columns have."""
    item, moves = tensor.rows.item, tensor.rows.transforms
    (change,) = item.changes
    assert isinstance(change, LowRank)  # all else is refused
    columns = tuple(move for move in moves if not move.moves)
    rows = tuple(move for move in moves if move.moves)
    scaled = _scaled(adapter, tensor.name, change)
    yield _part(adapter, tensor.name + LORA_A, item, change.right, columns)
    yield _part(adapter, tensor.name + LORA_B, item, change.left, (*rows, *scaled))


def _part(
    adapter: Adapter,
    name: str,
    item: InventoryItem,
    stored: StoredTensor,
    transforms: tuple[Transform, ...],
) -> UntypedTensor:
    spec = stored.spec
    weight = Weight(spec.name, Plain.name, (adapter.located(stored),))
    slab = WeightSlab(InventoryItem(weight, item.role, spec))
    return UntypedTensor(name, Rows(spec.shape, (slab,), transforms))


def _scaled(adapter: Adapter, name: str, change: LowRank) -> tuple[Transform, ...]:
    """Return what B is multiplied by beyond alpha and rank, if anything."""
    rank = change.right.spec.shape[0]
    factor = change.scale / (stored_alpha(adapter) / rank)
    if abs(factor) >= _LARGEST:
        found = f"multiplied by {factor:g} beyond its alpha and rank, which F32 does not hold"
        raise TensorError(name, found, hint=_MERGE)
    factor = float(np.float32(factor))
    return () if factor == 1 else (Scaled(factor, name),)
