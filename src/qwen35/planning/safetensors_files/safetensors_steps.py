"""The steps of a safetensors output, decided from a recipe and headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.codecs.arranged import ArrangedWeight
from qwen35.codecs.codec import Codec
from qwen35.codecs.dialect import Dialect
from qwen35.codecs.plain.codec import Plain
from qwen35.codecs.registry import CODECS, DIALECTS, codec_of, is_packed
from qwen35.errors import UsageError
from qwen35.model.dimension_keys import shape_keys
from qwen35.model.fused import fused_group, scale_group
from qwen35.model.roles import Role
from qwen35.planning.rules import Recipe, Rule
from qwen35.record_class import record
from qwen35.tensors import TensorSpec

__all__ = ["DraftStep", "check_groups", "make_drafts", "output_dialect", "scale_groups"]


@record
class DraftStep:
    """A step not yet assigned to a file.

    Args:
        item: the weight; for one expert of a fused stack, its part.
        rule: the rule that decided.
        codec: the output's codec; empty if the weight is dropped.
        copied: whether the stored bytes are copied.
        reason: why; usually the rule's reason.
        outputs: the tensors written, in the codec's order.
    """

    item: InventoryItem
    rule: Rule
    codec: str
    copied: bool
    reason: str
    outputs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(out.nbytes for out in self.outputs)

    @property
    def surveys(self) -> bool:
        """Whether encoding it needs the largest magnitude of its whole (`Codec.surveys`)."""
        return bool(self.outputs) and not self.copied and CODECS[self.codec].surveys

    # --- `qwen35.codecs.codec.LoaderModule`

    @property
    def role(self) -> Role:
        """Its role in the model."""
        return self.item.role

    @property
    def spec(self) -> TensorSpec:
        """The decoded weight."""
        return self.item.spec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors written for it."""
        return self.outputs

    @property
    def module(self) -> str:
        """The module's name in the output."""
        return CODECS[self.codec].weight_name(self.outputs[0].name).removesuffix(".weight")


Ruled = Sequence[tuple[InventoryItem, Rule]]
"""Every weight with the rule that applies to it."""


def make_drafts(
    recipe: Recipe, ruled: Ruled, source_prefix: str, prefix: str
) -> tuple[DraftStep, ...]:
    """Decide what happens to each weight.

    Args:
        recipe: the rules.
        ruled: the source's weights, each with its rule.
        source_prefix: prefix of text tensors in the source.
        prefix: prefix of text tensors in the output.

    Raises:
        UsageError: no loader could read the recipe's output.
    """
    unfit, dialect = _unfit(ruled), output_dialect(ruled)
    drafts: list[DraftStep] = []
    for item, rule in ruled:
        parts = [item]
        codec = CODECS.get(rule.action)
        alone = codec is not None and codec.per_expert and item.weight.name not in unfit
        if alone or (dialect is not None and rule.action != "drop"):
            parts = list(item.experts()) or parts  # a stack that does not fit stays fused
        for part in parts:
            unpacked = dialect.unpacked(part.role) if dialect else Plain.name
            codec_name, copied, reason = decide(recipe.name, rule, codec, part, unfit, unpacked)
            name = part.spec.name
            if prefix != source_prefix and name.startswith(source_prefix):
                name = prefix + name.removeprefix(source_prefix)
            outputs = _outputs(codec_name, copied, part, name)
            drafts.append(DraftStep(part, rule, codec_name, copied, reason, outputs))
    check_groups(drafts)
    return tuple(drafts)


def output_dialect(ruled: Ruled) -> Dialect | None:
    """Return the dialect of an output's files; None if they have the family's names."""
    for item, rule in ruled:
        codec = CODECS.get(item.weight.storage if rule.action == "keep" else rule.action)
        if codec is not None and codec.packed and codec.dialect:
            return DIALECTS[codec.dialect]
    return None


def _outputs(codec: str, copied: bool, item: InventoryItem, name: str) -> tuple[TensorSpec, ...]:
    if copied:
        before, now = (whole.removesuffix(".weight") for whole in (item.spec.name, name))
        return tuple(
            TensorSpec(now + part.spec.name.removeprefix(before), part.spec.dtype, part.spec.shape)
            for part in item.weight.parts
        )
    renamed = TensorSpec(name, item.spec.dtype, item.spec.shape)
    return CODECS[codec].layout(renamed) if codec else ()


def decide(
    recipe: str,
    rule: Rule,
    codec: Codec | None,
    item: InventoryItem,
    unfit: Mapping[str, str],
    unpacked: str = Plain.name,
) -> tuple[str, bool, str]:
    """Return the output's codec, whether bytes are copied, and the reason.

    `unpacked` is the codec of weights that are not quantized.
    """
    if codec is None and rule.action != "keep":
        _check_dropped(recipe, rule, item)
        return "", False, rule.reason
    storage, reason = item.weight.storage, _reason(recipe, rule, codec, item)
    if codec is None or not codec.packed:
        return _unpacked(codec, item, reason, unpacked)
    if not codec.packs(item.role):
        hint = f'put a rule with match = "{item.role.name}" and action = "plain" before it'
        found = f"packs {item.spec.name}"
        subject = _subject(recipe, rule)
        raise UsageError(subject, found, expected=codec.packable, hint=hint)
    if storage == codec.name and not item.changes:  # copying is exact, encoding again is not
        return storage, True, f"{reason}; {codec.label} already"
    misfit = unfit.get(item.weight.name, "") if codec.joined else _misfit(codec, item)
    if misfit:
        same = storage == unpacked and not is_packed(item.weight)
        return unpacked, same and not item.changes, misfit
    return codec.name, False, reason


def _unpacked(
    codec: Codec | None, item: InventoryItem, reason: str, unpacked: str
) -> tuple[str, bool, str]:
    """Return what `decide` returns for a weight that is kept or stays unpacked."""
    storage = item.weight.storage
    if isinstance(item.weight, ArrangedWeight):
        label = codec_of(item.weight).label
        return unpacked, False, f"{reason}; {label} in the source, restored"
    if not is_packed(item.weight):
        return unpacked, storage == unpacked and not item.changes, reason
    if codec is None:
        return storage, not item.changes, reason
    return unpacked, False, f"{reason}; packed in the source ({storage}), restored"


def _check_dropped(recipe: str, rule: Rule, item: InventoryItem) -> None:
    if item.role.scope == "text":
        found = f"drops {item.spec.name}, which every model needs"
        hint = "only visual and mtp can be dropped"
        raise UsageError(_subject(recipe, rule), found, hint=hint)


def _reason(recipe: str, rule: Rule, codec: Codec | None, item: InventoryItem) -> str:
    """Return the rule's reason, and say if an adapter changes the weight.

    Raises:
        UsageError: the changed weight would have to be packed as it was, beside unchanged ones.
    """
    if not item.changes:
        return rule.reason
    packed = is_packed(item.weight) and not isinstance(item.weight, ArrangedWeight)
    kept = codec is None and rule.action == "keep" and packed
    fused = codec is not None and codec.surveys and codec.name == item.weight.storage
    if kept or fused:
        found = (
            f"leaves {item.spec.name} packed as {item.weight.storage}, which the adapter changes"
        )
        hint = "merge into unpacked weights first, with --recipe bf16"
        raise UsageError(_subject(recipe, rule), found, hint=hint)
    return f"{rule.reason}; changed by the adapter"


def _subject(recipe: str, rule: Rule) -> str:
    return f"recipe {recipe}, rule for {rule.match!r} ({rule.reason})"


def _unfit(ruled: Ruled) -> dict[str, str]:
    """Return why weights stay unpacked whose codec packs fused groups as a whole.

    One member that does not fit keeps its whole group: engines load it as one matrix.
    """
    reasons: dict[str, str] = {}
    for group in _groups(ruled):
        for item, codec in group:
            # gate and up projection, or down projection, of one expert: all have these shapes
            parts = list(islice(item.experts(), 2)) if codec.per_expert else []
            misfits = (_misfit(codec, part) for part in parts or [item])
            misfit = next((text for text in misfits if text), "")
            if misfit:
                reasons |= {member.weight.name: misfit for member, _ in group}
                break
    return reasons


def _misfit(codec: Codec, item: InventoryItem) -> str:
    """Return why a weight does not fit a codec, with the keys of config.json that set its shape."""
    misfit = codec.fits(item.spec)
    return f"{item.role.name} {misfit}, by {shape_keys(item.role.info)}" if misfit else ""


def _groups(ruled: Ruled) -> Iterator[list[tuple[InventoryItem, Codec]]]:
    """Yield the fused groups of weights whose codec packs groups as a whole."""
    groups: dict[object, list[tuple[InventoryItem, Codec]]] = defaultdict(list)
    for item, rule in ruled:
        codec = CODECS.get(rule.action)
        if codec is not None and codec.joined:
            groups[fused_group(item.role) or item.weight.name].append((item, codec))
    yield from groups.values()


def check_groups(drafts: Sequence[DraftStep]) -> None:
    """Check that fused groups are packed as a whole, where a codec needs that.

    Raises:
        UsageError: only a part of a group is packed.
    """
    first: dict[object, DraftStep] = {}
    for draft in drafts:
        key = fused_group(draft.role)
        if key is None:
            continue
        other = first.setdefault(key, draft)
        ours, theirs = _joined(draft), _joined(other)
        if ours != theirs:
            packed, plain = (draft, other) if ours else (other, draft)
            label = CODECS[packed.codec].label
            raise UsageError(
                "recipe",
                f"packs {packed.spec.name} as {label}, but not {plain.spec.name}",
                expected="both or neither: engines load them as one matrix",
                hint=f"keep {packed.role.name} as well, or pack {plain.role.name}",
            )


def scale_groups(drafts: Iterable[DraftStep]) -> Mapping[object, list[DraftStep]]:
    """Return the weights that are encoded with one scale of the whole, by group."""
    groups: dict[object, list[DraftStep]] = defaultdict(list)
    for draft in drafts:
        if draft.surveys and (key := scale_group(draft.role)) is not None:
            groups[key].append(draft)
    return groups


def _joined(draft: DraftStep) -> str:
    """Return the codec of a weight if it packs fused groups as a whole, else nothing."""
    codec = CODECS.get(draft.codec)
    return codec.name if codec and codec.joined else ""
