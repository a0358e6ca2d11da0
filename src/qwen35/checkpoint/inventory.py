"""Match every weight of a checkpoint with the tensors its config requires."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qwen35.checkpoint.prefixes import WITHOUT_TOWER
from qwen35.checkpoint.renamed import empty_cause, naming_cause, size_cause
from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.weight_changes import Replacement, ShiftedChange
from qwen35.codecs.arranged import ArrangedWeight
from qwen35.codecs.kv_cache import cache_problems
from qwen35.codecs.registry import codec_of, is_packed
from qwen35.errors import TensorError
from qwen35.model.roles import MTP, TOWER, Role, expected_tensors, role_of, tower_tensors
from qwen35.record_class import record
from qwen35.tensors import StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.checkpoint.weight_changes import WeightChange

__all__ = ["InventoryItem", "inventory", "match", "stacked_leaves"]


@record
class InventoryItem:
    """A weight and its role.

    Args:
        weight: where its bytes are.
        role: its role in the model.
        spec: name and shape, with the dtype after decoding.
        changes: what adapters do to its values, in order.
    """

    weight: Weight
    role: Role
    spec: TensorSpec
    changes: tuple[WeightChange, ...] = ()

    @property
    def replaced(self) -> bool:
        """Whether an adapter holds all of its values."""
        return any(isinstance(change, Replacement) for change in self.changes)

    @property
    def module(self) -> str:
        """The weight's name without ``.weight``."""
        return self.spec.name.removesuffix(".weight")

    @property
    def codec(self) -> str:
        """The name of the codec that holds it."""
        return self.weight.storage

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Descriptions of the tensors that hold it."""
        return tuple(part.spec for part in self.weight.parts)

    def experts(self) -> Iterator[InventoryItem]:
        """Yield the matrices of a fused stack of experts; nothing for any other weight.

        In ``gate_up_proj`` [E, 2 I, H] the first I rows of each expert are the gate. The parts
        get the names that per-expert checkpoints use.

        Raises:
            TensorError: the stack is packed.
        """
        if self.role.info.place != "fused":
            return
        if isinstance(self.weight, ArrangedWeight):
            yield from self._arranged_experts(self.weight)
            return
        if is_packed(self.weight):
            raise TensorError(
                self.weight.name, f"a stack of experts packed as {self.weight.storage}"
            )
        file, begin = self.weight.main.file, self.weight.main.begin
        first = 0
        # Each matrix is a contiguous range of the stack.
        for spec, role in self._matrices():
            stored = StoredTensor(spec, file, begin)
            weight = Weight(spec.name, self.weight.storage, (stored,))
            changes = tuple(ShiftedChange(change, first) for change in self.changes)
            yield InventoryItem(weight, role, spec, changes)
            begin, first = begin + spec.nbytes, first + spec.numel

    def _matrices(self) -> Iterator[tuple[TensorSpec, Role]]:
        """Yield the matrices of a stack in its order."""
        stem, _, leaf = self.spec.name.rpartition(".")
        leaves = stacked_leaves(leaf)
        count, rows, columns = self.spec.shape
        shape = (rows // len(leaves), columns)
        roles = {part: role_of(f"{stem}.0.{part}.weight") for part in leaves}
        for expert in range(count):
            for part, role in roles.items():
                spec = TensorSpec(f"{stem}.{expert}.{part}.weight", self.spec.dtype, shape)
                yield spec, Role(role.name, role.info, role.layer, expert)

    def _arranged_experts(self, weight: ArrangedWeight) -> Iterator[InventoryItem]:
        row, first = 0, 0
        for spec, role in self._matrices():
            changes = tuple(ShiftedChange(change, first) for change in self.changes)
            yield InventoryItem(weight.cut(spec.name, row, spec.shape[0]), role, spec, changes)
            row, first = row + spec.shape[0], first + spec.numel


def stacked_leaves(leaf: str) -> tuple[str, ...]:
    """Return the names of an expert's matrices in a stack, in their order."""
    return ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)


def inventory(checkpoint: Checkpoint, *, tower: bool = True) -> tuple[InventoryItem, ...]:
    """Match the weights of `checkpoint` with its config, in config order.

    Args:
        checkpoint: with the MTP layers that it holds (`qwen35.checkpoint.reconciled`).
        tower: whether the vision tower must be whole; if not, only what fits of it is returned.

    Raises:
        TensorError: a weight is unknown, missing, or has an unexpected shape or dtype. The message
            names the first and counts the others.
    """
    items, problems = match(checkpoint, tower=tower)
    if problems:
        raise _summary(problems)
    return items


def match(
    checkpoint: Checkpoint, *, tower: bool = True
) -> tuple[tuple[InventoryItem, ...], list[TensorError]]:
    """Match the weights of `checkpoint` with its config; arguments as for `inventory`.

    Returns:
        The weights that match, and one problem for each weight that is unknown, missing, or has an
        unexpected shape or dtype; where these have one cause, that alone.
    """
    weights = {weight.name: weight for weight in checkpoint.weights}
    spared, problems = _spared(checkpoint, tower=tower)
    dense = checkpoint.config.moe and _has_dense(checkpoint)
    items, missing, misfits = [], [], list[_Misfit]()
    fitting = set[object]()
    for expected in expected_tensors(checkpoint.config, checkpoint.layout):
        weight = weights.pop(expected.name, None)
        if expected.name in spared and not _fits(weight, expected):
            continue
        if weight is None:
            missing.append(expected.name)
            problems.append(_missing(checkpoint, expected, dense=dense))
            continue
        problem = _mismatch(weight, expected, fitting)
        if problem is not None:
            problems.append(_with_vocabulary(problem, expected, weight.main.spec.shape))
            misfits.append((expected, weight.main.spec.shape))
            continue
        spec = weight.main.spec
        if is_packed(weight):
            arranged = isinstance(weight, ArrangedWeight)  # some of them are always F32
            dtype = expected.dtype if arranged else checkpoint.config.dtype
            spec = TensorSpec(weight.name, dtype, expected.shape)
        elif spec.shape != expected.shape:  # a codec holds it in another form
            spec = TensorSpec(weight.name, spec.dtype, expected.shape)
        items.append(InventoryItem(weight, role_of(weight.name), spec))
    cause = _cause(checkpoint, items, list(weights), missing, misfits)
    if cause is not None:
        return tuple(items), cause
    unknown = (name for name in weights if tower or not name.startswith(TOWER))
    problems += [_unexpected(checkpoint, name) for name in unknown]
    return tuple(items), [*problems, *_cache_problems(checkpoint)]


def _cache_problems(checkpoint: Checkpoint) -> Iterator[TensorError]:
    if not checkpoint.cache_scales:
        return
    expected = expected_tensors(checkpoint.config, checkpoint.layout)
    ending = ".self_attn.k_proj.weight"
    names = (spec.name for spec in expected if spec.name.endswith(ending))
    modules = {f"{name.removesuffix(ending)}.self_attn": name.startswith(MTP) for name in names}
    yield from cache_problems([scale.spec for scale in checkpoint.cache_scales], modules)


def _fits(weight: Weight | None, expected: TensorSpec) -> bool:
    return weight is not None and codec_of(weight).mismatch(weight, expected) is None


def _spared(checkpoint: Checkpoint, *, tower: bool) -> tuple[set[str], list[TensorError]]:
    """Return the tensors whose faults are not told one by one, and what is told instead."""
    names = {spec.name for spec in tower_tensors(checkpoint.config)}
    if not tower or not names:
        return names, []
    if any(weight.name in names for weight in checkpoint.weights):
        return set(), []
    problem = TensorError(
        "config.json",
        "it describes a vision tower, but the checkpoint has none",
        expected=f"{len(names)} tensors that begin with {TOWER}",
        hint=WITHOUT_TOWER,
    )
    return names, [problem]


_Misfit = tuple[TensorSpec, tuple[int, ...]]
"""An expected tensor and the shape that was found instead."""


def _cause(
    checkpoint: Checkpoint,
    items: Sequence[InventoryItem],
    unknown: Sequence[str],
    missing: Sequence[str],
    misfits: Sequence[_Misfit],
) -> list[TensorError] | None:
    """Return the one problem behind all others, if there is one."""
    if checkpoint.foreign is not None:
        return [problem for problem in checkpoint.problems if isinstance(problem, TensorError)]
    cause = empty_cause(misfits) or naming_cause(unknown, missing)
    if cause is None and len(misfits) > 1 and not unknown and not missing:
        fitting = {size for item in items for size in item.role.info.shape}
        cause = size_cause(misfits, checkpoint.config.dims, fitting)
    return None if cause is None else [cause]


def _summary(problems: list[TensorError]) -> TensorError:
    first = problems[0]
    if len(problems) == 1:
        return first
    more = f"and {len(problems) - 1} more tensors do not fit"
    hint = f"{first.hint} ({more})" if first.hint else more
    return TensorError(first.subject, first.found, expected=first.expected, hint=hint)


def _mismatch(weight: Weight, expected: TensorSpec, fitting: set[object]) -> TensorError | None:
    """Return why a weight does not fit, or None; `fitting` remembers what does."""
    # That depends on shapes and dtypes alone, and 100,000 experts have the same.
    parts = tuple((part.spec.dtype, part.spec.shape) for part in weight.parts)
    key = (weight.storage, expected.shape, parts)
    if key in fitting:
        return None
    problem = codec_of(weight).mismatch(weight, expected)
    if problem is None:
        fitting.add(key)
    return problem


def _missing(checkpoint: Checkpoint, expected: TensorSpec, *, dense: bool) -> TensorError:
    # One clear error instead of a list of missing experts.
    if dense and ".mlp." in expected.name:
        return TensorError(
            expected.name,
            "missing, and the weights are those of a dense model",
            expected=f"the experts that model_type {checkpoint.config.model_type!r} has",
            hint="config.json and weights belong to different models",
        )
    hint = "it was saved without: start from a complete checkpoint"
    if expected.name.startswith(TOWER):
        hint = f"{hint}; {WITHOUT_TOWER}"
    if expected.name == "lm_head.weight":
        hint = (
            "if it is the embedding, as in most models saved without it, set tie_word_embeddings "
            "to true in config.json; otherwise start from a complete checkpoint"
        )
        if checkpoint.config.text_raw.get("tie_word_embeddings") is True:
            hint = (
                "text_config ties it to the embedding, but transformers goes by the root of "
                "config.json: set tie_word_embeddings to true there"
            )
    return TensorError(
        expected.name,
        "missing",
        expected=f"{expected.dtype} {list(expected.shape)} by config.json",
        hint=hint,
    )


def _with_vocabulary(
    problem: TensorError, expected: TensorSpec, shape: tuple[int, ...]
) -> TensorError:
    """Add a hint where rows for tokens were added or removed, but config.json was not changed."""
    tokens = role_of(expected.name).info.shape[:1] == ("vocab",)
    if not tokens or shape[1:] != expected.shape[1:] or problem.hint:
        return problem
    hint = f"if it has a row for each token, set vocab_size to {shape[0]} beside hidden_size"
    return TensorError(problem.subject, problem.found, expected=problem.expected, hint=hint)


def _has_dense(checkpoint: Checkpoint) -> bool:
    return any(weight.name.endswith(".mlp.gate_proj.weight") for weight in checkpoint.weights)


def _unexpected(checkpoint: Checkpoint, name: str) -> TensorError:
    try:
        role_of(name)
    except TensorError as error:
        return error
    return TensorError(
        name,
        "config.json has no place for it",
        expected=f"a tensor of {checkpoint.config.model_type} with its sizes",
        hint="config.json and weights belong to different models",
    )
