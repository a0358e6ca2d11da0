"""The plan: every tensor and file of an output, known from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.planning.container import Container, ContainerOptions
from qwen35.planning.step import Step
from qwen35.tensors import TensorSpec

if TYPE_CHECKING:
    from qwen35.planning.rules import Recipe

__all__ = ["Plan", "PlannedFile", "make_plan"]


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output that holds tensors.

    Args:
        name: file name.
        head: the bytes before the data.
        offsets: absolute offset of each tensor.
        nbytes: size of the file.
        steps: the steps that fill it, in the plan's order.
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
        options: and what beside it; with what follows from the source where nothing was asked for.
        steps: all of them, each file's together as far as that goes.
        files: the files that hold tensors.
        documents: the files whose content the plan makes (config.json, the index, a template).
        copied: side-car files that travel unchanged, with their sizes.
        notes: what the user should know and could not see in the table.
        described: everything that decides the output's bytes, as plain values.
        comparison: recipe to file type to bytes, where a container compares its recipes.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    options: ContainerOptions
    steps: tuple[Step, ...]
    files: Sequence[PlannedFile]
    documents: Mapping[str, bytes]
    copied: Mapping[str, int]
    notes: tuple[str, ...]
    described: Mapping[str, Any]
    comparison: Mapping[str, Mapping[str, int]]

    @property
    def container(self) -> Container:
        """What holds the output."""
        return self.recipe.container

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
    def total_bytes(self) -> int:
        """Bytes of all files, the manifest among them."""
        from qwen35.planning.manifest import manifest_size

        return self.nbytes + manifest_size(self)

    def all_sizes(self) -> Iterator[tuple[str, int]]:
        """Yield name and exact size of every file, the manifest last."""
        from qwen35.planning.manifest import manifest_size

        yield from self.file_sizes()
        yield MANIFEST_NAME, manifest_size(self)

    @property
    def outputs(self) -> Iterator[TensorSpec]:
        """Every tensor written, in model order."""
        return (out for step in self.steps for out in step.outputs)

    @property
    def written(self) -> list[Step]:
        """The steps that write something."""
        return [step for step in self.steps if step.targets]

    @cached_property
    def read_bytes(self) -> int:
        """Tensor bytes that executing the plan reads."""
        return sum(step.read_bytes for step in self.steps)

    @property
    def settings(self) -> Any:
        """How codecs choose scales, if any of them do."""
        return self.options.settings

    @property
    def kind(self) -> str:
        """How the output holds its weights."""
        return self.container.kind(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the output's bytes, sizes of side-cars included.

        Where the source lies is not in it: the same checkpoint elsewhere gives the same digest.
        """
        text = json.dumps(self.described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, options: ContainerOptions | None = None, **given: Any
) -> Plan:
    """Plan the output of `recipe` on `checkpoint`, reading nothing but headers and small files.

    Args:
        checkpoint: the source.
        recipe: rules for its weights.
        options: what is asked for beside it.
        given: the same, one by one: the fields of `SafetensorsOptions` or `GgufOptions`.

    Raises:
        ConfigError: config.json promises what is not there, or what no reader could load.
        TensorError: the checkpoint does not have the weights that its config promises.
        UsageError: the recipe or the options do not fit the checkpoint.
    """
    container = recipe.container
    return container.make(checkpoint, recipe, options or container.options(**given))
