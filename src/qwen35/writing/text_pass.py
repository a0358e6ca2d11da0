"""Refined codes while a text passes the source: what is encoded when, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from qwen35.planning.hessians import Hessians
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import files_read
from qwen35.planning.step import Step
from qwen35.progress import Progress

__all__ = ["Encode", "TextPass", "Waiting"]

Encode = Callable[[Hessians], None]
"""Encodes, to the disk, the weights whose Hessians are at hand."""


class TextPass(Protocol):
    """A text that passes a source once, and leaves the Hessians of one part of it at a time."""

    @property
    def read_bytes(self) -> int:
        """Tensor bytes that it reads."""

    @property
    def disk_bytes(self) -> int:
        """Bytes that it takes on the disk of the output, beside what it has there."""

    def run(self, awaited: Collection[str], encode: Encode, progress: Progress) -> Plan:
        """Pass the text on from where an interrupted run ended.

        Args:
            awaited: files of Hessians that unfinished weights depend on: if the interrupted run has
                dropped one, the text passes again from the start.
            encode: called after each part of the source; its Hessians are dropped then.
            progress: receives the bytes read.

        Returns:
            The plan of the output with the hash of all Hessians; its tensors are the same.

        Raises:
            InputError: a weight cannot be read, or an input holds NaN.
            OutputError: the disk is full.
        """


class Waiting:
    """Steps that wait for Hessians.

    Args:
        steps: unfinished ones.
        hessians: that will be made.

    Attributes:
        ready: those that wait for none.
    """

    def __init__(self, steps: Iterable[Step], hessians: Hessians) -> None:
        awaited = [(step, files_read(hessians, step)) for step in steps]
        self.ready = [step for step, files in awaited if not files]
        self._left = [(step, files) for step, files in awaited if files]

    @property
    def awaited(self) -> set[str]:
        """The files that the steps wait for."""
        return {name for _, files in self._left for name in files}

    @property
    def steps(self) -> list[Step]:
        """Those that still wait."""
        return [step for step, _ in self._left]

    def taken(self, hessians: Hessians) -> Sequence[Step]:
        """Return the steps that wait no longer now that these Hessians are at hand."""
        files = hessians.files
        taken = [step for step, awaited in self._left if awaited <= files]
        self._left = [(step, awaited) for step, awaited in self._left if not awaited <= files]
        return taken
