"""One read for several readers: works that go through the same bytes side by side.

Every work advances piece by piece; the one that is furthest behind goes next. So all of them stay
within about a piece of each other, and what the first has read is kept for the others until the
last has passed: memory is a few pieces, whatever the size of the weight.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qwen35.checkpoint.source import FolderReader
from qwen35.errors import Qwen35Error
from qwen35.tensors import StoredTensor

__all__ = ["RangeReader", "Window", "advance", "groups"]


@dataclass(frozen=True)
class RangeReader:
    """Something to be done with a stretch of a source file.

    Args:
        owner: whose it is; what goes wrong with one owner's work does not stop the others'.
        file: the file.
        begin: first byte.
        end: the byte behind the last.
        rank: of its output file among those of the same output; lower ones are begun first.
        run: does it; yields after each piece how far into the file it has read.
    """

    owner: int
    file: str
    begin: int
    end: int
    rank: int
    run: Callable[[FolderReader], Iterator[int]]


def groups(works: Sequence[RangeReader]) -> list[list[RangeReader]]:
    """Join works whose stretches overlap; groups are in the order of the files."""
    made: list[list[RangeReader]] = []
    file, end = "", 0
    for work in sorted(works, key=lambda work: (work.file, work.begin, -work.end)):
        if made and work.file == file and work.begin < end:
            made[-1].append(work)
            end = max(end, work.end)
        else:
            made.append([work])
            file, end = work.file, work.end
    return made


@dataclass
class _Chunk:
    file: str
    begin: int
    data: bytearray

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


class Window(FolderReader):
    """A reader that keeps what it has read until told that nobody needs it; for one thread."""

    def __init__(self, source: FolderReader) -> None:
        self._source = source
        self._chunks: list[_Chunk] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(len(chunk.data) for chunk in self._chunks)

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `tensor` from `offset` on.

        Raises:
            TensorError: the file ends before, or cannot be read.
        """
        position, end = tensor.begin + offset, tensor.begin + offset + len(buffer)
        done = 0
        while position < end:
            chunk = self._chunk(tensor, position, end)
            start = position - chunk.begin
            count = min(len(chunk.data) - start, end - position)
            buffer[done : done + count] = memoryview(chunk.data)[start : start + count]
            position += count
            done += count

    def _chunk(self, tensor: StoredTensor, position: int, end: int) -> _Chunk:
        """Return the chunk that holds the byte at `position`, read from the file if need be."""
        for chunk in self._chunks:
            if chunk.file == tensor.file:
                if chunk.begin <= position < chunk.end:
                    return chunk
                if position < chunk.begin < end:
                    end = chunk.begin
        made = _Chunk(tensor.file, position, bytearray(end - position))
        self._source.read_into(tensor, position - tensor.begin, memoryview(made.data))
        self._chunks.append(made)
        return made

    def forget(self, file: str, begin: int, end: int) -> None:
        """Drop what lies wholly within these bytes of a file."""
        self._chunks = [c for c in self._chunks if c.file != file or c.begin < begin or c.end > end]


def advance(
    works: Sequence[RangeReader],
    source: FolderReader,
    failed: Callable[[int, Qwen35Error], None],
    stopped: Callable[[int], bool],
) -> None:
    """Run the works of one group side by side.

    Args:
        works: a group of `groups`.
        source: what they read; one that is alone reads it directly.
        failed: told the owner of a work that raised one of our errors; the work ends.
        stopped: whether an owner's works are no longer wanted.
    """
    window = Window(source) if len(works) > 1 else None
    running = [(work.begin, i, work.run(window or source)) for i, work in enumerate(works)]
    heapq.heapify(running)
    first = works[0].begin
    while running:
        _, i, pieces = heapq.heappop(running)
        work = works[i]
        if stopped(work.owner):
            continue
        try:
            position = next(pieces, None)
        except Qwen35Error as error:
            failed(work.owner, error)
            continue
        if position is not None:
            heapq.heappush(running, (position, i, pieces))
        if running and window is not None:
            window.forget(work.file, first, running[0][0])
