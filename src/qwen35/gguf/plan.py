"""The plan of a folder of GGUF files: every tensor's type and every byte's place, from headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qwen35.checkpoint.inventory import Item, inventory
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import ConfigError, TensorError, UsageError
from qwen35.gguf.imatrix import Imatrix
from qwen35.gguf.metadata import Documents, Head, Written, model_name, render_head
from qwen35.gguf.names import Tensor, text_tensors, vision_tensors
from qwen35.gguf.rules import MIX, Recipe, Rule, check_used, first_rule
from qwen35.gguf.types import (
    FILE_TYPES,
    FLOATS,
    GGML_TYPES,
    NEEDS_IMATRIX,
    FileType,
    Geometry,
    fallback,
    quantizable,
    select_types,
)
from qwen35.gguf.vocabulary import Vocabulary, read_vocabulary
from qwen35.plan.manifest import Made

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
        kinds: tensor to type of ggml.
    """

    name: str
    file_type: FileType
    head: Head
    tensors: tuple[Tensor, ...]
    kinds: Mapping[str, str]


@dataclass(frozen=True)
class GgufPlan:
    """A complete description of the output.

    Args:
        checkpoint: the source.
        asked: what for.
        files: what is written.
        notes: what the user should know and could not see in the table.
    """

    checkpoint: Checkpoint
    asked: Asked
    files: tuple[GgufFile, ...]
    notes: tuple[str, ...]

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
            "rules": [[rule.match, rule.kind, rule.reason] for rule in rules],
            "upstream_counters": self.asked.upstream_counters,
            "imatrix": self.asked.imatrix.digest if self.asked.imatrix else None,
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
        ConfigError: MTP layers are promised and absent, or the tokenizer is not one llama.cpp has.
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
    return GgufPlan(checkpoint, asked, tuple(files), (*_notes(vocabulary, documents), *notes))


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
        rules = (*self.asked.rules, *self.asked.recipe.rules)
        chosen = {
            tensor.name: first_rule(rules, tensor)
            for tensor in tensors
            if quantizable(tensor.name, tensor.shape)
        }
        check_used(rules, chosen)
        notes = list(self._imatrix_notes(tensors))
        files = []
        for type_name in self.asked.types:
            file_type = FILE_TYPES[type_name]
            if file_type.quantized:
                kinds, more = self._quantized(file_type, tensors, chosen)
                notes += more
            else:
                kinds = {t.name: float_kind(t, file_type) for t in tensors}
                if rules:
                    notes.append(f"{type_name} has no mix: rules do not bear on it")
            files.append(self._file(f"{name}-{type_name}.gguf", file_type, tensors, kinds))
        return files, list(dict.fromkeys(notes))

    def projector_file(self, items: Sequence[Item], name: str, type_name: str) -> GgufFile:
        """Return the file of the vision tower.

        Raises:
            UsageError: there is none.
        """
        if not self.checkpoint.config.architecture.vision:
            raise UsageError("--mmproj", f"{self.checkpoint.name} has no vision tower")
        file_type = FILE_TYPES[type_name]
        tensors = vision_tensors(items)
        kinds = {tensor.name: float_kind(tensor, file_type) for tensor in tensors}
        return self._file(
            f"mmproj-{name}-{type_name}.gguf", file_type, tensors, kinds, vision=True
        )

    def _file(
        self,
        name: str,
        file_type: FileType,
        tensors: Sequence[Tensor],
        kinds: Mapping[str, str],
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

    def _quantized(
        self, file_type: FileType, tensors: Sequence[Tensor], chosen: Mapping[str, Rule | None]
    ) -> tuple[dict[str, str], list[str]]:
        """Return the type of every tensor of a quantized file, and notes."""
        named = {name: rule.kind for name, rule in chosen.items() if rule and rule.kind != MIX}
        picked = select_types(
            file_type,
            [(tensor.name, tensor.shape) for tensor in tensors],
            self.geometry,
            named,
            upstream_counters=self.asked.upstream_counters,
        )
        kinds, notes = {}, []
        for tensor in tensors:
            if tensor.name not in picked:
                kinds[tensor.name] = "f32"
                continue
            kind = GGML_TYPES[picked[tensor.name]]
            fitting = fallback(kind, tensor.row)
            if fitting is not kind:
                found = f"{tensor.name}: rows of {tensor.row} do not fit {kind.name}"
                rule = chosen[tensor.name]
                if tensor.name in named and rule and not self.asked.upstream_counters:
                    expected = f"a multiple of {kind.block}, or {fitting.name}"
                    raise UsageError(rule.subject, found, expected=expected)
                notes.append(f"{found}, so it gets {fitting.name}")
            self._check_imatrix(tensor, fitting.name)
            kinds[tensor.name] = fitting.name
        return kinds, notes

    def _check_imatrix(self, tensor: Tensor, kind: str) -> None:
        """Refuse a type that needs an importance matrix where there is none."""
        imatrix = self.asked.imatrix
        known = imatrix is not None and tensor.name in imatrix.entries
        if kind in NEEDS_IMATRIX and not known:
            raise UsageError(
                tensor.name,
                f"{kind} without an importance matrix",
                expected="an entry for it in --imatrix",
                hint="ggml cannot write it otherwise: give another type",
            )

    def _imatrix_notes(self, tensors: Sequence[Tensor]) -> Iterator[str]:
        """Yield what the importance matrix lacks.

        Raises:
            TensorError: it is of another model.
        """
        imatrix = self.asked.imatrix
        if imatrix is None:
            return
        wanted = {t.name: t for t in tensors if quantizable(t.name, t.shape)}
        known = [name for name in wanted if name in imatrix.entries]
        for name in known:
            _check_size(imatrix, wanted[name])
        if not known:
            raise TensorError(imatrix.name, "no entry for any tensor of this model")
        missing = [name for name in wanted if name not in imatrix.entries]
        if missing:
            yield (
                f"{imatrix.name} has nothing on {len(missing)} of {len(wanted)} tensors, which are "
                f"quantized without: {_some(missing)}"
            )
        extra = sorted(set(imatrix.entries) - set(wanted))
        if extra:
            yield f"{imatrix.name} speaks of tensors that are not here: {_some(extra)}"
        partial = [name for name in known if imatrix.entries[name].unseen]
        if partial:
            count = sum(imatrix.entries[name].unseen for name in partial)
            yield (
                f"{imatrix.name} saw no token for {count} experts, which count evenly: "
                f"{_some(partial)}"
            )


def _check_size(imatrix: Imatrix, tensor: Tensor) -> None:
    found, expected = imatrix.entries[tensor.name].values.size, tensor.row * len(tensor.slabs)
    if found != expected:
        raise TensorError(
            imatrix.name,
            f"{found} values for {tensor.name}",
            expected=str(expected),
            hint="it was made for another model",
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def float_kind(tensor: Tensor, file_type: FileType) -> str:
    """Return a tensor's type in a file that is not quantized."""
    assert file_type.base in FLOATS
    if tensor.storage == "any":
        return file_type.base
    return "f16" if tensor.storage == "patch" and file_type.base == "f16" else "f32"
