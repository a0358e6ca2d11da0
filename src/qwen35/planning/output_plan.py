"""The plan: every tensor and file of an output, derived from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import CODECS
from qwen35.display import size
from qwen35.planning.container import Container, ContainerOptions
from qwen35.planning.step import Step
from qwen35.table import html_lines, html_table
from qwen35.tensors import TensorSpec

if TYPE_CHECKING:
    from qwen35.planning.rules import Recipe

__all__ = ["Constant", "Plan", "PlannedFile", "digest_of", "make_plan"]

_BATCH = 4096  # values rendered at once


@dataclass(frozen=True)
class Constant:
    """A tensor whose bytes are known when an output is planned.

    Args:
        spec: its description.
        data: its bytes.
    """

    spec: TensorSpec
    data: bytes


@dataclass(frozen=True)
class PlannedFile:
    """An output file that holds tensors.

    Args:
        name: file name.
        head: the bytes before the data of the steps, those of constants included.
        offsets: absolute offset of each tensor.
        nbytes: file size.
        steps: the steps that fill it, in plan order.
        constants: tensors that no step writes.
        described: the tensors as its head describes them, where that is not as steps write them.
    """

    name: str
    head: bytes
    offsets: Mapping[str, int]
    nbytes: int
    steps: tuple[Step, ...]
    constants: tuple[Constant, ...] = field(default=(), kw_only=True)
    described: tuple[TensorSpec, ...] = field(default=(), kw_only=True)

    @property
    def head_tensors(self) -> Iterator[TensorSpec]:
        """Its tensors as its head describes them."""
        if self.described:
            yield from self.described
        else:
            yield from (out for step in self.steps for out in step.outputs)
        yield from (constant.spec for constant in self.constants)


@dataclass(frozen=True)
class Plan:
    """A complete description of an output.

    Args:
        checkpoint: the source.
        recipe: the rules for its weights.
        options: the container's options; unset ones are filled in from the source.
        steps: all steps, grouped by file as far as possible.
        files: the files that hold tensors.
        documents: generated files and their content (config.json, the index, a template).
        copied: sidecar files copied unchanged, with their sizes.
        notes: for the user, beyond what the plan's table shows.
        digest: `digest_of` everything that decides the output's bytes, including sidecar sizes. It
            excludes the source's location: a copy of the checkpoint gives the same digest.
        comparison: file sizes by recipe and file type, where a container compares its recipes.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    options: ContainerOptions
    steps: tuple[Step, ...]
    files: Sequence[PlannedFile]
    documents: Mapping[str, bytes]
    copied: Mapping[str, int]
    notes: tuple[str, ...]
    digest: str
    comparison: Mapping[str, Mapping[str, int]]

    def __repr__(self) -> str:
        packed = sum(1 for step in self.steps for t in step.targets if not t.copied)
        return (
            f"<Plan {self.checkpoint.name} -> {self.recipe.name}: {len(self.steps)} weights in, "
            f"{packed} of them converted, {size(self.nbytes)}>"
        )

    def _repr_html_(self) -> str:
        rows = [(name, f"{nbytes:,}") for name, nbytes in self.file_sizes()]
        files = html_table(("file", "bytes"), rows, repr(self).strip("<>"))
        return files + html_lines(self.notes)

    @property
    def container(self) -> Container:
        """The output's container."""
        return self.recipe.container

    def file_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield name and exact size of every file except the manifest."""
        for file in self.files:
            yield file.name, file.nbytes
        for name, content in self.documents.items():
            yield name, len(content)
        yield from self.copied.items()

    @property
    def nbytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(size for _, size in self.file_sizes())

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, including the manifest."""
        return sum(nbytes for _, nbytes in self.all_sizes())

    def all_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield name and exact size of every file, the manifest last."""
        from qwen35.planning.manifest import manifest_size

        yield from self.file_sizes()
        yield MANIFEST_NAME, manifest_size(self)

    @property
    def outputs(self) -> Iterator[TensorSpec]:
        """All written tensors, in model order; constants last."""
        yield from (out for step in self.steps for out in step.outputs)
        yield from (constant.spec for file in self.files for constant in file.constants)

    @property
    def written(self) -> list[Step]:
        """The steps that write something."""
        return [step for step in self.steps if step.targets]

    @cached_property
    def read_bytes(self) -> int:
        """Tensor bytes read to execute the plan."""
        return sum(step.read_bytes for step in self.steps)

    @property
    def settings(self) -> Any:
        """How codecs choose scales; None if none do."""
        return self.options.settings

    @property
    def banded(self) -> bool:
        """Whether weights are encoded that bands judge (`Codec.banded`)."""
        targets = (target for step in self.steps for target in step.targets if not target.copied)
        return any(CODECS[target.codec].banded for target in targets)

    @property
    def kind(self) -> str:
        """The codec that packs the weights, or the container's name."""
        return self.container.kind(self)


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of ``json.dumps(values, sort_keys=True)``.

    Args:
        values: plain values by name; instead of a list, an iterator, which may be long.
    """
    digest = hashlib.sha256()
    for text in _sorted_json(values):
        digest.update(text.encode())
    return digest.hexdigest()


def _sorted_json(values: Mapping[str, Any]) -> Iterator[str]:
    yield "{"
    before = ""
    for name, value in sorted(values.items()):
        yield f"{before}{json.dumps(name)}: "
        if isinstance(value, Iterator):
            before = "["
            while batch := list(islice(value, _BATCH)):
                yield f"{before}{json.dumps(batch, sort_keys=True)[1:-1]}"
                before = ", "
            yield "[]" if before == "[" else "]"
        else:
            yield json.dumps(value, sort_keys=True)
        before = ", "
    yield "}"


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, options: ContainerOptions | None = None, **values: Any
) -> Plan:
    """Plan the output of `recipe` on `checkpoint`, reading only headers and small files.

    Args:
        checkpoint: the source.
        recipe: rules for its weights.
        options: the container's options.
        values: fields of `SafetensorsOptions` or `GgufOptions`, instead of `options`.

    Raises:
        ConfigError: config.json promises tensors that are missing, or a model no reader could load.
        TensorError: the checkpoint's weights do not match its config.
        UsageError: the recipe or the options do not fit the checkpoint.
    """
    container = recipe.container
    return container.make(checkpoint, recipe, options or container.options(**values))
