"""The container protocol: all that the package needs to know about an output's file format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qwen35.errors import Finding

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.planning.output_plan import Plan
    from qwen35.planning.refinement import Refinement
    from qwen35.planning.rules import Recipe
    from qwen35.planning.step import Step

__all__ = ["Container", "ContainerInputs", "ContainerOptions", "EditedFile"]

_PIECE = 4 * 2**20


@dataclass(frozen=True)
class EditedFile:
    """A file with a new beginning.

    Args:
        head: the beginning.
        rest: the file that the other bytes are copied from; None if there are none.
        start: where they begin in it.
    """

    head: bytes
    rest: Path | None = None
    start: int = 0

    def pieces(self) -> Iterator[bytes]:
        """Yield its bytes."""
        yield self.head
        if self.rest is not None:
            with self.rest.open("rb") as file:
                file.seek(self.start)
                while piece := file.read(_PIECE):
                    yield piece


@dataclass(frozen=True)
class ContainerInputs:
    """Files beside the source that an output is made from; needed again to reproduce it.

    Args:
        activations: activation statistics, if used.
        imatrix: importance matrix, if used.
        hessians: folder of Hessians, if used.
    """

    activations: Path | None = None
    imatrix: Path | None = None
    hessians: Path | None = None

    def to_json(self) -> dict[str, str]:
        """Return the paths that are set, made absolute."""
        paths = {
            "activations": self.activations,
            "imatrix": self.imatrix,
            "hessians": self.hessians,
        }
        return {name: str(path.absolute()) for name, path in paths.items() if path is not None}

    @classmethod
    def of(cls, paths: Mapping[str, str]) -> ContainerInputs:
        """Rebuild the inputs from `to_json`."""
        return cls(**{name: Path(path) for name, path in paths.items()})


class ContainerOptions(Protocol):
    """A container's options beside the recipe; a frozen dataclass."""

    @property
    def settings(self) -> Any:
        """How codecs choose scales; None if none do (`qwen35.codecs.codec.EncodingRequest`)."""

    @property
    def inputs(self) -> ContainerInputs:
        """The files beside the source."""

    @property
    def encoder(self) -> str:
        """Which implementation encodes, for codecs with several; the bytes are the same."""

    @property
    def refinement(self) -> Refinement:
        """How codes are chosen."""

    def importance(self, step: Step, slab: int) -> F32 | None:
        """Return how much an error in each column of a slab matters; None: all equally."""

    def input_largest(self, step: Step) -> float | None:
        """Return the largest magnitude of the inputs of a step's layer; None if unknown."""


class Container(ABC):
    """An output file format.

    Attributes:
        name: name in manifests.
        verb: command that writes it.
        formats: recipe formats it can hold.
        recipes: what its recipes are called in error messages.
        complete: whether the rules must cover every weight.
        types: types that its files have, chosen beside the recipe.
        extra: further source files to read if present, beside those of every checkpoint.
        libraries: further libraries whose versions affect the bytes.
        separate: whether each file is an artifact by itself, with its own type.
        engine: modules of the engine that runs it, and the pip extra that provides them.
        base_memory: bytes of the interpreter with the libraries that writing loads.
    """

    name: ClassVar[str]
    verb: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    recipes: ClassVar[str]
    complete: ClassVar[bool] = True
    types: ClassVar[Collection[str]] = ()
    extra: ClassVar[tuple[str, ...]] = ("README.md",)
    libraries: ClassVar[tuple[str, ...]] = ()
    separate: ClassVar[bool] = False
    engine: ClassVar[tuple[tuple[str, ...], str]] = ((), "")
    base_memory: ClassVar[int] = 175_000_000

    @abstractmethod
    def action(self, recipe: str, rule: str, action: str, kind: str) -> str:
        """Return the canonical spelling of a rule's action.

        Args:
            recipe: the recipe, for error messages.
            rule: the rule, for error messages.
            action: as spelled in the recipe.
            kind: the recipe's format.

        Raises:
            UsageError: the format has no such action.
        """

    @abstractmethod
    def options(self, **values: Any) -> ContainerOptions:
        """Return the options of this container."""

    @abstractmethod
    def make(self, checkpoint: Checkpoint, recipe: Recipe, options: Any) -> Plan:
        """Plan the output; errors are those of `qwen35.planning.output_plan.make_plan`."""

    @abstractmethod
    def request_json(self, plan: Plan, *, whole: bool = False) -> dict[str, Any]:
        """Return the recipe and options as manifests record them (`request_from_manifest`).

        With `whole`, include values that equal the defaults: a worker's defaults may differ.
        """

    @abstractmethod
    def request_from_manifest(
        self, manifest: Mapping[str, Any], inputs: ContainerInputs
    ) -> tuple[Recipe, ContainerOptions]:
        """Return the recipe and options recorded in a manifest.

        Args:
            manifest: a parsed manifest, or a work order, which has the same entries.
            inputs: the files beside the source that the output was made from.

        Raises:
            InputError: the manifest is malformed, or records other files.
            UsageError: an input file is missing, or the output used none.
        """

    @abstractmethod
    def tensors_json(self, plan: Plan) -> dict[str, dict[str, str]]:
        """Map each file's tensors to type and shape."""

    def prepare(self, plan: Plan) -> None:  # noqa: B027 - most need nothing
        """Check that everything needed for writing is installed.

        Raises:
            UsageError: a library is missing.
        """

    def head_memory(self, plan: Plan) -> int:
        """Estimate the memory for file heads and the structures that describe them."""
        # A tensor's specs and steps take several times the bytes of its entry in the head.
        return 8 * sum(len(file.head) for file in plan.files)

    def file_findings(self, plan: Plan, folder: Path) -> Iterator[Finding]:
        """Yield findings for files that are missing or not of the planned type."""
        del plan, folder
        yield from ()

    def models(self, folder: Path) -> list[Path]:
        """Return the paths in a written output that can be evaluated."""
        return [folder]

    def amendable(self, *, vision: bool) -> tuple[str, ...]:
        """Return the small files that may be edited once the output is written."""
        del vision
        return ()

    @abstractmethod
    def with_template(
        self, folder: Path, names: Collection[str], template: str
    ) -> dict[str, EditedFile]:
        """Return the files of a written output that a new chat template changes.

        Args:
            folder: the output.
            names: its files.
            template: the template.

        Raises:
            InputError: a file cannot be read.
        """

    @abstractmethod
    def kind(self, plan: Plan) -> str:
        """Return the name of the codec that packs the weights, or this container's name."""

    @abstractmethod
    def has_vision(self, plan: Plan) -> bool:
        """Whether the vision tower is written."""

    @abstractmethod
    def suffix(self, plan: Plan) -> str:
        """Return the suffix of an artifact's name."""

    @abstractmethod
    def text(self, plan: Plan, threads: int) -> str:
        """Render a plan for people."""

    @abstractmethod
    def json(self, plan: Plan, threads: int) -> dict[str, Any]:
        """Return a plan as plain values."""

    def packed_json(self, plan: Plan) -> dict[str, int]:
        """Return the number of weights per packing codec; empty if not meaningful."""
        del plan
        return {}

    @abstractmethod
    def written_text(self, plan: Plan) -> str:
        """Summarize the output for the line printed after a run; may be empty."""
