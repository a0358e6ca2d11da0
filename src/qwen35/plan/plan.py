"""The plan: every tensor and file of an output, known from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qwen35.checkpoint.header import file_layout
from qwen35.checkpoint.inventory import Item, inventory
from qwen35.checkpoint.sidecars import travelling
from qwen35.checkpoint.source import INDEX_NAME, Checkpoint
from qwen35.codecs.fp8 import Calibration
from qwen35.errors import TensorError, UsageError
from qwen35.model.config import ModelConfig
from qwen35.plan.activations import Activations
from qwen35.plan.config_out import output_config
from qwen35.plan.documents import json_bytes, template_notes, text_documents
from qwen35.plan.recipe import Recipe
from qwen35.plan.step import Step, make_steps
from qwen35.tensors import TensorSpec

__all__ = ["MAX_SHARD_BYTES", "Plan", "PlannedFile", "make_plan"]

MAX_SHARD_BYTES = 5_000_000_000
"""A shard is closed before it would hold more tensor bytes than this."""


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file of the output.

    Args:
        name: file name.
        head: the bytes before the data.
        offsets: absolute offset of each tensor.
        nbytes: size of the file.
        steps: the steps that fill it.
    """

    name: str
    head: bytes
    offsets: Mapping[str, int]
    nbytes: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """A complete description of an output.

    Args:
        checkpoint: the source.
        recipe: what was asked for.
        steps: one for each weight of the source, in model order.
        files: the safetensors files.
        documents: the files whose content the plan makes (config.json, the index, a template).
        copied: side-car files that travel unchanged, with their sizes.
        notes: what the user should know and could not see in the table.
        calibration: how the scales of FP8 weights are chosen, if there are any to encode.
        activations: what weighs their columns, if asked for.
        keep_prefix: whether text tensors of a text-only output were to keep their prefix.
        shard_bytes: the most tensor bytes of a file.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    steps: tuple[Step, ...]
    files: tuple[PlannedFile, ...]
    documents: Mapping[str, bytes]
    copied: Mapping[str, int]
    notes: tuple[str, ...]
    calibration: Calibration | None = None
    activations: Activations | None = None
    keep_prefix: bool = False
    shard_bytes: int = MAX_SHARD_BYTES

    def file_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield name and exact size of every file but the manifest, which describes the others."""
        for file in self.files:
            yield file.name, file.nbytes
        for name, content in self.documents.items():
            yield name, len(content)
        yield from self.copied.items()

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(size for _, size in self.file_sizes())

    @property
    def outputs(self) -> Iterator[TensorSpec]:
        """Every tensor written, in model order."""
        return (out for step in self.steps for out in step.outputs)

    @property
    def read_bytes(self) -> int:
        """Tensor bytes that executing the plan reads."""
        return sum(step.weight.nbytes for step in self.steps if step.op != "drop")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the output's bytes, sizes of side-cars included.

        Where the source lies is not in it: the same checkpoint elsewhere gives the same digest.
        """
        described: dict[str, object] = {
            "recipe": [self.recipe.name, self.recipe.format],
            "steps": [
                [step.weight.name, step.weight.storage, step.op, [o.name for o in step.outputs]]
                for step in self.steps
            ],
            "heads": {file.name: _sha256(file.head) for file in self.files},
            "documents": {name: _sha256(data) for name, data in sorted(self.documents.items())},
            "copied": dict(sorted(self.copied.items())),
        }
        if self.calibration is not None:
            statistics = self.activations.sha256 if self.activations else None
            described["calibration"] = [str(self.calibration), statistics]
        return _sha256(json.dumps(described, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    keep_prefix: bool = False,
    calibration: Calibration | None = None,
    activations: Activations | None = None,
    shard_bytes: int | None = None,
) -> Plan:
    """Plan the output of `recipe` on `checkpoint`, reading nothing but its headers.

    Args:
        checkpoint: the source.
        recipe: rules for its weights.
        keep_prefix: leave text tensors of a text-only output under ``model.language_model.``.
        calibration: how FP8 scales are chosen; `Calibration`'s default if not given.
        activations: statistics that weigh the columns of FP8 weights.
        shard_bytes: the most tensor bytes of a file, if not `MAX_SHARD_BYTES`.

    Raises:
        TensorError: the checkpoint does not have the weights that its config promises.
        UsageError: the recipe, the calibration or the statistics do not fit the checkpoint.
    """
    items = inventory(checkpoint)
    text_only = checkpoint.config.architecture.vision and _drops_vision(recipe, items)
    prefix = checkpoint.layout.prefix
    if text_only and not keep_prefix:
        prefix = "model."
    if keep_prefix and not text_only:
        raise UsageError("--keep-prefix", "nothing is renamed here", hint="leave it out")
    steps = make_steps(recipe, items, checkpoint.layout.prefix, prefix)
    _check_rules_used(recipe, steps)
    _check_format(recipe, steps)
    shard_bytes = shard_bytes or MAX_SHARD_BYTES
    files = _pack(steps, shard_bytes)
    config = output_config(checkpoint.config, steps, text_only=text_only, prefix=prefix)
    vision = not text_only and checkpoint.config.architecture.vision
    documents = {"config.json": json_bytes(config)}
    notes = _notes(checkpoint.config, steps)
    if text_only:
        changed = text_documents(checkpoint)
        documents |= changed
        notes += template_notes(changed)
    if len(files) > 1:
        documents[INDEX_NAME] = _index(files)
    names = [name for name in travelling(vision=vision) if name not in documents]
    copied = {name: checkpoint.sidecars[name] for name in names if name in checkpoint.sidecars}
    calibration, activations, more = _calibrated(
        steps, items, checkpoint.config, calibration, activations
    )
    return Plan(
        checkpoint,
        recipe,
        steps,
        files,
        documents,
        copied,
        (*notes, *more),
        calibration,
        activations,
        keep_prefix,
        shard_bytes,
    )


def _calibrated(
    steps: Sequence[Step],
    items: Sequence[Item],
    config: ModelConfig,
    calibration: Calibration | None,
    activations: Activations | None,
) -> tuple[Calibration | None, Activations | None, tuple[str, ...]]:
    """Return what chooses the FP8 scales, and what the user should know of it."""
    encoded = [step for step in steps if step.op == "fp8"]
    if not encoded:
        for given, flag in ((calibration, "--calib-mode"), (activations, "--activation-stats")):
            if given is not None:
                raise UsageError(flag, "nothing is encoded as FP8 here", hint="leave it out")
        return None, None, ()
    calibration = calibration or Calibration()
    if activations is None:
        return calibration, None, ()
    activations.check(items, config.geometry)
    if not calibration.weighted:
        note = f"{activations.name} is ignored: mode {calibration.mode} weighs no columns"
        return calibration, None, (note,)
    known = (activations.weights(step.role, calibration.mode) for step in encoded)
    without = sum(weights is None for weights in known)
    share = f"{without} of {len(encoded)} FP8 weights have no statistics: their columns weigh alike"
    notes = (share,) if without else ()
    return calibration, activations, (*notes, *activations.notes())


def _drops_vision(recipe: Recipe, items: Sequence[Item]) -> bool:
    """Whether the vision tower is dropped; dropping a part of it is refused."""
    actions = {recipe.rule_for(i.role).action for i in items if i.role.scope == "visual"}
    if "drop" in actions and len(actions) > 1:
        expected = 'all of it (match = "visual") or nothing'
        found = "drops a part of the vision tower"
        raise UsageError(f"recipe {recipe.name}", found, expected=expected)
    return actions <= {"drop"}


def _check_format(recipe: Recipe, steps: Sequence[Step]) -> None:
    if recipe.format == "stored" or any(step.packing == recipe.format for step in steps):
        return
    raise UsageError(
        f"recipe {recipe.name}",
        f"leaves nothing to be packed as {recipe.format.upper()}",
        hint="keep less, or use the recipe text or bf16",
    )


def _check_rules_used(recipe: Recipe, steps: Sequence[Step]) -> None:
    for rule in recipe.rules:
        if rule.required and not any(recipe.rule_for(step.role) is rule for step in steps):
            raise UsageError(
                f"rule for {rule.match!r} ({rule.reason})",
                "no tensor of this checkpoint is left for it",
                hint="remove it, or move it before the rule that takes its tensors",
            )


def _pack(steps: Sequence[Step], shard_bytes: int) -> tuple[PlannedFile, ...]:
    """Fill files in model order; a weight and its companions share one."""
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if step.outputs and groups[-1] and size + step.nbytes > shard_bytes:
            groups.append([])
            size = 0
        if step.outputs:
            groups[-1].append(step)
            size += step.nbytes
    return tuple(_file(i, len(groups), group) for i, group in enumerate(groups, 1))


def _file(number: int, count: int, steps: list[Step]) -> PlannedFile:
    name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
    outputs = [out for step in steps for out in step.outputs]
    if len({out.name for out in outputs}) != len(outputs):
        raise TensorError(name, "two weights would be written under one name")
    head, offsets = file_layout(outputs)
    nbytes = len(head) + sum(out.nbytes for out in outputs)
    return PlannedFile(name, head, offsets, nbytes, tuple(steps))


def _index(files: Sequence[PlannedFile]) -> bytes:
    total = sum(file.nbytes - len(file.head) for file in files)
    weight_map = {name: file.name for file in files for name in file.offsets}
    return json_bytes(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _notes(config: ModelConfig, steps: Sequence[Step]) -> tuple[str, ...]:
    notes = []
    if config.mtp_layers and not any(step.role.scope == "mtp" for step in steps):
        notes.append(
            f"config.json promises {config.mtp_layers} multi-token-prediction layer(s), but the "
            "checkpoint has none: the output's config.json says 0"
        )
    if any(step.packing == "nf4" for step in steps):
        written = [step for step in steps if step.outputs]
        plain = [s.spec.numel for s in written if s.role.info.kind == "experts" and not s.packing]
        if plain:
            share = sum(plain) / sum(step.spec.numel for step in written)
            notes.append(
                f"experts stay in {config.dtype}: {share:.1%} of all parameters, because "
                "transformers cannot load them packed"
            )
    return tuple(notes)
