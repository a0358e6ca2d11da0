"""Every weight of a checkpoint matched with what its config says must be there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import codec_of, is_packed
from qwen35.errors import TensorError
from qwen35.model.roles import Role, expected_tensors, role_of
from qwen35.tensors import StoredTensor, TensorSpec, Weight

__all__ = ["InventoryItem", "inventory", "match"]


@dataclass(frozen=True, slots=True)
class InventoryItem:
    """A weight with its meaning.

    Args:
        weight: where its bytes are.
        role: what it is.
        spec: its name, shape and the dtype it has when decoded.
    """

    weight: Weight
    role: Role
    spec: TensorSpec

    @property
    def module(self) -> str:
        """Its name without ``.weight``."""
        return self.spec.name.removesuffix(".weight")

    @property
    def codec(self) -> str:
        """How it is held."""
        return self.weight.storage

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors that hold it."""
        return tuple(part.spec for part in self.weight.parts)

    def experts(self) -> Iterator[InventoryItem]:
        """Yield the matrices of a fused stack of experts, one by one; of anything else, nothing.

        ``gate_up_proj`` [E, 2 I, H] holds the gate in the first I rows of each expert. The parts
        are named as per-expert checkpoints name them.

        Raises:
            TensorError: the stack is packed.
        """
        if self.role.info.place != "fused":
            return
        if is_packed(self.weight):
            raise TensorError(
                self.weight.name, f"a stack of experts packed as {self.weight.storage}"
            )
        stem, _, leaf = self.spec.name.rpartition(".")
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        count, rows, columns = self.spec.shape
        shape = (rows // len(leaves), columns)
        roles = {part: role_of(f"{stem}.0.{part}.weight") for part in leaves}
        file, begin = self.weight.main.file, self.weight.main.begin
        for expert in range(count):
            for part, role in roles.items():
                spec = TensorSpec(f"{stem}.{expert}.{part}.weight", self.spec.dtype, shape)
                stored = StoredTensor(spec, file, begin)
                weight = Weight(spec.name, self.weight.storage, (stored,))
                yield InventoryItem(weight, Role(role.name, role.info, role.layer, expert), spec)
                begin += spec.nbytes


def inventory(checkpoint: Checkpoint) -> tuple[InventoryItem, ...]:
    """Match the weights of `checkpoint` with its config, in the order of the config.

    Raises:
        TensorError: a weight is unknown, missing, of another shape or of a dtype that no weight
            has. The sentence names the first and counts the others.
    """
    items, problems = match(checkpoint)
    if problems:
        raise _first(problems)
    return items


def match(checkpoint: Checkpoint) -> tuple[tuple[InventoryItem, ...], list[TensorError]]:
    """Match the weights of `checkpoint` with its config.

    Returns:
        The weights that fit, and a problem for each that is unknown, missing, of another shape or
        of a dtype that no weight has.
    """
    weights = {weight.name: weight for weight in checkpoint.weights}
    items, problems = [], []
    for expected in expected_tensors(checkpoint.config, checkpoint.layout):
        weight = weights.pop(expected.name, None)
        if weight is None:
            problems.append(_missing(checkpoint, expected))
            continue
        problem = codec_of(weight).mismatch(weight, expected)
        if problem is not None:
            problems.append(problem)
            continue
        spec = TensorSpec(expected.name, _decoded_dtype(checkpoint, weight), expected.shape)
        items.append(InventoryItem(weight, role_of(expected.name), spec))
    problems += [_extra(checkpoint, name) for name in weights]
    return tuple(items), problems


def _first(problems: list[TensorError]) -> TensorError:
    first = problems[0]
    if len(problems) == 1:
        return first
    more = f"and {len(problems) - 1} more tensors do not fit"
    hint = f"{first.hint} ({more})" if first.hint else more
    return TensorError(first.subject, first.found, expected=first.expected, hint=hint)


def _decoded_dtype(checkpoint: Checkpoint, weight: Weight) -> str:
    return checkpoint.config.dtype if is_packed(weight) else weight.main.spec.dtype


def _missing(checkpoint: Checkpoint, expected: TensorSpec) -> TensorError:
    if ".mlp." in expected.name and checkpoint.config.moe and _has_dense(checkpoint):
        return TensorError(
            expected.name,
            "missing, and the weights are those of a dense model",
            expected=f"the experts that model_type {checkpoint.config.model_type!r} has",
            hint="config.json and weights belong to different models",
        )
    return TensorError(
        expected.name,
        "missing",
        expected=f"{expected.dtype} {list(expected.shape)} by config.json",
        hint="download the checkpoint again, or start from a complete one",
    )


def _has_dense(checkpoint: Checkpoint) -> bool:
    return any(weight.name.endswith(".mlp.gate_proj.weight") for weight in checkpoint.weights)


def _extra(checkpoint: Checkpoint, name: str) -> TensorError:
    try:
        role_of(name)
    except TensorError as error:
        return error
    return TensorError(
        name,
        "config.json has no place for it",
        expected=f"what {checkpoint.config.model_type} with its sizes has",
        hint="config.json and weights belong to different models",
    )
