"""Names, stacks and shapes of tensors in MLX's files, and the family's.

Text tensors begin with ``language_model.model.``, the head with ``language_model.``, the tower with
``vision_tower.``. The experts of a layer are one stack, convolutions have their taps before their
one channel. Sources: mlx-lm 0.32 ``models/qwen3_5{,_moe}.py``, mlx-vlm 0.7 ``models/qwen3_5``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwen35.codecs.dialect import StackedTensor
from qwen35.tensors import StoredTensor, TensorSpec

__all__ = [
    "EMBEDDING",
    "HEAD",
    "family_name",
    "is_stack",
    "mlx_name",
    "split_experts",
    "stacked_tensors",
    "with_taps",
]

EMBEDDING = "language_model.model.embed_tokens.weight"
"""The tensor that every model has, by its name in MLX."""

HEAD = "language_model.lm_head.weight"

_TEXT, _HEAD, _TOWER = "language_model.model.", "language_model.lm_head.", "vision_tower."
_EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d{1,6})\.((?:gate|up|down)_proj\b.*)\Z", re.ASCII)
_STACK = re.compile(
    r"(.*\.mlp\.)switch_mlp\.((?:gate|up|down)_proj\.(?:weight|scales|biases))\Z", re.ASCII
)
_CONVOLUTION = ".conv1d.weight"


def mlx_name(name: str) -> str:
    """Return the name of a family's tensor or module in MLX; experts have that of their stack.

    >>> mlx_name("model.layers.0.mlp.experts.7.up_proj.scales")
    'language_model.model.layers.0.mlp.switch_mlp.up_proj.scales'
    """
    expert = _EXPERT.match(name)
    if expert:
        name = f"{expert[1]}switch_mlp.{expert[3]}"
    prefixes = (
        ("model.visual.", _TOWER),
        ("model.language_model.", _TEXT),
        ("model.", _TEXT),
        ("lm_head", "language_model.lm_head"),
    )
    for family, own in prefixes:
        if name.startswith(family):
            return own + name.removeprefix(family)
    return name


def family_name(name: str, *, vision: bool) -> str:
    """Return the name of a tensor of MLX in the family; stacks of experts keep theirs."""
    prefixes = (
        (_TEXT, "model.language_model." if vision else "model."),
        (_HEAD, "lm_head."),
        (_TOWER, "model.visual."),
    )
    for own, family in prefixes:
        if name.startswith(own):
            return family + name.removeprefix(own)
    return name


def with_taps(spec: TensorSpec) -> TensorSpec | None:
    """Return a convolution in its other form, with its last two dimensions exchanged.

    None if the tensor is none.
    """
    if not spec.name.endswith(_CONVOLUTION) or len(spec.shape) != 3:
        return None
    channels, rows, columns = spec.shape
    return TensorSpec(spec.name, spec.dtype, (channels, columns, rows))


def is_stack(name: str) -> bool:
    """Return whether a tensor holds all experts of a layer, by its name."""
    return _STACK.match(name) is not None


def split_experts(stored: StoredTensor, count: int) -> list[StoredTensor]:
    """Return the tensors of the experts of a stack; nothing for any other tensor.

    Args:
        stored: the tensor.
        count: the experts of a layer. Another stack is none, and stays as it is.
    """
    stack, spec = _STACK.match(stored.spec.name), stored.spec
    if stack is None or len(spec.shape) != 3 or spec.shape[0] != count or not spec.nbytes:
        return []
    found, begin = [], stored.begin
    for expert in range(count):
        name = f"{stack[1]}experts.{expert}.{stack[2]}"
        part = TensorSpec(name, spec.dtype, spec.shape[1:])
        found.append(StoredTensor(part, stored.file, begin))
        begin += part.nbytes
    return found


def stacked_tensors(specs: Iterable[TensorSpec]) -> list[StackedTensor]:
    """Return the tensors of a file; the experts of a layer are together in it."""
    members: dict[str, list[tuple[int, TensorSpec]]] = {}
    for spec in specs:
        expert = _EXPERT.match(spec.name)
        number = int(expert[2]) if expert else -1
        members.setdefault(mlx_name(spec.name), []).append((number, spec))
    return [_stacked(name, found) for name, found in members.items()]


def _stacked(name: str, members: list[tuple[int, TensorSpec]]) -> StackedTensor:
    members.sort(key=lambda member: member[0])
    number, first = members[0]
    parts = tuple(spec for _, spec in members)
    if number >= 0:
        return StackedTensor(TensorSpec(name, first.dtype, (len(parts), *first.shape)), parts)
    shaped = with_taps(first) or first
    return StackedTensor(TensorSpec(name, first.dtype, shaped.shape), parts)
