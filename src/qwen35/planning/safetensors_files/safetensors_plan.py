"""The plan of a safetensors output: steps, shards, config.json, sidecars."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

from qwen35.checkpoint.grafted import check_grafted, grafted_notes
from qwen35.checkpoint.header import file_layout
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.reconciled import source_notes, take
from qwen35.checkpoint.sidecars import sidecar_names
from qwen35.checkpoint.source import SINGLE_NAME, Checkpoint
from qwen35.codecs.dialect import Dialect
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.input_quantizers import SMALLEST_INPUT
from qwen35.codecs.registry import CODECS
from qwen35.errors import TensorError, UsageError
from qwen35.model.config_notes import config_notes
from qwen35.model.fused import scale_group
from qwen35.model.model_config import ModelConfig
from qwen35.model.named_code import code_keys
from qwen35.model.roles import mtp_tensors, role_of, tower_tensors
from qwen35.planning.activations import Activations
from qwen35.planning.manifest import source_json
from qwen35.planning.output_plan import Plan, PlannedFile, digest_of
from qwen35.planning.refinement import PLAIN, Refinement
from qwen35.planning.requantized import requantized_notes
from qwen35.planning.rows import rows_of
from qwen35.planning.rules import Recipe, check_used
from qwen35.planning.safetensors_files import safetensors_options as options_module
from qwen35.planning.safetensors_files.cache_scales import CacheScales, output_scales
from qwen35.planning.safetensors_files.safetensors_documents import (
    DraftedOutput,
    documents,
    template_notes,
)
from qwen35.planning.safetensors_files.safetensors_options import SafetensorsOptions
from qwen35.planning.safetensors_files.safetensors_steps import (
    DraftStep,
    Ruled,
    make_drafts,
    output_dialect,
    scale_groups,
)
from qwen35.planning.sidecar_checks import check_sidecars, left_behind
from qwen35.planning.step import Step, StepTarget
from qwen35.tensors import TensorSpec

__all__ = ["make"]


def make(checkpoint: Checkpoint, recipe: Recipe, options: SafetensorsOptions) -> Plan:
    """Plan a safetensors output; errors are those of `qwen35.planning.output_plan.make_plan`."""
    tower = not _drops(recipe, tower_tensors(checkpoint.config))
    refusal = checkpoint.prefix.refusal if tower and checkpoint.prefix else None
    if refusal is not None:
        raise refusal
    original = checkpoint
    checkpoint, items = take(original, tower=tower)
    ruled = [(item, recipe.rule_for(item.role)) for item in items]
    text_only = checkpoint.config.architecture.vision and _drops_vision(recipe, ruled)
    prefix = checkpoint.layout.prefix
    if text_only and not options.keep_prefix:
        prefix = "model."
    dialect = output_dialect(ruled)
    if options.keep_prefix and (not text_only or dialect is not None):
        raise UsageError("--keep-prefix", "nothing is renamed here", hint="leave it out")
    drafts = make_drafts(recipe, ruled, checkpoint.layout.prefix, prefix)
    check_used(
        [rule for rule in recipe.rules if rule.action != "drop"],  # nothing to drop is fine
        [rule for _, rule in ruled],
        name=lambda rule: f"rule for {rule.match!r} ({rule.reason})",
        found="no tensor of this checkpoint is left for it",
        hint="remove it, or move it before the rule that takes its tensors",
    )
    _check_format(recipe, drafts)
    check_grafted(checkpoint, taken=any(d.outputs for d in drafts if d.role.scope == "mtp"))
    if checkpoint.donor and options.keep_shards:
        found = "the MTP layer is in no file of the source"
        raise UsageError("--keep-shards", found, hint="not with --mtp-from")
    scales = output_scales(checkpoint, drafts, options)
    options, scale_notes = _with_scale_choice(drafts, items, checkpoint, options)
    if dialect is not None and options.keep_shards:
        found = f"the files of {dialect.name} hold experts in stacks, those of the source may not"
        raise UsageError("--keep-shards", found, hint="leave it out")
    together = dialect is not None
    placed = (
        _as_in_source(drafts)
        if options.keep_shards
        else _packed(drafts, scales, options, together=together)
    )
    options.refinement.check(checkpoint, items, recipe)
    steps, files = _laid_out(placed, scales, dialect, options.refinement)
    vision = not text_only and checkpoint.config.architecture.vision
    check_sidecars(checkpoint, sidecar_names(vision=vision))
    generated = documents(
        DraftedOutput(checkpoint, drafts, files, text_only, prefix, bool(scales), dialect)
    )
    notes = (
        *_source_notes(original, recipe, tower=tower),
        *grafted_notes(original),
        *_notes(checkpoint.config, drafts),
    )
    if text_only:
        notes += template_notes(generated)
    names = [name for name in sidecar_names(vision=vision) if name not in generated]
    copied = {name: checkpoint.sidecars[name] for name in names if name in checkpoint.sidecars}
    return Plan(
        checkpoint,
        recipe,
        options,
        steps,
        files,
        generated,
        copied,
        (
            *notes,
            *requantized_notes(steps),
            *options.refinement.notes(steps, source_json(checkpoint)),
            *scale_notes,
            *_cache_notes(scales),
            *left_behind(checkpoint, {*copied, *generated}, scales=bool(scales)),
        ),
        _digest(checkpoint, recipe, options, steps, files, generated, copied),
        {},
    )


def _drops(recipe: Recipe, specs: Iterable[TensorSpec]) -> bool:
    """Return whether a recipe drops all of these tensors, or there are none."""
    rules = (recipe.find(role_of(spec.name)) for spec in specs)
    return all(rule is not None and rule.action == "drop" for rule in rules)


def _source_notes(checkpoint: Checkpoint, recipe: Recipe, *, tower: bool) -> Iterator[str]:
    one = replace(checkpoint.config, mtp_layers=1)
    mtp = not _drops(recipe, mtp_tensors(one, checkpoint.layout))
    return source_notes(checkpoint, mtp=mtp, tower=tower)


def _drops_vision(recipe: Recipe, ruled: Ruled) -> bool:
    """Return whether the vision tower is dropped; raise if only a part of it is."""
    actions = {rule.action for item, rule in ruled if item.role.scope == "visual"}
    if "drop" in actions and len(actions) > 1:
        expected = 'all of it (match = "visual") or nothing'
        found = "drops a part of the vision tower"
        raise UsageError(f"recipe {recipe.name}", found, expected=expected)
    return actions <= {"drop"}


def _check_format(recipe: Recipe, drafts: Sequence[DraftStep]) -> None:
    codec = CODECS.get(recipe.format)
    if codec is None or any(draft.codec == codec.name for draft in drafts):
        return
    subject, found = f"recipe {recipe.name}", f"leaves nothing to be packed as {codec.label}"
    misfit = next((draft for draft in drafts if draft.rule.action == codec.name), None)
    if misfit is not None:
        hint = "no such weight fits: choose another format"
        raise UsageError(subject, f"{found}: {misfit.reason}", hint=hint)
    raise UsageError(subject, found, hint="keep less, or use the recipe text or bf16")


def _with_scale_choice(
    drafts: Sequence[DraftStep],
    items: Sequence[InventoryItem],
    checkpoint: Checkpoint,
    options: SafetensorsOptions,
) -> tuple[SafetensorsOptions, tuple[str, ...]]:
    """Fill in the options that depend on the weights; return them with notes for the user."""
    options = replace(options, shard_bytes=options.shard_bytes or options_module.MAX_SHARD_BYTES)
    made = [draft for draft in drafts if draft.codec and not draft.copied]
    encoded = [draft for draft in made if CODECS[draft.codec].chooses_scales]
    inputs = [draft for draft in made if CODECS[draft.codec].quantized_inputs]
    activations = options.activations
    later = activations is None and options.described
    if not later:
        _check_inputs(inputs, activations)
    if not (encoded or inputs):
        _refuse_scale_flags(checkpoint.name, drafts, options)
        if activations is not None:
            activations.check(items, checkpoint.config.geometry)
        return options, ()
    scale_choice = options.scale_choice or ScaleChoice()
    codec = CODECS[(encoded or inputs)[0].codec]
    if encoded and scale_choice.mode not in codec.scale_modes:
        found = f"{codec.label} has no mode {scale_choice.mode}"
        raise UsageError("--calib-mode", found, expected=" or ".join(codec.scale_modes))
    options = replace(options, scale_choice=scale_choice)
    if activations is None:
        return options, tuple(_later_notes(inputs))
    if not (scale_choice.weighted or inputs or options.kv_cache):  # whatever is in the file
        note = f"{activations.name} is ignored: mode {scale_choice.mode} weighs no columns"
        return replace(options, activations=None), (note,)
    activations.check(items, checkpoint.config.geometry)
    column_weights = (activations.weights(draft.role, scale_choice.mode) for draft in encoded)
    without = sum(weights is None for weights in column_weights)
    count = f"{without} of {len(encoded)} {codec.label} weights"
    share = f"{count} have no statistics: their columns weigh alike"
    notes = (share,) if without else ()
    return options, (*notes, *activations.notes())


def _later_notes(inputs: Sequence[DraftStep]) -> Iterator[str]:
    for label in dict.fromkeys(CODECS[draft.codec].label for draft in inputs):
        yield f"{label} stores scales of its layers' inputs: convert takes --activation-stats"


def _check_inputs(drafts: Sequence[DraftStep], activations: Activations | None) -> None:
    """Check that there are statistics of the inputs of all weights that store their scale."""
    if drafts and activations is None:
        found = "stores scales of its layers' inputs, which statistics give"
        hint = "give them: --activation-stats FILE, from `qwen35 calibrate`"
        raise UsageError(CODECS[drafts[0].codec].label, found, hint=hint)
    for draft in drafts:
        if activations is not None and (activations.largest(draft.role) or 0) < SMALLEST_INPUT:
            found = f"no inputs of {draft.spec.name}, or only zeros"
            hint = "calibrate again, with more text"
            raise UsageError(activations.name, found, expected="their largest values", hint=hint)


def _refuse_scale_flags(
    source: str, drafts: Sequence[DraftStep], options: SafetensorsOptions
) -> None:
    """Refuse flags for scales where no scale is chosen, and name a source that has them already."""
    held = [draft for draft in drafts if draft.copied and CODECS[draft.codec].chooses_scales]
    flags: dict[str, object] = {"--calib-mode": options.scale_choice}
    if options.kv_cache is None:
        flags["--activation-stats"] = options.activations
    for flag, value in flags.items():
        if value is None:
            continue
        if not held:
            raise UsageError(flag, "no scales are chosen here", hint="leave it out")
        raise UsageError(
            source,
            f"{CODECS[held[0].codec].label} already ({len(held)} weights): no scales are chosen",
            expected="an unquantized checkpoint",
            hint="start from the original; qwen35 convert without --calib-mode and "
            "--activation-stats copies the codes",
        )


_Placed = Sequence[tuple[DraftStep, str]]
"""Each step with the name of its file."""


def _packed(
    drafts: Sequence[DraftStep],
    scales: CacheScales,
    options: SafetensorsOptions,
    *,
    together: bool = False,
) -> _Placed:
    """Fill files in model order; a weight and its companions share a file.

    With `together`, so do the experts of a layer.
    """
    numbers: list[int] = []
    number = size = 0
    for _, group in groupby(enumerate(drafts), lambda pair: _unit(*pair, together=together)):
        unit = [draft for _, draft in group]
        nbytes = sum(_nbytes(draft, scales) for draft in unit)
        written = any(draft.outputs for draft in unit)
        if written and size and size + nbytes > options.shard_bytes:  # never an empty shard
            number, size = number + 1, 0
        numbers += [number] * len(unit)
        size += nbytes
    count = number + 1  # shard names contain it, so files are named after counting
    names = [shard_name(i, count) for i in range(1, count + 1)]
    return [(draft, names[n]) for draft, n in zip(drafts, numbers, strict=True)]


def _unit(number: int, draft: DraftStep, *, together: bool) -> object:
    """Return what the weights have in common that share a file, in whatever file it is."""
    role = draft.role
    return role.layer if together and role.expert is not None else (number,)


def _nbytes(draft: DraftStep, scales: CacheScales) -> int:
    beside = scales.get(draft.item.weight.name, ()) if scales else ()
    return draft.nbytes + sum(constant.spec.nbytes for constant in beside)


def _as_in_source(drafts: Sequence[DraftStep]) -> _Placed:
    """Give every weight the file that it has in the source; files without weights are left out."""
    placed = [(draft, draft.item.weight.main.file) for draft in drafts]
    return sorted(placed, key=lambda pair: pair[1])  # stable: model order in a file


def _laid_out(
    placed: _Placed, scales: CacheScales, dialect: Dialect | None, refinement: Refinement
) -> tuple[tuple[Step, ...], tuple[PlannedFile, ...]]:
    """Return the steps, and the files that hold what they write, in order of appearance."""
    groups = scale_groups(draft for draft, _ in placed)
    alone = {file: (file,) for _, file in placed}
    steps = tuple(_step(draft, alone[file], groups, refinement) for draft, file in placed)
    members: dict[str, list[Step]] = {}
    for step, (_, file) in zip(steps, placed, strict=True):
        if step.targets:
            members.setdefault(file, []).append(step)
    return steps, tuple(plan_file(name, own, scales, dialect) for name, own in members.items())


def shard_name(number: int, count: int) -> str:
    """Return the name of one file of `count`; numbers begin with 1."""
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _step(
    draft: DraftStep,
    files: tuple[str, ...],
    groups: Mapping[object, Sequence[DraftStep]],
    refinement: Refinement,
) -> Step:
    targets: tuple[StepTarget, ...] = ()
    rows = rows_of(draft.item)
    if draft.outputs:
        copied = draft.copied
        codes = PLAIN if copied else refinement.codes_of(draft.rule, draft.codec, rows)
        targets = (StepTarget(draft.codec, draft.outputs, files, copied, codes),)
    group = groups.get(scale_group(draft.role), ()) if draft.surveys else ()
    tied = tuple(rows_of(other.item) for other in group if other is not draft)
    return Step(rows, draft.role, draft.reason, targets, tied)


def plan_file(
    name: str,
    steps: list[Step],
    scales: CacheScales = MappingProxyType({}),
    dialect: Dialect | None = None,
) -> PlannedFile:
    """Return the file that holds what some steps write, and the scales beside their weights."""
    outputs = [out for step in steps for out in step.outputs]
    if len({out.name for out in outputs}) != len(outputs):
        raise TensorError(name, "two weights would be written under one name")
    beside = (scales.get(step.weight.name, ()) for step in steps) if scales else ()
    constants = tuple(constant for group in beside for constant in group)
    first = [constant.spec for constant in constants]
    if dialect is not None:
        head, offsets, described = _in_dialect(outputs, first, dialect)
    else:
        (head, offsets), described = file_layout(outputs, first), ()
    head += b"".join(constant.data for constant in constants)
    nbytes = len(head) + sum(out.nbytes for out in outputs)
    return PlannedFile(
        name, head, offsets, nbytes, tuple(steps), constants=constants, described=described
    )


def _in_dialect(
    outputs: Sequence[TensorSpec], first: Sequence[TensorSpec], dialect: Dialect
) -> tuple[bytes, dict[str, int], tuple[TensorSpec, ...]]:
    """Return the head of a file, the offsets of outputs in it, and the tensors it describes."""
    stacks = dialect.stacks(outputs)
    described = tuple(stack.spec for stack in stacks)
    head, begins = file_layout(described, first, dialect.name)
    offsets = {spec.name: begins[spec.name] for spec in first}
    for stack in stacks:
        begin = begins[stack.spec.name]
        for part in stack.parts:
            offsets[part.name] = begin
            begin += part.nbytes
    return head, offsets, described


def _notes(config: ModelConfig, drafts: Sequence[DraftStep]) -> Iterator[str]:
    head = any(draft.role.name == "lm_head" for draft in drafts)
    yield from config_notes(config, head=head)
    for key in code_keys(config.raw):
        shown = key if key.isprintable() else ascii(key)
        yield f"{shown[:80]} of config.json is left out: it names code or files to be loaded"
    written = [draft for draft in drafts if draft.outputs]
    for name in dict.fromkeys(draft.codec for draft in written):
        yield from CODECS[name].notes(written, config.dtype)


def _cache_notes(scales: CacheScales) -> tuple[str, ...]:
    count = sum(len(constants) for constants in scales.values())
    layers = f"{len(scales)} layer{'s' * (len(scales) > 1)}"
    note = f"{count} scales of an FP8 KV cache, for {layers}"
    return (note,) if count else ()


def _digest(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: SafetensorsOptions,
    steps: Sequence[Step],
    files: Sequence[PlannedFile],
    documents: Mapping[str, bytes],
    copied: Mapping[str, int],
) -> str:
    values: dict[str, Any] = {
        "recipe": [recipe.name, recipe.format],
        "steps": (
            [step.weight.name, step.weight.storage, step.op, [o.name for o in step.outputs]]
            for step in steps
        ),
        "heads": {file.name: _sha256(file.head) for file in files},
        "documents": {name: _sha256(data) for name, data in sorted(documents.items())},
        "copied": dict(sorted(copied.items())),
    }
    if checkpoint.adapters:
        values["adapters"] = [adapter.effect_json() for adapter in checkpoint.adapters]
    if options.scale_choice is not None:
        statistics = options.activations.sha256 if options.activations else None
        values["calibration"] = [str(options.scale_choice), statistics]
    return digest_of(values | options.refinement.digest_of(steps))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
