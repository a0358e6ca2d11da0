"""The protocol: everything that a check asks of a container of weights, opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.source import Checkpoint, FolderReader
from qwen35.errors import Finding
from qwen35.planning.rows import Rows
from qwen35.tensors import TensorSpec, Weight
from qwen35.verification.behaviour import BehaviourResult

__all__ = [
    "Depth",
    "Engine",
    "HeldWeight",
    "SourceWeights",
    "Subject",
    "SubjectPart",
    "TensorTable",
]

Depth = Literal["structure", "numbers", "behaviour"]
Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """A weight as the artifact holds it.

    Args:
        weight: where its bytes are.
        spec: the weight, decoded.
        subject: what findings call it; no other weight of the artifact is called so.
        storage: what the artifact calls the way it is held.
    """

    weight: Weight
    spec: TensorSpec
    subject: str
    storage: str


@dataclass(frozen=True, slots=True)
class SubjectPart:
    """Weights that are checked in one go: a whole checkpoint, or a file that is a model by itself.

    Args:
        name: for people.
        nbytes: to read.
        weights: in the order in which they are read.
        by_name: whether errors are added up in the order of names instead.
    """

    name: str
    nbytes: int
    weights: tuple[HeldWeight, ...]
    by_name: bool = False


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """What a source has for the weights of a part.

    Args:
        rows: subject to where its values come from; a weight without is only decoded.
        findings: what one side alone has.
        comparable: whether the part is looked at at all: else it is of another model.
    """

    rows: Mapping[str, Rows]
    findings: tuple[Finding, ...] = ()
    comparable: bool = True


@dataclass(frozen=True, slots=True)
class TensorTable:
    """Tensors as files hold them, and as a manifest says they were planned.

    Args:
        stored: what findings call a tensor to its type and shape, and its file; no file where the
            name tells it.
        planned: the same by the manifest.
        meaning: what of type and shape is compared.
    """

    stored: Mapping[str, tuple[str, str]]
    planned: Mapping[str, tuple[str, str]]
    meaning: Callable[[str], str] = str


class Subject(ABC):
    """An opened artifact.

    Args:
        name: what the user called it.
        place: where its small files can be read from; None: nothing can be read.

    Attributes:
        suffix: what names of files that hold weights end with.
        unlisted: the check that names such a file when the manifest does not list it: ``files``
            looks at names, ``hash`` when the file would be hashed.
    """

    suffix: ClassVar[str]
    unlisted: ClassVar[Literal["files", "hash"]] = "files"

    def __init__(self, name: str, place: FileLocation | None) -> None:
        self.name, self.place = name, place

    # --- opened

    @classmethod
    @abstractmethod
    def find(cls, name: str, token: str | None) -> Any:
        """Return what `open` needs of an artifact that this container holds; None if it does not.

        Raises:
            HubError: the Hub refused, or was not reached.
            UsageError: `name` is malformed.
        """

    @classmethod
    @abstractmethod
    def refuse(cls, engine: Engine | None, tensor_parallel: int | None) -> None:
        """Refuse what cannot be asked of this container, before any work.

        Raises:
            UsageError: it cannot, or the engine is not installed.
        """

    @classmethod
    @abstractmethod
    def open(cls, name: str, found: Any, *, weights: bool, token: str | None) -> Subject:
        """Open what `find` found; with `weights` they are downloaded if they are not at hand.

        Raises:
            InputError: it cannot be read at all.
            HubError: the Hub refused, or was not reached.
        """

    # --- structure

    @property
    @abstractmethod
    def kind(self) -> str:
        """How it holds its weights."""

    @property
    @abstractmethod
    def vision(self) -> bool:
        """Whether it has a vision tower."""

    @property
    @abstractmethod
    def files(self) -> Sequence[str]:
        """The files that hold weights."""

    @property
    def whole(self) -> bool:
        """Whether it is all that its manifest lists, and not a file picked out of that."""
        return True

    @abstractmethod
    def structure(self) -> Iterator[Finding]:
        """Yield what is wrong by headers and small files, the manifest apart."""

    @abstractmethod
    def tables(self, manifest: Mapping[str, Any]) -> Iterator[TensorTable]:
        """Yield the tensors that are there, beside those that a manifest lists."""

    def shared(self, ranks: int) -> Iterator[Finding]:
        """Yield the weights that `ranks` GPUs could not share.

        Raises:
            UsageError: it has none that GPUs share in a way of their own.
        """
        del ranks
        yield from ()

    # --- numbers

    @property
    @abstractmethod
    def parts(self) -> Sequence[SubjectPart]:
        """Its weights."""

    @abstractmethod
    def folder(self) -> Path:
        """Return where the weights' bytes are.

        Raises:
            InputError: only headers are at hand.
        """

    @abstractmethod
    def stamps(self) -> list[Any]:
        """Return what tells these files from all others, and from themselves once changed."""

    @abstractmethod
    def reader(self) -> FolderReader:
        """Return what reads the weights' bytes."""

    @abstractmethod
    def originals(
        self, part: SubjectPart, source: Checkpoint, items: Sequence[InventoryItem]
    ) -> SourceWeights:
        """Match a part with a source.

        Args:
            part: one of `parts`.
            source: the checkpoint it was made from.
            items: every weight of that.

        Raises:
            InputError: nothing of this kind can be made of the source.
        """

    # --- behaviour

    @abstractmethod
    def ask(self, engine: Engine | None, threads: int | None) -> BehaviourResult:
        """Load it in an engine and ask it everything."""
