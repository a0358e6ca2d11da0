"""The protocol: everything that the rest of the package asks of a way to lay outputs into files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qwen35.errors import Finding

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.planning.output_plan import Plan
    from qwen35.planning.rules import Recipe
    from qwen35.planning.step import Step

__all__ = ["Container", "ContainerInputs", "ContainerOptions"]


@dataclass(frozen=True)
class ContainerInputs:
    """Files that an output was made with, beside its source; found again to make it again.

    Args:
        activations: statistics of activations, if there were any.
        imatrix: an importance matrix, if there was one.
    """

    activations: Path | None = None
    imatrix: Path | None = None

    def to_json(self) -> dict[str, str]:
        """Return the paths that there are, absolute."""
        named = {"activations": self.activations, "imatrix": self.imatrix}
        return {name: str(path.absolute()) for name, path in named.items() if path is not None}

    @classmethod
    def of(cls, paths: Mapping[str, str]) -> ContainerInputs:
        """Return what `to_json` was called on."""
        return cls(**{name: Path(path) for name, path in paths.items()})


class ContainerOptions(Protocol):
    """What a container was asked for beside the recipe; a frozen dataclass."""

    @property
    def settings(self) -> Any:
        """How codecs choose scales, if any of them do (`qwen35.codecs.codec.EncodingRequest`)."""

    @property
    def inputs(self) -> ContainerInputs:
        """The files that it was made with."""

    def importance(self, step: Step, slab: int) -> F32 | None:
        """Return how much an error in each column of a slab matters; None: all alike."""


class Container(ABC):
    """A way to lay outputs into files.

    Attributes:
        name: in manifests.
        verb: that writes it.
        formats: of recipes that it holds.
        recipes: what a name that is none of its recipes is not.
        complete: whether rules must say what happens to every weight.
        extra: files that are read beside those of every checkpoint, if they are there.
        libraries: whose versions decide bytes too.
        separate: whether each file is an artifact by itself, with a type of its own.
        engine: what it is asked and measured in: modules, and the extra that brings them.
        base_memory: bytes of the interpreter with the libraries that writing loads.
    """

    name: ClassVar[str]
    verb: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    recipes: ClassVar[str]
    complete: ClassVar[bool] = True
    extra: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ()
    separate: ClassVar[bool] = False
    engine: ClassVar[tuple[tuple[str, ...], str]] = ((), "")
    base_memory: ClassVar[int] = 175_000_000

    @abstractmethod
    def action(self, recipe: str, rule: str, action: str, kind: str) -> str:
        """Return the action that a rule names, spelled as plans do.

        Args:
            recipe: the recipe, for sentences.
            rule: the rule, for sentences.
            action: as the recipe spells it.
            kind: the recipe's format.

        Raises:
            UsageError: there is no such action in this format.
        """

    @abstractmethod
    def options(self, **given: Any) -> ContainerOptions:
        """Return what was asked for beside the recipe."""

    @abstractmethod
    def make(self, checkpoint: Checkpoint, recipe: Recipe, options: Any) -> Plan:
        """Plan the output; errors are those of `qwen35.planning.output_plan.make_plan`."""

    @abstractmethod
    def asked_json(self, plan: Plan, *, whole: bool = False) -> dict[str, Any]:
        """Return what a plan was made of, as a manifest says it; `asked_again` reads it.

        With `whole`, what is as usual is said too: a worker's usual may be another.
        """

    @abstractmethod
    def asked_again(
        self, manifest: Mapping[str, Any], inputs: ContainerInputs
    ) -> tuple[Recipe, ContainerOptions]:
        """Return the recipe and the options of a manifest.

        Args:
            manifest: parsed; or a work order, which says the same.
            inputs: the files that it was made with.

        Raises:
            InputError: the manifest is malformed, or these are other files.
            UsageError: a file is not given, or there was none.
        """

    @abstractmethod
    def tensors_json(self, plan: Plan) -> dict[str, dict[str, str]]:
        """Return file to tensor to type and shape."""

    def prepare(self, plan: Plan) -> None:  # noqa: B027 - most need nothing
        """Check that everything that writing needs is there.

        Raises:
            UsageError: a library is missing.
        """

    def head_memory(self, plan: Plan) -> int:
        """Return the bytes that what stands before the data takes, with what describes it."""
        return 8 * sum(len(file.head) for file in plan.files)

    def file_findings(self, plan: Plan, folder: Path) -> Iterator[Finding]:
        """Yield which files of a written output are missing or of another type than planned."""
        del plan, folder
        yield from ()

    def models(self, folder: Path) -> list[Path]:
        """Return what of a written output can be measured."""
        return [folder]

    @abstractmethod
    def kind(self, plan: Plan) -> str:
        """Return how an output holds its weights: a codec's name, or this container's."""

    @abstractmethod
    def has_vision(self, plan: Plan) -> bool:
        """Whether the vision tower is written."""

    @abstractmethod
    def suffix(self, plan: Plan) -> str:
        """Return what the name of an output ends with."""

    @abstractmethod
    def text(self, plan: Plan, threads: int) -> str:
        """Render a plan for people."""

    @abstractmethod
    def json(self, plan: Plan, threads: int) -> dict[str, Any]:
        """Return all of a plan as plain values."""

    def packed_json(self, plan: Plan) -> dict[str, int]:
        """Return how many weights each codec packs, where that is worth counting."""
        del plan
        return {}

    @abstractmethod
    def written_text(self, plan: Plan) -> str:
        """Say in a few words what was written, for the line after a run; nothing if that is all."""
