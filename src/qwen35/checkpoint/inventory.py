"""Every weight of a checkpoint matched with what its config says must be there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.storage import FP8_BLOCK, FP8_SCALE, StoredTensor, Weight
from qwen35.errors import TensorError
from qwen35.model.roles import Role, expected_tensors, role_of
from qwen35.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["Item", "inventory", "match"]


@dataclass(frozen=True, slots=True)
class Item:
    """A weight with its meaning.

    Args:
        weight: where its bytes are.
        role: what it is.
        spec: its name, shape and the dtype it has when decoded.
    """

    weight: Weight
    role: Role
    spec: TensorSpec

    def experts(self) -> Iterator[Item]:
        """Yield the matrices of a fused stack of experts, one by one; of anything else, nothing.

        ``gate_up_proj`` [E, 2 I, H] holds the gate in the first I rows of each expert. The parts
        are named as per-expert checkpoints name them.

        Raises:
            TensorError: the stack is packed.
        """
        if self.role.info.place != "fused":
            return
        if self.weight.storage != "plain":
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
                weight = Weight(spec.name, "plain", (StoredTensor(spec, file, begin),))
                yield Item(weight, Role(role.name, role.info, role.layer, expert), spec)
                begin += spec.nbytes


def inventory(checkpoint: Checkpoint) -> tuple[Item, ...]:
    """Match the weights of `checkpoint` with its config, in the order of the config.

    Raises:
        TensorError: a weight is unknown, missing, of another shape or of a dtype that no weight
            has. The sentence names the first and counts the others.
    """
    items, problems = match(checkpoint)
    if problems:
        raise _first(problems)
    return items


def match(checkpoint: Checkpoint) -> tuple[tuple[Item, ...], list[TensorError]]:
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
        problem = _mismatch(weight, expected)
        if problem is not None:
            problems.append(problem)
            continue
        spec = TensorSpec(expected.name, _decoded_dtype(checkpoint, weight), expected.shape)
        items.append(Item(weight, role_of(expected.name), spec))
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
    return weight.main.spec.dtype if weight.storage == "plain" else checkpoint.config.dtype


def _mismatch(weight: Weight, expected: TensorSpec) -> TensorError | None:
    spec = weight.main.spec
    if weight.storage == "nf4":
        if spec.numel == (expected.numel + 1) // 2:
            return None
        return TensorError(
            spec.name,
            f"{spec.numel} packed bytes",
            expected=f"{(expected.numel + 1) // 2} for shape {list(expected.shape)}",
        )
    if spec.shape != expected.shape:
        return TensorError(
            spec.name,
            f"shape {list(spec.shape)}",
            expected=f"{list(expected.shape)} by config.json",
        )
    if weight.storage == "fp8":
        return _scale_mismatch(weight, expected)
    if spec.dtype not in FLOAT_DTYPES:
        return TensorError(spec.name, f"dtype {spec.dtype}", expected=" or ".join(FLOAT_DTYPES))
    return None


def _scale_mismatch(weight: Weight, expected: TensorSpec) -> TensorError | None:
    scale = weight.part(FP8_SCALE)
    shape = tuple(-(-size // FP8_BLOCK) for size in expected.shape)
    if scale is None or len(expected.shape) != 2 or scale.spec.shape != shape:
        found = list(scale.spec.shape) if scale else "none"
        return TensorError(
            weight.name + FP8_SCALE, f"shape {found}", expected=f"{list(shape)}, blocks of 128x128"
        )
    if scale.spec.dtype not in FLOAT_DTYPES:
        return TensorError(scale.spec.name, f"dtype {scale.spec.dtype}", expected="BF16 or F32")
    return None


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
