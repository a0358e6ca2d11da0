"""Dialects: how files of one loader name, stack and shape tensors, where it is not as transformers.

All of the package works with the family's own names and shapes, one matrix for each expert; only
headers and config.json are written in a dialect, and translated back when they are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qwen35.errors import InputError
from qwen35.tensors import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from qwen35.codecs.codec import LoaderModule
    from qwen35.model.model_config import ModelConfig
    from qwen35.model.roles import Role

__all__ = ["Dialect", "FamilyTensors", "Program", "StackedTensor"]


@dataclass(frozen=True)
class Program:
    """A program that runs a model.

    Args:
        name: its name.
        install: how to get it.
        commands: with ``{repo}`` for the model.
        vision: whether it is for models with a tower.
    """

    name: str
    install: str
    commands: tuple[str, ...]
    vision: bool = False


@dataclass(frozen=True)
class StackedTensor:
    """A tensor of a file.

    Args:
        spec: its description in the file.
        parts: the tensors of the family that it consists of, in the order of their bytes.
    """

    spec: TensorSpec
    parts: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FamilyTensors:
    """The tensors of files in a dialect under the family's names.

    Args:
        tensors: by name.
        held: weight to its codec, where names and dtypes alone do not tell it.
        problems: what is wrong with them.
        notes: what users should know.
    """

    tensors: Mapping[str, StoredTensor]
    held: Mapping[str, str]
    problems: Sequence[InputError] = field(default=())
    notes: Sequence[str] = field(default=())


class Dialect(ABC):
    """The files of a loader.

    Attributes:
        name: ``format`` in the metadata of its files.
        files: pattern of the names of files that all of them read, whatever an index says.
        programs: what runs them.
    """

    name: ClassVar[str]
    files: ClassVar[str]
    programs: ClassVar[tuple[Program, ...]] = ()

    # --- reading

    @abstractmethod
    def reads(self, tensors: Mapping[str, StoredTensor], formats: Set[str]) -> bool:
        """Return whether files are in this dialect.

        Args:
            tensors: their tensors by name.
            formats: values of ``format`` in their metadata.
        """

    @abstractmethod
    def family_config(self, raw: object) -> object:
        """Return config.json as transformers has it; as it is where it is malformed."""

    @abstractmethod
    def family_tensors(
        self, tensors: Mapping[str, StoredTensor], config: ModelConfig
    ) -> FamilyTensors:
        """Return the tensors of all files under the family's names."""

    # --- writing

    @abstractmethod
    def unpacked(self, role: Role) -> str:
        """Return the codec of weights that are not quantized."""

    @abstractmethod
    def stacks(self, specs: Iterable[TensorSpec]) -> list[StackedTensor]:
        """Return the tensors of a file that holds these."""

    @abstractmethod
    def config(
        self, raw: dict[str, Any], config: ModelConfig, modules: Sequence[LoaderModule]
    ) -> dict[str, Any]:
        """Return config.json as the loader reads it, from one that transformers could read.

        Args:
            raw: what transformers could read; changed.
            config: of the source.
            modules: all weights that are written.

        Raises:
            UsageError: the loader has no place for some of the weights.
            ConfigError: it computes another model.
        """
