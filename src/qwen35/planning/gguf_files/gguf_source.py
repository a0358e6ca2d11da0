"""A GGUF model as a checkpoint: tensors back under their names, in their order, as they were.

The writer's own mapping, run on a model of the file's sizes, says which rows of which weight each
tensor holds, and what was computed with them. Here that is read backwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.gguf_header import GgufHeader, read_gguf, weights_of
from qwen35.checkpoint.gguf_parts import read_model
from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import GgufFiles
from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.split_gguf import is_tower_name, title_of
from qwen35.codecs.arranged import ArrangedWeight, RowRun
from qwen35.codecs.registry import group, quantized_weights
from qwen35.errors import InputError, TensorError
from qwen35.model.model_config import ModelConfig, parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.planning.gguf_files.gguf_config import (
    joint_config,
    sensible,
    text_config,
    vision_config,
)
from qwen35.planning.gguf_files.gguf_sidecars import sidecars_of
from qwen35.planning.gguf_files.metadata import squeezed
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.gguf_files.tensor_names import (
    UntypedTensor,
    text_tensors,
    vision_tensors,
)
from qwen35.planning.transforms import Transform
from qwen35.record_class import record
from qwen35.tensors import DTYPE_NAMES, StoredTensor, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = ["open_gguf"]

_TEXT = ("qwen35", "qwen35moe")
_TOWER = "clip"
_SHOWN = 3
_WIDE = {"f16": "<f2", "f32": "<f4"}
"""Types that may hold numbers of several dtypes."""

_SAMPLED = 32_768


def open_gguf(files: GgufFiles, name: str, *, repo: str = "", revision: str = "") -> Checkpoint:
    """Open a GGUF model as a checkpoint, with the vision tower of a file beside it.

    Args:
        files: from `qwen35.checkpoint.open.gguf_files`.
        name: the name the user gave it.
        repo: the Hub repository that the files are of.
        revision: its commit.

    Raises:
        HubError: the Hub refused a request or could not be reached.
        InputError: the files are damaged, or no such model.
    """
    text = _text_file(files, name)
    tower, others = _tower(files, text)
    with sensible(text):
        config, made = _config(files, text, tower), sidecars_of(text, tower)
    layout = replace(CheckpointNaming.published(config), mtp=config.mtp_layers > 0)
    headers = [text, *([tower] if tower else [])]
    stored = {weight.name: weight for header in headers for weight in weights_of(header)}
    weights = _weights(config, layout, stored, text)
    place = _MadeFiles(files, config, made)
    read = (*text.files, *((tower.path.name,) if tower else ()))
    sizes = files.place.sizes()
    stamps = files.place.stamps() if isinstance(files.place, LocalFolder) else {}
    return Checkpoint(
        name=name,
        config=config,
        weights=tuple(weights),
        layout=layout,
        sidecars=place.sidecars,
        place=place,
        root=files.root,
        repo=repo or None,
        revision=revision or None,
        file_sizes=MappingProxyType({file: sizes[file] for file in read}),
        stamps=MappingProxyType({file: stamps[file] for file in read if file in stamps}),
        within=read,
        label=_title(text),
        read_as=tuple(_notes(text, tower, others, weights, config.dtype)),
    )


def _text_file(files: GgufFiles, name: str) -> GgufHeader:
    """Return the language model's file.

    Raises:
        InputError: there is none, or there are several.
    """
    headers = [read_model(files, names) for names in files.models]
    models = [header for header in headers if _is_model(header)]
    if not files.whole and not models:
        models = headers
    if len(models) != 1:
        shown = ", ".join(header.path.name for header in models[:_SHOWN])
        found = f"{len(models)} GGUF models in it ({shown})" if models else "no model in it"
        raise InputError(name, found, expected="one", hint="name the file of one")
    header = models[0]
    if header.architecture not in _TEXT:
        found = f"architecture {header.architecture!r:.80}"
        hint = "give the file of the language model, which takes this one along"
        raise InputError(
            header.path.name,
            found,
            expected=" or ".join(_TEXT),
            hint=hint if header.architecture == _TOWER else "",
        )
    part = "the multi-token-prediction layer alone" if header.mtp_alone else ""
    part = "a LoRA adapter" if header.is_adapter else part
    if part:
        raise InputError(header.path.name, part, expected="a whole model")
    return header


def _is_model(header: GgufHeader) -> bool:
    kind = header.keys.get("general.type", "model")
    return kind == "model" and header.architecture != _TOWER and not header.mtp_alone


def _tower(files: GgufFiles, text: GgufHeader) -> tuple[GgufHeader | None, list[str]]:
    """Return the vision tower of the model: of the files beside it that fit, the largest.

    It is the most exact one. Also returned are the names of the others.

    Raises:
        InputError: such a file is damaged.
    """
    width = text.keys.get(f"{text.architecture}.embedding_length")
    names = sorted(filter(is_tower_name, files.place.sizes()))
    headers = [read_gguf(files, name) for name in names]
    fitting = [
        header
        for header in headers
        if header.architecture == _TOWER and header.keys.get("clip.vision.projection_dim") == width
    ]
    if not fitting:
        return None, []
    best = max(fitting, key=lambda header: (header.nbytes, header.path.name))
    return best, [header.path.name for header in fitting if header is not best]


def _config(files: GgufFiles, text: GgufHeader, tower: GgufHeader | None) -> ModelConfig:
    raw = text_config(text) | {"dtype": DTYPE_NAMES[_dtype(files, text)]}
    if tower is not None:
        raw = joint_config(raw, vision_config(tower), text.keys["tokenizer.ggml.tokens"])
    return parse_config(raw)


def _dtype(files: GgufFiles, text: GgufHeader) -> str:
    """Return the dtype that the model had: the smallest that holds the file's numbers.

    The family's weights are BF16, in F16 and F32 files too; other trainers save other dtypes. The
    first numbers of the embedding tell them apart.
    """
    import numpy as np

    from qwen35.codecs.floats import f32_from, from_f32

    entry = text.tensors.get("token_embd.weight")
    if entry is None or entry.kind.name not in _WIDE:
        return "BF16"
    stored = np.dtype(_WIDE[entry.kind.name])
    nbytes = min(_SAMPLED * stored.itemsize, entry.nbytes)
    data = files.place.read(entry.file or text.path.name, entry.begin, nbytes)
    values = np.frombuffer(data, stored).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype in ("BF16", "F16"):
            if np.array_equal(f32_from(from_f32(values, dtype), dtype), values):
                return dtype
    return "F32"


def _title(text: GgufHeader) -> str:
    """Return what files of the model are called, without the type."""
    title = title_of(text.files)
    ends = (f"{sign}{name}" for name in FILE_TYPES for sign in "-._")
    end = next((end for end in ends if title.upper().endswith(end)), "")
    return title[: len(title) - len(end)] or title


def _notes(
    text: GgufHeader,
    tower: GgufHeader | None,
    others: Sequence[str],
    weights: Sequence[Weight],
    dtype: str,
) -> Iterator[str]:
    held = quantized_weights(weights)
    packed = ", ".join(f"{count} in {label}" for label, count in sorted(held.items()))
    how = f"quantized: {packed}" if packed else "not quantized"
    beside = f" and {tower.path.name}" if tower else ""
    yield f"read from {text.path.name}{beside}, {how}"
    if tower is None:
        yield "no vision tower: no mmproj file of this model lies beside it"
    if others:
        yield f"other vision towers beside it are not read: {', '.join(others)}"
    yield (
        "config.json, tokenizer and chat template are made of the file's keys; what these do not "
        "say (NFC, initializer_range, limits of image sizes) is as in the family's releases, and "
        f"decoded weights are {DTYPE_NAMES[dtype]}"
    )


@record
class _Held:
    """A tensor of a file, and what undoes what the writer did.

    Args:
        weight: the tensor.
        moves: puts its rows in order; None if they are in order.
        computed: restores values, one after the other.
    """

    weight: Weight
    moves: Transform | None
    computed: tuple[Transform, ...]

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield where rows are that the weight has in this order."""
        if self.moves is None:
            yield first, count
        else:
            yield from self.moves.runs(first, count)

    def restored(self, values: F32) -> F32:
        """Return values as the weight has them."""
        for transform in self.computed:
            values, _ = transform.apply(values, "F32")
        return values

    def columns(self, values: F32) -> F32:
        """Return values of the tensor's columns in the weight's order of columns."""
        for transform in self.computed:
            if not transform.values:
                values, _ = transform.apply(values, "F32")
        return values


def _weights(
    config: ModelConfig, layout: CheckpointNaming, stored: Mapping[str, Weight], text: GgufHeader
) -> list[Weight]:
    """Return the weights in the order of the model.

    Raises:
        TensorError: a tensor is missing, unknown or of another shape.
    """
    label = text.path.name
    written, names = _written(config, layout)
    unknown = sorted(stored.keys() - {tensor.name for tensor in written})
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        found = f"not a tensor that the keys imply{more}"
        raise TensorError(f"{label}: {unknown[0]}", found, hint="is it a model of this family?")
    runs: dict[str, list[tuple[int, int, _Held, int]]] = defaultdict(list)
    for tensor in written:
        held = _held(tensor, stored, label)
        rows = tensor.rows
        for number, slab in enumerate(rows.slabs):
            start = number * rows.count
            for at, first, count in _placed(tensor, slab.row):
                runs[slab.item.weight.name].append((at, start + first, held, count))
    return [_arranged(name, runs[name]) for name in names]


def _written(
    config: ModelConfig, layout: CheckpointNaming
) -> tuple[list[UntypedTensor], list[str]]:
    """Return the tensors that the writer makes of such a model, and the names of its weights."""
    specs = list(expected_tensors(config, layout))
    bare = {spec.name: StoredTensor(spec, "", 0) for spec in specs}
    empty = MappingProxyType[str, int]({})
    items = inventory(Checkpoint("", config, group(bare)[0], layout, empty))
    tensors = text_tensors(items, config, mtp=config.mtp_layers > 0)
    return [*tensors, *vision_tensors(items)], [spec.name for spec in specs]


def _held(tensor: UntypedTensor, stored: Mapping[str, Weight], label: str) -> _Held:
    weight, subject = stored.get(tensor.name), f"{label}: {tensor.name}"
    if weight is None:
        expected = f"{list(tensor.shape)} by the keys"
        raise TensorError(subject, "missing", expected=expected, hint="download the file again")
    if squeezed(weight.main.spec.shape) != squeezed(tensor.shape):
        found = f"shape {list(weight.main.spec.shape)}"
        raise TensorError(subject, found, expected=f"{list(tensor.shape)} by the keys")
    undone = [t.inverse(tensor.shape) for t in reversed(tensor.rows.transforms) if not t.whole]
    moves = next((transform for transform in undone if transform.moves), None)
    return _Held(weight, moves, tuple(t for t in undone if not t.moves))


def _placed(tensor: UntypedTensor, row: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row of the weight, row of the slab, count) for what a slab's rows are of a weight."""
    for transform in tensor.rows.transforms:
        if transform.whole:
            yield from transform.taken()
            return
    yield row, 0, tensor.rows.count


def _arranged(name: str, runs: Sequence[tuple[int, int, _Held, int]]) -> ArrangedWeight:
    """Return a weight of its runs: (row of the weight, row of the tensor, tensor, count)."""
    sources = {held.weight.name: held for _, _, held, _ in runs}
    index = {tensor: i for i, tensor in enumerate(sources)}
    order = tuple(
        RowRun(index[held.weight.name], first, count)
        for _, first, held, count in sorted(runs, key=lambda run: run[0])
    )
    parts = tuple(part for held in sources.values() for part in held.weight.parts)
    storage = runs[0][2].weight.storage
    return ArrangedWeight(name, storage, parts, tuple(sources.values()), order)


@dataclass(frozen=True)
class _MadeFiles:
    """The files of a checkpoint, made from keys.

    Args:
        files: the GGUF files.
        config: config.json.
        made: the small files.
    """

    files: GgufFiles
    config: ModelConfig
    made: Mapping[str, bytes]

    def __str__(self) -> str:
        return str(self.files.place)

    @property
    def sidecars(self) -> Mapping[str, int]:
        """The size of each small file."""
        return MappingProxyType({name: len(content) for name, content in self.made.items()})

    @property
    def _all(self) -> dict[str, bytes]:
        return {"config.json": json_bytes(self.config.raw), **self.made}

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of each file."""
        return {name: len(content) for name, content in self._all.items()}

    def folders(self) -> Sequence[str]:
        """Return nothing: other folders are not the model's."""
        return ()

    def dangling(self) -> Mapping[str, str]:
        """Return nothing: all that is here was made."""
        return {}

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of a file, starting at `start`."""
        content: Any = self._all.get(name)
        if content is None:
            raise InputError(name, "no such file")
        return bytes(content[start : start + count])
