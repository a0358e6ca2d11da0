"""The plan of a folder of GGUF files: every tensor's type and every byte offset, from headers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any, cast

from qwen35.checkpoint.grafted import check_grafted, grafted_notes
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.reconciled import source_notes, take
from qwen35.checkpoint.sidecars import LEGAL
from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.split_gguf import SplitName
from qwen35.codecs.ggml.codec import codec_name
from qwen35.codecs.registry import CODECS, codec_of
from qwen35.errors import UsageError
from qwen35.model.config_notes import config_notes, refuse_uncarried
from qwen35.planning.gguf_files.gguf_options import GgufOptions
from qwen35.planning.gguf_files.metadata import (
    RenderedHeader,
    SourceDocuments,
    documents_of,
    model_name,
    padded,
    render_head,
)
from qwen35.planning.gguf_files.mixes import (
    CONVERTED,
    FILE_TYPES,
    FileType,
    MixGeometry,
    mix_order,
)
from qwen35.planning.gguf_files.split_heads import grouped, split_heads, split_nbytes
from qwen35.planning.gguf_files.tensor_names import (
    UntypedTensor,
    mtp_tensors,
    text_tensors,
    vision_tensors,
)
from qwen35.planning.gguf_files.type_choice import (
    Kinds,
    TypeChooser,
    converted_kind,
    imatrix_notes,
    misfit_notes,
    pure_kind,
)
from qwen35.planning.gguf_files.vocabulary import Vocabulary, read_vocabulary
from qwen35.planning.manifest import source_json
from qwen35.planning.output_plan import Plan, PlannedFile, digest_of
from qwen35.planning.recipe_files import built_in_names, built_in_recipe
from qwen35.planning.refinement import NEAREST, Refinement
from qwen35.planning.requantized import requantized_notes
from qwen35.planning.rules import Recipe, Rule
from qwen35.planning.sidecar_checks import check_sidecars, left_behind
from qwen35.planning.step import Step, StepTarget
from qwen35.tensors import TensorSpec

__all__ = ["GgufFile", "chooser_of", "files_of", "make", "plan_of", "specs_of"]


@dataclass(frozen=True)
class GgufFile(PlannedFile):
    """One GGUF file of the output.

    Args:
        file_type: type of the model as a whole.
        tensors: its tensors, in the converter's order.
        kinds: the type of each tensor.
        rendered: its head.
        quantized: whether it is as llama-quantize writes it, and the recipe chooses its types.
        first: False for the other files of a split model, which have no keys of their own.
    """

    file_type: FileType
    tensors: tuple[UntypedTensor, ...]
    kinds: Kinds
    rendered: RenderedHeader
    quantized: bool
    first: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        head: RenderedHeader,
        file_type: FileType,
        tensors: Sequence[UntypedTensor],
        kinds: Kinds,
        *,
        quantized: bool,
        first: bool = True,
    ) -> GgufFile:
        """Return a file that no step fills yet."""
        return cls(
            name,
            head.content,
            head.offsets,
            head.nbytes,
            (),
            file_type,
            tuple(tensors),
            kinds,
            head,
            quantized,
            first,
        )

    def parts(self, tensor: UntypedTensor) -> tuple[TensorSpec, ...]:
        """Return the tensors that hold `tensor`: itself, and its scales if its type needs them."""
        return specs_of(tensor, self.kinds[tensor.name])

    def split(self, limit: int) -> list[GgufFile]:
        """Return the files of at most `limit` bytes of tensors each; itself if it fits in one."""
        specs = {part.name: part for tensor in self.tensors for part in self.parts(tensor)}
        owners = {part.name: t.name for t in self.tensors for part in self.parts(t)}
        units = groupby(self.offsets, key=owners.__getitem__)  # a weight stays with its scales
        groups = grouped(([specs[name] for name in unit] for _, unit in units), limit)
        if len(groups) == 1:
            return [self]
        names = SplitName(self.name.removesuffix(".gguf"), len(groups), 1)
        heads = split_heads(self.rendered, groups)
        return [self._piece(names.file(i), head, first=i == 1) for i, head in enumerate(heads, 1)]

    def _piece(self, name: str, head: RenderedHeader, *, first: bool) -> GgufFile:
        held = [tensor for tensor in self.tensors if tensor.name in head.offsets]
        kinds = {tensor.name: self.kinds[tensor.name] for tensor in held}
        return GgufFile.of(
            name, head, self.file_type, held, kinds, quantized=self.quantized, first=first
        )

    def size_with(self, kinds: Kinds, limit: int | None = None) -> int:
        """Return the size of a quantized file if its tensors had these types.

        Args:
            kinds: the type of each tensor.
            limit: as for `split`: the size of all files then.
        """
        if limit is not None:
            ordered = sorted(self.tensors, key=lambda tensor: mix_order(tensor.name))
            groups = grouped((specs_of(t, kinds[t.name]) for t in ordered), limit)
            if len(groups) > 1:
                return split_nbytes(self.rendered.keys, groups)
        now = [part for t in self.tensors for part in self.parts(t)]
        then = [part for t in self.tensors for part in specs_of(t, kinds[t.name])]
        records = self.rendered.records + sum(map(_record, then)) - sum(map(_record, now))
        return sum(map(padded, (records, *(part.nbytes for part in then))))


def specs_of(tensor: UntypedTensor, kind: str) -> tuple[TensorSpec, ...]:
    """Return the tensors that hold `tensor` as `kind`: itself, and its scales if it needs them."""
    return CODECS[codec_name(kind)].layout(TensorSpec(tensor.name, "F32", tensor.shape))


def _record(part: TensorSpec) -> int:
    """Return the bytes of a tensor's record: lengths, name, sizes, type and offset."""
    return 24 + len(part.name) + 8 * len(part.shape)


_HUB_GB = 50
"""``MAX_HTTP_DOWNLOAD_SIZE`` of huggingface_hub, whose client refuses more without Xet."""

_TOKENIZER_COPIES = ("added_tokens.json", "special_tokens_map.json", "vocab.json")
"""Sidecars that say again what tokenizer.json says, which goes into the files."""


def files_of(plan: Plan) -> Sequence[GgufFile]:
    """Return the files of a GGUF plan, typed as such."""
    return cast("Sequence[GgufFile]", plan.files)


def chooser_of(plan: Plan, *, imatrix: bool) -> TypeChooser:
    """Return the type chooser of a plan's first file; `imatrix`: as with an importance matrix."""
    options = cast("GgufOptions", plan.options)
    return TypeChooser(
        files_of(plan)[0].tensors,
        _geometry(plan.checkpoint, options, imatrix=imatrix),
        plan.recipe,
        options.imatrix,
        options.upstream_counters,
    )


def _geometry(checkpoint: Checkpoint, options: GgufOptions, *, imatrix: bool) -> MixGeometry:
    config = checkpoint.config
    text = config.text_raw
    return MixGeometry(
        layers=len(config.layer_types) + _mtp_layers(checkpoint, options),
        experts=config.dims.get("experts", 0),
        gqa=text["num_attention_heads"] // text["num_key_value_heads"],
        imatrix=imatrix,
    )


def make(checkpoint: Checkpoint, recipe: Recipe, options: GgufOptions) -> Plan:
    """Plan GGUF files; errors are those of `qwen35.planning.output_plan.make_plan`."""
    tower = options.projector is not None
    original = checkpoint
    checkpoint, items = take(original, tower=tower and original.config.architecture.vision)
    mtp = _mtp_layers(checkpoint, options)
    check_grafted(checkpoint, taken=mtp > 0 or options.mtp_file is not None)
    refuse_uncarried(checkpoint.config, vision=False)
    if options.projector is not None:
        refuse_uncarried(checkpoint.config, vision=True)
    name = model_name(checkpoint)
    read = documents_of(vision=options.projector is not None)
    check_sidecars(checkpoint, read)
    with SourceDocuments.of(checkpoint) as documents:
        vocabulary = None
        if documents.complete:
            vocabulary = read_vocabulary(documents.folder, checkpoint.config.dims["vocab"])
        planner = _Planner(checkpoint, recipe, options, documents, vocabulary, mtp)
        models, notes = planner.text_files(items, name)
        limit = options.split_max_size
        files = [file for m in models for file in ([m] if limit is None else m.split(limit))]
        beside = list(planner.files_beside(items, name))
        notes += [n for f in beside for n in misfit_notes(f.name, f.tensors, f.file_type)]
        notes += _size_notes(files, limit)
        files += beside
    options.refinement.check(checkpoint, items, recipe)
    steps = _steps(files, options.refinement, planner.rules)
    return plan_of(
        checkpoint,
        recipe,
        options,
        files,
        (
            *config_notes(checkpoint.config, head=checkpoint.layout.head),
            *source_notes(original, mtp=not options.drop_mtp, tower=tower),
            *grafted_notes(original),
            *_mtp_notes(checkpoint, options),
            *_notes(vocabulary, documents),
            *notes,
            *requantized_notes(steps),
            *options.refinement.notes(steps, source_json(checkpoint)),
            *left_behind(checkpoint, {*read, *LEGAL, *_TOKENIZER_COPIES}),
        ),
        planner.comparison(models),
        steps,
    )


def plan_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: GgufOptions,
    files: Sequence[GgufFile],
    notes: Iterable[str],
    comparison: Mapping[str, Mapping[str, int]] | None = None,
    steps: tuple[Step, ...] | None = None,
) -> Plan:
    """Return the plan of these files, which no step fills yet."""
    steps = _steps(files) if steps is None else steps
    heads = {file.name: hashlib.sha256(file.head).hexdigest() for file in files}
    return Plan(
        checkpoint,
        recipe,
        options,
        steps,
        tuple(_filled(file, steps) for file in files),
        {},
        {name: size for name, size in checkpoint.sidecars.items() if name in LEGAL},
        tuple(notes),
        _digest(checkpoint, options, heads, steps),
        comparison or {},
    )


def _digest(
    checkpoint: Checkpoint, options: GgufOptions, heads: Mapping[str, str], steps: Sequence[Step]
) -> str:
    imatrix = options.imatrix.digest if options.imatrix else None
    values: dict[str, Any] = {"heads": heads, "imatrix": imatrix}
    if checkpoint.adapters:
        values["adapters"] = [adapter.effect_json() for adapter in checkpoint.adapters]
    return digest_of(values | options.refinement.digest_of(steps))


def _steps(
    files: Sequence[GgufFile],
    refinement: Refinement = NEAREST,
    rules: Mapping[str, Rule | None] = MappingProxyType({}),
) -> tuple[Step, ...]:
    """Return a step per tensor, with its files grouped by type, in source order.

    Source order, so that the checkpoint is read once and forward.

    Args:
        files: all files.
        refinement: how codes are chosen.
        rules: those that decided on tensors.
    """
    tensors: dict[str, UntypedTensor] = {}
    files_by_type: dict[str, dict[str, list[str]]] = {}
    for file in files:
        for tensor in file.tensors:
            tensors[tensor.name] = tensor
            kinds = files_by_type.setdefault(tensor.name, {})
            kinds.setdefault(file.kinds[tensor.name], []).append(file.name)
    ordered = sorted(tensors.values(), key=_position)
    return tuple(
        step
        for tensor in ordered
        for step in _tensor_steps(
            tensor, files_by_type[tensor.name], refinement, rules.get(tensor.name)
        )
    )


def _tensor_steps(
    tensor: UntypedTensor,
    kinds: Mapping[str, Sequence[str]],
    refinement: Refinement,
    rule: Rule | None,
) -> Iterator[Step]:
    """Yield the step that encodes a tensor, and one that copies it where it has the type."""
    weight, role = tensor.rows.item.weight, tensor.rows.item.role
    encoded = []
    for kind, files in kinds.items():
        target = StepTarget(codec_name(kind), specs_of(tensor, kind), tuple(files))
        alike = len(target.outputs) == len(weight.parts)
        if (
            codec_of(weight) is CODECS[target.codec] and alike
        ):  # copying is exact, encoding again is not
            yield Step(tensor.rows, role, "", (replace(target, copied=True),))
        else:
            codes = refinement.codes_of(rule, target.codec, tensor.rows)
            encoded.append(replace(target, codes=codes))
    if encoded:
        yield Step(tensor.rows, role, "", tuple(encoded))


def _position(tensor: UntypedTensor) -> tuple[str, int]:
    stored = tensor.rows.item.weight.main
    return stored.file, stored.begin


def _filled(file: GgufFile, steps: Sequence[Step]) -> GgufFile:
    return replace(file, steps=tuple(step for step in steps if file.name in step.files))


def _mtp_layers(checkpoint: Checkpoint, options: GgufOptions) -> int:
    """Return the number of MTP layers to write beside the others.

    llama.cpp's loader needs mtp.fc in every such layer, and the family has a single one.
    """
    stored = checkpoint.config.mtp_layers
    return 0 if options.drop_mtp or options.mtp_file or stored > 1 else stored


def _mtp_notes(checkpoint: Checkpoint, options: GgufOptions) -> Iterator[str]:
    stored = checkpoint.config.mtp_layers
    if stored > 1 and not options.drop_mtp:
        yield f"{stored} multi-token-prediction layers are left out: llama.cpp reads one at most"


def _notes(vocabulary: Vocabulary | None, documents: SourceDocuments) -> Iterator[str]:
    if vocabulary is not None and vocabulary.nfc:
        yield (
            "the tokenizer normalizes text to NFC, llama.cpp does not: text that is not in NFC "
            "gets different tokens there"
        )
    if not documents.complete:
        yield "the bytes of tokenizer and metadata files are unknown and not counted"


def _size_notes(files: Sequence[GgufFile], limit: int | None) -> Iterator[str]:
    """Yield notes on files that are larger than asked for, or than some clients of the Hub take."""
    names = [f.name for f in files if limit is not None and f.nbytes - len(f.head) > limit]
    if names:
        yield f"larger than --split-max-size, since no tensor is cut: {', '.join(names)}"
    names = [file.name for file in files if file.nbytes > _HUB_GB * 10**9]
    if names:
        found = f"larger than the {_HUB_GB} GB that the Hub serves to clients without Xet"
        yield f"{found}: {', '.join(names)}; --split-max-size 40G makes several files of one"


@dataclass(frozen=True)
class _Planner:
    """Plans the files; holds what they share, and the rules that decided on tensors."""

    checkpoint: Checkpoint
    recipe: Recipe
    options: GgufOptions
    documents: SourceDocuments
    vocabulary: Vocabulary | None
    mtp: int
    rules: dict[str, Rule | None] = field(default_factory=dict)

    def text_files(
        self, items: Sequence[InventoryItem], name: str
    ) -> tuple[list[GgufFile], list[str]]:
        """Return the text model's files in one piece, with notes."""
        tensors = text_tensors(items, self.checkpoint.config, mtp=self.mtp > 0)
        chooser = self.chooser(tensors, self.recipe)
        self.rules.update(chooser.rules_by_tensor())  # refuses unused ones
        imatrix = self.options.imatrix
        notes: list[str] = []
        if imatrix is not None:
            imatrix.check(self.checkpoint.config.geometry)
            notes += imatrix_notes(imatrix, tensors)
        files = []
        for type_name in self.options.types:
            file_type = FILE_TYPES[type_name]
            kinds, type_notes = chooser.kinds(file_type)
            notes += type_notes
            file = f"{name}-{type_name}.gguf"
            quantized = file_type.quantized
            files.append(self._file(file, file_type, tensors, kinds, quantized=quantized))
        return files, list(dict.fromkeys(notes))

    def comparison(self, files: Sequence[GgufFile]) -> dict[str, dict[str, int]]:
        """Return the sizes of the quantized models under each recipe."""
        patterns = [rule for rule in self.recipe.rules if rule.pattern is not None]
        container = self.recipe.container
        recipes = {
            name: built_in_recipe(name, container).preceded(patterns)
            for name in built_in_names(container)
        }
        recipes[self.recipe.name] = self.recipe
        quantized = [file for file in files if file.quantized]
        table: dict[str, dict[str, int]] = {}
        for name, recipe in recipes.items():
            for file in quantized:
                try:
                    kinds, _ = self.chooser(file.tensors, recipe).kinds(file.file_type)
                except UsageError:  # its types do not fit this model: the table shows no size
                    continue
                nbytes = file.size_with(kinds, self.options.split_max_size)
                table.setdefault(name, {})[file.file_type.name] = nbytes
        return table

    def chooser(self, tensors: Sequence[UntypedTensor], recipe: Recipe) -> TypeChooser:
        """Return the type chooser for `recipe`."""
        imatrix = self.options.imatrix
        geometry = _geometry(self.checkpoint, self.options, imatrix=imatrix is not None)
        counters = self.options.upstream_counters
        return TypeChooser(tensors, geometry, recipe, imatrix, counters)

    def files_beside(self, items: Sequence[InventoryItem], name: str) -> Iterator[GgufFile]:
        """Yield the files that the converter writes apart; errors are those of each."""
        if self.options.mtp_file is not None:
            yield self.mtp_file(items, name, self.options.mtp_file)
        if self.options.projector is not None:
            yield self.projector_file(items, name, self.options.projector)

    def mtp_file(self, items: Sequence[InventoryItem], name: str, type_name: str) -> GgufFile:
        """Return the file of the MTP layer alone, with the tensors that it shares.

        Raises:
            UsageError: the model has no such layer, or several.
        """
        config = self.checkpoint.config
        if config.mtp_layers != 1:
            found = f"{self.checkpoint.name} has {config.mtp_layers or 'no'} MTP layers"
            hint = "leave it out, or drop them: --mtp drop"
            raise UsageError("--mtp separate", found, expected="one", hint=hint)
        file_type = FILE_TYPES[type_name]
        tensors = mtp_tensors(items, config)
        pure = type_name not in CONVERTED
        kind_of = pure_kind if pure else converted_kind
        kinds = {tensor.name: kind_of(tensor, file_type) for tensor in tensors}
        name = f"mtp-{name}-{type_name}.gguf"
        file = self._file(name, file_type, tensors, kinds, quantized=pure, mtp=1)
        return replace(file, quantized=False)  # no recipe chooses its types

    def projector_file(self, items: Sequence[InventoryItem], name: str, type_name: str) -> GgufFile:
        """Return the file of the vision tower.

        Raises:
            UsageError: the model has no vision tower.
        """
        if not self.checkpoint.config.architecture.vision:
            found = f"{self.checkpoint.name} has no vision tower"
            raise UsageError("--mmproj", found, hint="leave it out")
        file_type = FILE_TYPES[type_name]
        tensors = vision_tensors(items)
        kinds = {tensor.name: converted_kind(tensor, file_type) for tensor in tensors}
        name = f"mmproj-{name}-{type_name}.gguf"
        return self._file(name, file_type, tensors, kinds, quantized=False, vision=True)

    def _file(
        self,
        name: str,
        file_type: FileType,
        tensors: Sequence[UntypedTensor],
        kinds: Kinds,
        *,
        quantized: bool,
        vision: bool = False,
        mtp: int | None = None,
    ) -> GgufFile:
        imatrix = self.options.imatrix
        head = render_head(
            self.checkpoint.config,
            self.documents,
            file_type,
            [part for tensor in tensors for part in specs_of(tensor, kinds[tensor.name])],
            vocabulary=None if vision else self.vocabulary,
            mtp_layers=self.mtp if mtp is None else mtp,
            quantized=quantized,
            imatrix=imatrix.keys() if imatrix else None,
            vision=vision,
        )
        return GgufFile.of(name, head, file_type, tensors, kinds, quantized=quantized)
