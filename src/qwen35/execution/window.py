"""Share reads: several readers go through the same bytes side by side.

Readers advance piece by piece, the one furthest behind first. So they stay within about a piece of
each other, and bytes are kept only until the last reader has passed them: memory is a few pieces,
whatever the size of the weight.
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
    """Reads a byte range of a source file for one output.

    Args:
        owner: number of the output; an error of one owner does not stop the others.
        file: the source file.
        begin: first byte.
        end: one past the last byte.
        rank: position of the output file in its output, and of the tensor in that file; lower ranks
            start first.
        run: reads the range; yields its position in the file after each piece.
    """

    owner: int
    file: str
    begin: int
    end: int
    rank: tuple[int, int]
    run: Callable[[FolderReader], Iterator[int]]


def groups(readers: Sequence[RangeReader]) -> list[list[RangeReader]]:
    """Group readers whose ranges overlap; return the groups in file order."""
    result: list[list[RangeReader]] = []
    file, end = "", 0
    for reader in sorted(readers, key=lambda reader: (reader.file, reader.begin, -reader.end)):
        if result and reader.file == file and reader.begin < end:
            result[-1].append(reader)
            end = max(end, reader.end)
        else:
            result.append([reader])
            file, end = reader.file, reader.end
    return result


@dataclass
class _Chunk:
    file: str
    begin: int
    data: bytearray

    @property
    def end(self) -> int:
        return self.begin + len(self.data)


class Window(FolderReader):
    """A reader that caches what it reads until `forget`; for a single thread."""

    def __init__(self, source: FolderReader) -> None:
        self._source = source
        self._chunks: list[_Chunk] = []

    @property
    def nbytes(self) -> int:
        """Bytes in the cache."""
        return sum(len(chunk.data) for chunk in self._chunks)

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `tensor` from `offset` on.

        Raises:
            TensorError: the file is too short or cannot be read.
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
        """Return the chunk that holds the byte at `position`; read it if it is not cached."""
        for chunk in self._chunks:
            if chunk.file == tensor.file:
                if chunk.begin <= position < chunk.end:
                    return chunk
                if position < chunk.begin < end:
                    end = chunk.begin  # read only up to the next cached byte
        added = _Chunk(tensor.file, position, bytearray(end - position))
        self._source.read_into(tensor, position - tensor.begin, memoryview(added.data))
        self._chunks.append(added)
        return added

    def forget(self, file: str, begin: int, end: int) -> None:
        """Drop the chunks that lie wholly within these bytes of a file."""
        self._chunks = [c for c in self._chunks if c.file != file or c.begin < begin or c.end > end]


def advance(
    readers: Sequence[RangeReader],
    source: FolderReader,
    failed: Callable[[int, Qwen35Error], None],
    stopped: Callable[[int], bool],
) -> None:
    """Run the readers of one group side by side.

    Args:
        readers: one of `groups`.
        source: reads the bytes; a single reader uses it directly.
        failed: called with the owner of a reader that raised a `Qwen35Error`, and the error.
        stopped: returns whether to skip an owner's readers.
    """
    window = Window(source) if len(readers) > 1 else None
    running = [(reader.begin, i, reader.run(window or source)) for i, reader in enumerate(readers)]
    heapq.heapify(running)  # by position, then number: the third, a generator, is not comparable
    first = readers[0].begin
    while running:
        _, i, pieces = heapq.heappop(running)
        reader = readers[i]
        if stopped(reader.owner):
            continue
        try:
            position = next(pieces, None)
        except Qwen35Error as error:  # anything else is a bug, and ends the run
            failed(reader.owner, error)
            continue
        if position is not None:
            heapq.heappush(running, (position, i, pieces))
        if running and window is not None:
            window.forget(reader.file, first, running[0][0])
