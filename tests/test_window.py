"""Works that go through the same bytes side by side: read once, in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patience import PATIENCE
from qwen35.checkpoint.source import FolderReader, Reader, open_folder
from qwen35.errors import TensorError
from qwen35.execution.step_runner import ThreadCrew
from qwen35.execution.window import RangeReader, Window, advance, groups
from qwen35.tensors import StoredTensor, TensorSpec

SIZE = 10_000
DATA = random.Random(0).randbytes(SIZE)


class Source(FolderReader):
    """A file in memory that counts what is read of it."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        begin = tensor.begin + offset
        self.reads.append((begin, begin + len(buffer)))
        buffer[:] = DATA[begin : begin + len(buffer)]


class Watched(Window):
    """A window that notes how much it keeps."""

    most = 0

    def forget(self, file: str, begin: int, end: int) -> None:
        super().forget(file, begin, end)
        self.most = max(self.most, self.nbytes)


def stored(begin: int, end: int, file: str = "f") -> StoredTensor:
    return StoredTensor(TensorSpec(f"{file}[{begin}:{end}]", "U8", (end - begin,)), file, begin)


def work(owner: int, begin: int, end: int, piece: int, seen: dict[int, bytes]) -> RangeReader:
    tensor = stored(begin, end)

    def run(reader: FolderReader) -> Iterator[int]:
        for start in range(begin, end, piece):
            buffer = bytearray(min(piece, end - start))
            reader.read_into(tensor, start - begin, memoryview(buffer))
            seen[owner] = seen.get(owner, b"") + bytes(buffer)
            yield start + len(buffer)

    return RangeReader(owner, "f", begin, end, (0, 0), run)


def never(owner: int) -> bool:
    return False


def fails(owner: int, error: Exception) -> None:
    raise error


@settings(max_examples=60)
@given(pieces=st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_every_byte_is_read_once_and_seen_by_all(pieces: list[int]) -> None:
    source, seen = Source(), dict[int, bytes]()
    window = Watched(source)
    advance([work(i, 0, SIZE, p, seen) for i, p in enumerate(pieces)], window, fails, never)
    assert seen == dict.fromkeys(range(len(pieces)), DATA)
    assert sorted(source.reads)[0][0] == 0
    assert sum(end - begin for begin, end in source.reads) == SIZE
    assert window.most <= 3 * max(pieces)


def test_parts_of_a_stretch_are_served_from_it() -> None:
    """A whole stack for one, its experts one after the other for the other."""
    source, seen = Source(), dict[int, bytes]()
    works = [work(0, 0, SIZE, 300, seen)]
    works += [work(1, begin, begin + 1000, 77, seen) for begin in range(0, SIZE, 1000)]
    (group,) = groups(works)
    advance(group, Window(source), fails, never)
    assert seen == {0: DATA, 1: DATA}
    assert sum(end - begin for begin, end in source.reads) == SIZE


def test_bytes_elsewhere_are_kept_to_the_end() -> None:
    """Scales lie before or behind the weight, in the same file: read once all the same."""
    source = Source()
    tensor, scales = stored(1000, 2000), stored(0, 50)

    def run(reader: FolderReader) -> Iterator[int]:
        for start in range(0, 1000, 100):
            reader.read_into(scales, 0, memoryview(bytearray(50)))
            reader.read_into(tensor, start, memoryview(bytearray(100)))
            yield 1000 + start + 100

    advance(
        [RangeReader(i, "f", 1000, 2000, (0, 0), run) for i in range(3)],
        Window(source),
        fails,
        never,
    )
    assert sum(end - begin for begin, end in source.reads) == 1050


def test_groups_join_what_overlaps() -> None:
    def one(file: str, begin: int, end: int) -> RangeReader:
        return RangeReader(0, file, begin, end, (0, 0), lambda _: iter(()))

    works = [one("b", 0, 5), one("a", 5, 9), one("a", 0, 5), one("a", 2, 4), one("a", 8, 12)]
    spans = [[(w.file, w.begin, w.end) for w in group] for group in groups(works)]
    assert spans == [
        [("a", 0, 5), ("a", 2, 4)],
        [("a", 5, 9), ("a", 8, 12)],
        [("b", 0, 5)],
    ]


def test_one_failure_does_not_stop_the_others() -> None:
    source, seen = Source(), dict[int, bytes]()
    told: dict[int, Exception] = {}

    def run(reader: FolderReader) -> Iterator[int]:
        yield 500
        raise TensorError("w", "holds NaN or infinity")

    bad = RangeReader(1, "f", 0, SIZE, (0, 0), run)
    works = [work(0, 0, SIZE, 100, seen), bad, work(2, 0, SIZE, 90, seen)]
    advance(works, Window(source), told.__setitem__, lambda owner: owner in told)
    assert list(told) == [1]
    assert seen == {0: DATA, 2: DATA}
    advance(works[1:2], Window(source), fails, lambda owner: True)  # nobody wants it any more


def test_a_bug_is_not_swallowed() -> None:
    def run(reader: FolderReader) -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        advance([RangeReader(0, "f", 0, 9, (0, 0), run)], Window(Source()), fails, never)


def test_what_comes_up_at_the_end_is_done_by_all_threads() -> None:
    """Files that are full at once are hashed at once: no thread has gone home."""
    together = Barrier(3)

    def meet() -> None:
        together.wait(PATIENCE)

    def run(reader: FolderReader) -> Iterator[int]:
        yield 9
        for _ in range(3):
            crew.soon(meet)

    crew = ThreadCrew([RangeReader(0, "f", 0, 9, (0, 0), run)], fails, never)
    with ThreadPoolExecutor(3) as pool:
        crew.run(pool, 3, Source())
    assert not together.broken


def test_window_of_a_real_file(tmp_path: Path, dense: Path) -> None:
    checkpoint = open_folder(dense)
    with Reader(checkpoint) as reader:
        window = Window(reader)
        for weight in checkpoint.weights[:5]:
            assert window.read(weight.main) == reader.read(weight.main)
            assert window.read(weight.main) == reader.read(weight.main)
