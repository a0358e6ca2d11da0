"""An artifact that exists but cannot be opened: its check is one finding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Checkpoint, FolderReader
from qwen35.errors import Finding, InputError
from qwen35.progress import Progress
from qwen35.verification.asking_prompts import PromptedArtifact
from qwen35.verification.behaviour import BehaviourResult
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.subject import Engine, SourceWeights, Subject, SubjectPart, TensorTable

__all__ = ["Unreadable"]


class Unreadable(Subject):
    """An artifact that cannot be opened.

    Args:
        name: as the user gave it.
        error: why it cannot be opened.
    """

    suffix = ""

    def __init__(self, name: str, error: InputError) -> None:
        super().__init__(name, None)
        self._error = error

    @classmethod
    def find(cls, name: str, token: str | None) -> Any:
        """Return None: this is not a container."""
        del name, token

    @classmethod
    def refuse(cls, engine: Engine | None, tensor_parallel: int | None) -> None:
        """Refuse nothing."""

    @classmethod
    def open(cls, name: str, found: Any, *, weights: bool, token: str | None) -> Subject:
        """Return an unreadable artifact."""
        del weights, token
        return cls(name, found)

    @property
    def kind(self) -> str:
        """The word for reports."""
        return "unreadable"

    @property
    def vision(self) -> bool:
        """Unknown, hence False."""
        return False

    @property
    def files(self) -> Sequence[str]:
        """No files."""
        return ()

    def structure(self) -> Iterator[Finding]:
        """Yield why it cannot be opened."""
        yield Finding("readable", self._error.subject, self._error.message)

    def tables(self, manifest: Mapping[str, Any]) -> Iterator[TensorTable]:
        """Yield nothing."""
        del manifest
        yield from ()

    @property
    def parts(self) -> Sequence[SubjectPart]:
        """No weights."""
        return ()

    def folder(self) -> Path:
        """Raise the error."""
        raise self._error

    def stamps(self) -> list[Any]:
        """Return its name; no result is ever remembered under it."""
        return [self.name]

    def reader(self) -> FolderReader:
        """Raise the error."""
        raise self._error

    def originals(
        self, part: SubjectPart, source: Checkpoint, items: Sequence[InventoryItem]
    ) -> SourceWeights:
        """Return nothing."""
        del part, source, items
        return SourceWeights({})

    def strangers(self, source: Checkpoint) -> Iterator[Finding]:
        """Yield nothing."""
        del source
        yield from ()

    def settings(self, source: Checkpoint) -> SettingsComparison:
        """Compare nothing."""
        del source
        return SettingsComparison()

    def ask(
        self, engine: Engine | None, threads: int | None, progress: Progress | None = None
    ) -> BehaviourResult:
        """Ask nothing."""
        del engine, threads, progress
        return BehaviourResult()

    def prompted(self, threads: int | None) -> list[PromptedArtifact]:
        """Refuse: there is no model."""
        del threads
        raise InputError(self.name, "cannot be read", hint="qwen35 verify says why")
