"""Steps: what happens to each weight, decided from a recipe and headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen35.checkpoint.inventory import Item
from qwen35.checkpoint.storage import Weight
from qwen35.codecs import fp8, nf4
from qwen35.errors import UsageError
from qwen35.model.fused import fused_group
from qwen35.model.roles import Role
from qwen35.plan.recipe import Recipe, Rule
from qwen35.tensors import TensorSpec

__all__ = ["Op", "Step", "check_groups", "make_steps"]

Op = Literal["drop", "copy", "decode", "nf4", "fp8"]


@dataclass(frozen=True)
class Step:
    """What happens to one weight.

    Args:
        weight: its stored tensors; for one expert of a fused stack, the part that holds it.
        spec: the weight itself, decoded.
        role: what it is.
        op: ``drop``; ``copy`` the stored bytes; ``decode`` to `spec`; encode as ``nf4`` or ``fp8``.
        reason: the recipe's words.
        outputs: what is written, in the order the codec gives.
    """

    weight: Weight
    spec: TensorSpec
    role: Role
    op: Op
    reason: str
    outputs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(out.nbytes for out in self.outputs)

    @property
    def packing(self) -> Literal["nf4", "fp8"] | None:
        """How the output holds the weight, if packed."""
        dtype = self.outputs[0].dtype if self.outputs else ""
        return "nf4" if dtype == "U8" else "fp8" if dtype == "F8_E4M3" else None


def make_steps(
    recipe: Recipe, items: Sequence[Item], source_prefix: str, prefix: str
) -> tuple[Step, ...]:
    """Decide what happens to each weight.

    Args:
        recipe: the rules.
        items: the source's weights.
        source_prefix: what their text tensors begin with.
        prefix: what text tensors begin with in the output.

    Raises:
        UsageError: the recipe asks for what no loader could read.
    """
    unfit = _unfit(recipe, items)
    steps: list[Step] = []
    for item in items:
        rule = recipe.rule_for(item.role)
        parts = [item]
        if rule.action == "fp8" and item.weight.name not in unfit:
            parts = list(item.experts()) or parts
        for part in parts:
            op, reason = _operation(recipe.name, rule, part, unfit)
            name = part.spec.name
            if prefix != source_prefix and name.startswith(source_prefix):
                name = prefix + name.removeprefix(source_prefix)
            outputs = _outputs(op, part, name)
            steps.append(Step(part.weight, part.spec, part.role, op, reason, outputs))
    check_groups(steps)
    return tuple(steps)


def _outputs(op: Op, item: Item, name: str) -> tuple[TensorSpec, ...]:
    renamed = TensorSpec(name, item.spec.dtype, item.spec.shape)
    if op == "copy":
        return tuple(
            TensorSpec(
                name + part.spec.name.removeprefix(item.spec.name), part.spec.dtype, part.spec.shape
            )
            for part in item.weight.parts
        )
    if op == "decode":
        return (renamed,)
    if op == "nf4":
        return nf4.layout(renamed)
    return fp8.layout(renamed) if op == "fp8" else ()


def _operation(recipe: str, rule: Rule, item: Item, unfit: Mapping[str, str]) -> tuple[Op, str]:
    storage, reason = item.weight.storage, rule.reason
    if rule.action == "drop":
        if item.role.scope == "text":
            found = f"drops {item.spec.name}, which every model needs"
            raise UsageError(
                _subject(recipe, rule), found, hint="only visual and mtp can be dropped"
            )
        return "drop", reason
    if rule.action == "keep" or (rule.action == "plain" and storage == "plain"):
        return "copy", reason
    if rule.action == "plain":
        return "decode", f"{reason}; packed in the source ({storage}), restored"
    _check_packable(recipe, rule, item)
    if storage == rule.action:
        return "copy", f"{reason}; {storage.upper()} already"
    if rule.action == "nf4" and item.spec.numel % nf4.BLOCK:
        return "copy" if storage == "plain" else "decode", f"not a multiple of {nf4.BLOCK} weights"
    if rule.action == "fp8" and item.weight.name in unfit:
        return "copy" if storage == "plain" else "decode", unfit[item.weight.name]
    return rule.action, reason


def _subject(recipe: str, rule: Rule) -> str:
    return f"recipe {recipe}, rule for {rule.match!r} ({rule.reason})"


def _check_packable(recipe: str, rule: Rule, item: Item) -> None:
    kind, scope = item.role.info.kind, item.role.scope
    if rule.action == "nf4" and (kind != "linear" or scope == "mtp"):
        expected = "linear layers of the text model or the vision tower"
    elif rule.action == "fp8" and kind not in ("linear", "experts"):
        expected = "linear layers or experts"
    else:
        return
    hint = f'put a rule with match = "{item.role.name}" and action = "plain" before it'
    found = f"packs {item.spec.name}"
    raise UsageError(_subject(recipe, rule), found, expected=expected, hint=hint)


def _unfit(recipe: Recipe, items: Sequence[Item]) -> dict[str, str]:
    """Return why weights that the recipe would pack as FP8 stay: a group is packed whole or not."""
    reasons: dict[str, str] = {}
    for group in _groups(items):
        wanted = [item for item in group if recipe.rule_for(item.role).action == "fp8"]
        for item in wanted:
            parts = list(item.experts()) or [item]
            if not all(fp8.fits(part.spec.shape) for part in parts):
                shape = list(parts[0].spec.shape)
                why = f"{item.role.name} is {shape}: not whole tiles of 128 x 128"
                reasons |= {member.weight.name: why for member in wanted}
                break
    return reasons


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Yield weights that engines join, together; every other one alone."""
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        key = fused_group(item.role)
        groups[item.weight.name if key is None else key].append(item)
    yield from groups.values()


def check_groups(steps: Sequence[Step]) -> None:
    """Check that weights which engines join are packed as FP8 together.

    Raises:
        UsageError: some of a group are packed and some are not.
    """
    first: dict[object, Step] = {}
    for step in steps:
        key = fused_group(step.role)
        if key is None:
            continue
        other = first.setdefault(key, step)
        if (step.packing == "fp8") != (other.packing == "fp8"):
            packed, plain = (step, other) if step.packing == "fp8" else (other, step)
            raise UsageError(
                "recipe",
                f"packs {packed.spec.name} as FP8, but not {plain.spec.name}",
                expected="both or neither: engines load them as one matrix",
                hint=f"keep {packed.role.name} as well, or pack {plain.role.name}",
            )
