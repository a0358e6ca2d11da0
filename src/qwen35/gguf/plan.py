"""The plan of a folder of GGUF files: every tensor's type and every byte's place, from headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qwen35.checkpoint.inventory import Item, inventory
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import ConfigError, UsageError
from qwen35.gguf.choose import Chooser, Kinds, float_kind, imatrix_notes
from qwen35.gguf.imatrix import Imatrix
from qwen35.gguf.metadata import ALIGNMENT, Documents, Head, Written, model_name, render_head
from qwen35.gguf.names import Tensor, text_tensors, vision_tensors
from qwen35.gguf.rules import BUILT_IN, Recipe, Rule, load_recipe
from qwen35.gguf.types import FILE_TYPES, GGML_TYPES, FileType, Geometry
from qwen35.gguf.vocabulary import Vocabulary, read_vocabulary
from qwen35.plan.manifest import Made, rule_row

__all__ = ["Asked", "GgufFile", "GgufPlan", "make_plan"]


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Args:
        types: file types, in order, keys of `FILE_TYPES`.
        recipe: rules by role.
        rules: rules that come before the recipe's.
        imatrix: an importance matrix.
        projector: file type of the multimodal projector's file, if one is wanted.
        drop_mtp: leave the multi-token-prediction layers out.
        upstream_counters: count layers as llama-quantize does (`select_types`).
    """

    types: tuple[str, ...]
    recipe: Recipe
    rules: tuple[Rule, ...] = ()
    imatrix: Imatrix | None = None
    projector: str | None = None
    drop_mtp: bool = False
    upstream_counters: bool = False


@dataclass(frozen=True)
class GgufFile:
    """One file of the output.

    Args:
        name: file name.
        file_type: of the file as a whole.
        head: its first bytes, the place of each tensor, its size.
        tensors: what it holds, in the converter's order.
        kinds: the type of each.
    """

    name: str
    file_type: FileType
    head: Head
    tensors: tuple[Tensor, ...]
    kinds: Kinds

    def size_with(self, kinds: Kinds) -> int:
        """Return the file's bytes if its tensors had these types; the head keeps its length."""
        sizes = [GGML_TYPES[kinds[t.name]].size(t.shape) for t in self.tensors]
        return len(self.head.content) + sum(size + -size % ALIGNMENT for size in sizes)


@dataclass(frozen=True)
class GgufPlan:
    """A complete description of the output.

    Args:
        checkpoint: the source.
        asked: what for.
        files: what is written.
        notes: what the user should know and could not see in the table.
        comparison: recipe to file type to bytes, for this one and the built-in ones that fit.
    """

    checkpoint: Checkpoint
    asked: Asked
    files: tuple[GgufFile, ...]
    notes: tuple[str, ...]
    comparison: Mapping[str, Mapping[str, int]]

    def file_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield name and exact size of every file but the manifest."""
        for file in self.files:
            yield file.name, file.head.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all files and the manifest."""
        return sum(size for _, size in self.file_sizes()) + self.made.nbytes

    @property
    def jobs(self) -> list[tuple[Tensor, dict[str, list[GgufFile]]]]:
        """Every tensor once, with the files that hold it by type, in the order of the source."""
        jobs: dict[str, tuple[Tensor, dict[str, list[GgufFile]]]] = {}
        for file in self.files:
            for tensor in file.tensors:
                _, kinds = jobs.setdefault(tensor.name, (tensor, {}))
                kinds.setdefault(file.kinds[tensor.name], []).append(file)
        return sorted(jobs.values(), key=lambda job: _position(job[0]))

    @property
    def read_bytes(self) -> int:
        """Tensor bytes that executing the plan reads."""
        weights = {slab.item.weight for tensor, _ in self.jobs for slab in tensor.slabs}
        return sum(weight.nbytes for weight in weights)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the output's bytes."""
        imatrix = self.asked.imatrix
        described = {
            "heads": {f.name: hashlib.sha256(f.head.content).hexdigest() for f in self.files},
            "imatrix": imatrix.digest if imatrix else None,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def made(self) -> Made:
        """What the manifest says."""
        rules = (*self.asked.rules, *self.asked.recipe.rules)
        recipe = {
            "name": self.asked.recipe.name,
            "format": "gguf",
            "rules": [rule_row(r.match, r.kind, r.reason, r.layers) for r in rules],
            "upstream_counters": self.asked.upstream_counters,
            "imatrix": self.asked.imatrix.digest if self.asked.imatrix else None,
            "imatrix_name": self.asked.imatrix.name if self.asked.imatrix else None,
            "patterns": len(self.asked.rules),
            "types": list(self.asked.types),
            "projector": self.asked.projector,
            "drop_mtp": self.asked.drop_mtp,
        }
        tensors = {
            file.name: {t.name: f"{file.kinds[t.name]} {list(t.shape)}" for t in file.tensors}
            for file in self.files
        }
        sizes = dict(self.file_sizes())
        return Made(self.checkpoint, recipe, self.digest, sizes, tensors, self.notes)


def _position(tensor: Tensor) -> tuple[str, int]:
    stored = tensor.slabs[0].item.weight.main
    return stored.file, stored.begin


def make_plan(checkpoint: Checkpoint, asked: Asked) -> GgufPlan:
    """Plan the files, reading nothing of the checkpoint but headers and small files.

    Raises:
        ConfigError: MTP layers are promised and absent, or more than llama.cpp loads; or the
            tokenizer is not one that it has.
        TensorError: the checkpoint does not have the weights that its config promises.
        UsageError: what was asked for does not fit the checkpoint.
    """
    checkpoint, stored = _with_mtp(checkpoint, drop=asked.drop_mtp)
    mtp = 0 if asked.drop_mtp else stored
    items = inventory(checkpoint)
    name = model_name(checkpoint)
    with Documents.of(checkpoint) as documents:
        vocabulary = None
        if documents.complete:
            vocabulary = read_vocabulary(documents.folder, checkpoint.config.dims["vocab"])
        maker = _Maker(checkpoint, asked, documents, vocabulary, mtp)
        files, notes = maker.text_files(items, name)
        if asked.projector is not None:
            files.append(maker.projector_file(items, name, asked.projector))
    notes = [*_notes(vocabulary, documents), *notes]
    return GgufPlan(checkpoint, asked, tuple(files), tuple(notes), maker.comparison(files))


def _with_mtp(checkpoint: Checkpoint, *, drop: bool) -> tuple[Checkpoint, int]:
    """Count the MTP layers from the tensors, whatever config.json says of them.

    llama.cpp's converter believes the config: it writes a file that cannot be loaded when the
    layers are missing, and stops when they are there and the config is silent.
    """
    layers = {
        int(weight.name.split(".")[2])
        for weight in checkpoint.weights
        if weight.name.startswith("mtp.layers.") and weight.name.split(".")[2].isdecimal()
    }
    found, promised = len(layers), checkpoint.config.mtp_layers
    if promised > found and not drop:
        raise ConfigError(
            "config.json",
            f"mtp_num_hidden_layers is {promised}, but the checkpoint has {found} such layers",
            expected="its tensors (mtp.*): transformers drops them when it saves",
            hint="take them from the original checkpoint, or give --drop-mtp",
        )
    if found > 1 and not drop:
        raise ConfigError(
            "config.json",
            f"{found} MTP layers",
            expected="one: the loader of llama.cpp wants mtp.fc for each, the family has it once",
            hint="give --drop-mtp",
        )
    if promised == found:
        return checkpoint, found
    return replace(checkpoint, config=replace(checkpoint.config, mtp_layers=found)), found


def _notes(vocabulary: Vocabulary | None, documents: Documents) -> Iterator[str]:
    if vocabulary is not None and vocabulary.nfc:
        yield (
            "the tokenizer brings text into Unicode's NFC form first, llama.cpp does not: text in "
            "another form gets other tokens there"
        )
    if not documents.complete:
        yield "tokenizer and metadata files are not known here, their bytes are not counted"


@dataclass(frozen=True)
class _Maker:
    """One planning run: what all files share."""

    checkpoint: Checkpoint
    asked: Asked
    documents: Documents
    vocabulary: Vocabulary | None
    mtp: int

    @property
    def geometry(self) -> Geometry:
        config = self.checkpoint.config
        text = config.text_raw
        return Geometry(
            layers=len(config.layer_types) + self.mtp,
            experts=config.dims.get("experts", 0),
            gqa=text["num_attention_heads"] // text["num_key_value_heads"],
            imatrix=self.asked.imatrix is not None,
        )

    def text_files(self, items: Sequence[Item], name: str) -> tuple[list[GgufFile], list[str]]:
        """Return the text model's files, and notes on them."""
        tensors = text_tensors(items, self.checkpoint.config, mtp=self.mtp > 0)
        chooser = self.chooser(tensors, self.asked.recipe)
        chooser.ruled()
        imatrix = self.asked.imatrix
        notes: list[str] = []
        if imatrix is not None:
            imatrix.check(self.checkpoint.config.geometry)
            notes += imatrix_notes(imatrix, tensors)
        files = []
        for type_name in self.asked.types:
            file_type = FILE_TYPES[type_name]
            kinds, more = chooser.kinds(file_type)
            notes += more
            files.append(self._file(f"{name}-{type_name}.gguf", file_type, tensors, kinds))
        return files, list(dict.fromkeys(notes))

    def comparison(self, files: Sequence[GgufFile]) -> dict[str, dict[str, int]]:
        """Return what the quantized files would take by each recipe."""
        recipes = {name: load_recipe(name) for name in BUILT_IN}
        recipes[self.asked.recipe.name] = self.asked.recipe
        quantized = [file for file in files if file.file_type.quantized]
        table: dict[str, dict[str, int]] = {}
        for name, recipe in recipes.items():
            for file in quantized:
                try:
                    kinds, _ = self.chooser(file.tensors, recipe).kinds(file.file_type)
                except UsageError:  # a built-in recipe whose types this model's rows do not fit
                    continue
                table.setdefault(name, {})[file.file_type.name] = file.size_with(kinds)
        return table

    def chooser(self, tensors: Sequence[Tensor], recipe: Recipe) -> Chooser:
        """Return what chooses types by `recipe`, after the rules given one by one."""
        rules = (*self.asked.rules, *recipe.rules)
        asked = self.asked
        return Chooser(tensors, self.geometry, rules, asked.imatrix, asked.upstream_counters)

    def projector_file(self, items: Sequence[Item], name: str, type_name: str) -> GgufFile:
        """Return the file of the vision tower.

        Raises:
            UsageError: there is none.
        """
        if not self.checkpoint.config.architecture.vision:
            found = f"{self.checkpoint.name} has no vision tower"
            raise UsageError("--mmproj", found, hint="leave it out")
        file_type = FILE_TYPES[type_name]
        tensors = vision_tensors(items)
        kinds = {tensor.name: float_kind(tensor, file_type) for tensor in tensors}
        return self._file(f"mmproj-{name}-{type_name}.gguf", file_type, tensors, kinds, vision=True)

    def _file(
        self,
        name: str,
        file_type: FileType,
        tensors: Sequence[Tensor],
        kinds: Kinds,
        *,
        vision: bool = False,
    ) -> GgufFile:
        imatrix = self.asked.imatrix
        head = render_head(
            self.checkpoint.config,
            self.documents,
            file_type,
            [Written(t.name, t.shape, kinds[t.name]) for t in tensors],
            vocabulary=None if vision else self.vocabulary,
            mtp_layers=self.mtp,
            imatrix=imatrix.keys() if imatrix else None,
            vision=vision,
        )
        return GgufFile(name, file_type, head, tuple(tensors), kinds)
