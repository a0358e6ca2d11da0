"""The protocol of an opened artifact: what the checks need from each container."""

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
from qwen35.progress import Progress
from qwen35.tensors import TensorSpec, Weight
from qwen35.verification.asking_prompts import PromptedArtifact
from qwen35.verification.behaviour import BehaviourResult
from qwen35.verification.settings_comparison import SettingsComparison

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
        weight: its bytes in the files.
        spec: its shape and dtype when decoded.
        subject: its name in findings, unique in the artifact.
        storage: the artifact's name for the way it is stored.
    """

    weight: Weight
    spec: TensorSpec
    subject: str
    storage: str


@dataclass(frozen=True, slots=True)
class SubjectPart:
    """Weights that are checked together: a whole checkpoint, or a file that is a model by itself.

    Args:
        name: shown to the user.
        nbytes: bytes to read.
        weights: in reading order.
        by_name: add up errors in the order of names instead. Sums of floats depend on the order.
    """

    name: str
    nbytes: int
    weights: tuple[HeldWeight, ...]
    by_name: bool = False


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """The originals of a part's weights.

    Args:
        rows: subject to the rows of its original; a weight without one is only decoded.
        findings: weights that only one side has.
        comparable: False if the part belongs to another model, and is skipped.
    """

    rows: Mapping[str, Rows]
    findings: tuple[Finding, ...] = ()
    comparable: bool = True


@dataclass(frozen=True, slots=True)
class TensorTable:
    """Tensors as stored in files and as planned by the manifest.

    Args:
        stored: name of a tensor in findings to its type and shape, and its file; the file is empty
            if the name includes it.
        planned: the same by the manifest.
        meaning: normalizes type and shape before they are compared.
    """

    stored: Mapping[str, tuple[str, str]]
    planned: Mapping[str, tuple[str, str]]
    meaning: Callable[[str], str] = str


class Subject(ABC):
    """An opened artifact.

    Args:
        name: as the user gave it.
        place: reads its small files; None if nothing can be read.

    Attributes:
        suffix: of the names of files with weights.
        unlisted: the check that reports such a file when the manifest does not list it: ``files``
            at depth structure, ``hash`` when files are hashed.
    """

    suffix: ClassVar[str]
    unlisted: ClassVar[Literal["files", "hash"]] = "files"

    def __init__(self, name: str, place: FileLocation | None) -> None:
        self.name, self.place = name, place

    # --- opened

    @classmethod
    @abstractmethod
    def find(cls, name: str, token: str | None) -> Any:
        """Return what `open` needs; None if the artifact is not of this container.

        Raises:
            HubError: the Hub refused, or was not reached.
            UsageError: `name` is malformed.
        """

    @classmethod
    @abstractmethod
    def refuse(cls, engine: Engine | None, tensor_parallel: int | None) -> None:
        """Refuse, before any work, options that do not apply to this container.

        Raises:
            UsageError: an option does not apply, or the engine is not installed.
        """

    @classmethod
    @abstractmethod
    def open(cls, name: str, found: Any, *, weights: bool, token: str | None) -> Subject:
        """Open what `find` returned; with `weights`, download them if they are not local.

        Raises:
            InputError: it cannot be read at all.
            HubError: the Hub refused, or was not reached.
        """

    # --- structure

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of the way in which weights are stored."""

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
        """Whether it is all that its manifest lists, and not a single file of that."""
        return True

    @abstractmethod
    def structure(self) -> Iterator[Finding]:
        """Check headers and small files, but not the manifest."""

    @property
    def notes(self) -> Iterator[str]:
        """What users should know and no check judges."""
        return iter(())

    @abstractmethod
    def tables(self, manifest: Mapping[str, Any]) -> Iterator[TensorTable]:
        """Yield the stored tensors beside those that the manifest lists."""

    def sharding_findings(self, ranks: int) -> Iterator[Finding]:
        """Yield a finding for each weight that `ranks` GPUs cannot split in whole tiles.

        Raises:
            UsageError: none of its codecs has tiles.
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
        """Return the folder of the files with weights.

        Raises:
            InputError: only headers were opened.
        """

    @abstractmethod
    def stamps(self) -> list[Any]:
        """Return plain values that identify the files and change with them."""

    @abstractmethod
    def reader(self) -> FolderReader:
        """Return a reader of the weights' bytes."""

    @abstractmethod
    def originals(
        self, part: SubjectPart, source: Checkpoint, items: Sequence[InventoryItem]
    ) -> SourceWeights:
        """Find the originals of a part's weights.

        Args:
            part: one of `parts`.
            source: the checkpoint that it was made from.
            items: all weights of the source.

        Raises:
            InputError: the source cannot be converted to this container.
        """

    def beside(self, reader: FolderReader, source: Checkpoint | None) -> Iterator[Finding]:
        """Check the values of tensors that belong to no weight.

        Args:
            reader: of the artifact.
            source: the checkpoint that it was made from, if it is given.
        """
        del reader, source
        yield from ()

    # --- source

    @abstractmethod
    def strangers(self, source: Checkpoint) -> Iterator[Finding]:
        """Yield a finding if sizes show that it was not made from this source."""

    @abstractmethod
    def settings(self, source: Checkpoint) -> SettingsComparison:
        """Compare everything but weights with the source.

        Raises:
            InputError: the source cannot be converted to this container.
        """

    # --- behaviour

    @abstractmethod
    def ask(
        self, engine: Engine | None, threads: int | None, progress: Progress | None = None
    ) -> BehaviourResult:
        """Load it in an engine and ask all questions; `progress` receives these."""

    @abstractmethod
    def prompted(self, threads: int | None) -> list[PromptedArtifact]:
        """Return its models that can be loaded for prompts.

        Raises:
            InputError: there is none.
        """
