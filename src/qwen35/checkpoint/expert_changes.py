"""LoRA on stacks of experts, which peft changes as parameters (``target_parameters``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from qwen35.checkpoint.adapter_config import ADAPTER_CONFIG
from qwen35.checkpoint.adapter_files import ADAPTER_WEIGHTS, Adapter, LoraTensors
from qwen35.checkpoint.inventory import stacked_leaves
from qwen35.checkpoint.weight_changes import StackedLowRank
from qwen35.errors import TensorError
from qwen35.model.roles import role_of

__all__ = ["matrices_in", "stack_of", "stacked_change", "stacks_in"]

_EXPERTS = ".mlp.experts"
_NESTED = ".base_layer"
_STACKS = ("gate_up_proj", "down_proj")
"""In the order of transformers' module: peft wraps the first one first, innermost."""


def stacks_in(adapter: Adapter) -> dict[str, LoraTensors]:
    """Return the stacks that an adapter changes, by the parameters' names.

    Raises:
        TensorError: there are more or fewer matrices than ``target_parameters`` names stacks.
    """
    wrapped: dict[str, list[str]] = defaultdict(list)
    for module in adapter.loras:
        stem = module
        while stem.endswith(_NESTED):
            stem = stem.removesuffix(_NESTED)
        if stem.endswith(_EXPERTS):
            wrapped[stem].append(module)
    found: dict[str, LoraTensors] = {}
    for stem, modules in wrapped.items():
        names = [f"{stem}.{leaf}" for leaf in _STACKS]
        targets = [name for name in names if adapter.config.changes_parameter(name)]
        if len(targets) != len(modules):
            message = f"pairs of matrices for {stem[:200]}: {len(modules)}"
            expected = f"{len(targets)}, as target_parameters names"
            raise TensorError(ADAPTER_WEIGHTS, message, expected=expected)
        inner_first = sorted(modules, key=len, reverse=True)
        found |= {t: adapter.loras[m] for t, m in zip(targets, inner_first, strict=True)}
    return found


def stacked_change(
    adapter: Adapter, name: str, lora: LoraTensors, dims: Mapping[str, int]
) -> StackedLowRank:
    """Return the change of a stack.

    Raises:
        TensorError: the matrices do not fit the model's sizes, or are of another kind.
    """
    some = next(iter(lora.parts.values())).spec.name[:200]
    if adapter.config.dora or lora.parts.keys() != {"lora_A", "lora_B"}:
        found = ", ".join(sorted(lora.parts))
        raise TensorError(some, f"a stack of experts with {found}", expected="lora_A, lora_B")
    experts, rows, columns = (dims.get(key, 0) for key in role_of(name).info.shape)
    rank = adapter.config.rank_of(name)
    left, right = lora.parts["lora_B"], lora.parts["lora_A"]
    shapes = {left: (rows, rank * experts), right: (experts * rank, columns)}
    for stored, shape in shapes.items():
        if stored.spec.shape != shape:
            message = f"shape {str(list(stored.spec.shape))[:80]}"
            expected = f"{list(shape)} by the base and {ADAPTER_CONFIG}"
            raise TensorError(stored.spec.name[:200], message, expected=expected)
    scale = adapter.factor * adapter.config.scale_of(name)
    grouped = name.rpartition(".")[2] in adapter.config.grouped
    return StackedLowRank(adapter.reader, left, right, experts, scale, grouped)


def matrices_in(name: str, dims: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield the name of each matrix of a stack, and its first element within the stack."""
    stem, _, leaf = name.rpartition(".")
    leaves = stacked_leaves(leaf)
    experts, rows, columns = (dims.get(key, 0) for key in role_of(name).info.shape)
    for number in range(experts * len(leaves)):
        expert, part = divmod(number, len(leaves))
        yield f"{stem}.{expert}.{leaves[part]}.weight", number * rows // len(leaves) * columns


def stack_of(module: str) -> str:
    """Return the stack that a matrix of an expert, or the stack itself, belongs to."""
    stem, _, rest = module.rpartition(f"{_EXPERTS}.")
    leaf = rest.rpartition(".")[2]
    return f"{stem}{_EXPERTS}.{leaf if leaf in _STACKS else _STACKS[0]}"
