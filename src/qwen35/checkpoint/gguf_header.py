"""The head of a GGUF file, parsed and checked before anything trusts it.

Format: magic, version, counts of tensors and keys, the keys with typed values, a record for each
tensor (name, sizes, type, offset), padding, data. All numbers are little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The `gguf` library's reader takes every count in a file at its word and maps it into memory; this
one reads within limits, and files that break a rule are refused with a sentence.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.open import GgufFiles
from qwen35.codecs.ggml.types import GGML_TYPES, GgmlType
from qwen35.errors import HeaderError, InputError

__all__ = ["MAGIC", "GgufHeader", "GgufTensor", "is_gguf", "read_container", "read_gguf"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 100_000
_MAX_TENSORS = 1_000_000
_MAX_ITEMS = 10_000_000
_MAX_STRING = 64 * 2**20
_MAX_HEAD = 2**30
_MAX_NAME = 127
_MAX_RANK = 4
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_FIRST_PIECE = 256 * 1024
_AHEAD = 64 * 1024
_LENGTH = struct.Struct("<Q")
_BY_CODE = {kind.code: kind for kind in GGML_TYPES.values()}


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as the head lists it.

    Args:
        name: its name.
        kind: its type.
        shape: outermost first.
        begin: absolute offset of its first byte.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.kind.size(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """A checked head.

    Args:
        path: the file; only its name, if it is on the Hub.
        nbytes: its size.
        keys: key to value, arrays as lists.
        tensors: in the order of the file.
    """

    path: Path
    nbytes: int
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What ``general.architecture`` says, or nothing."""
        return str(self.keys.get("general.architecture", ""))


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins like a GGUF file."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_container(path: Path) -> GgufHeader:
    """Read and check the head of a GGUF file.

    Raises:
        HeaderError: any rule of the format is broken.
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _Parser(file, path, path.stat().st_size).parse()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error


def read_gguf(files: GgufFiles, name: str) -> GgufHeader:
    """Read and check the head of one of `files`; on the Hub by ranges, without what follows it.

    Raises:
        HeaderError: any rule of the format is broken.
        HubError: the Hub refused, or was not reached.
        InputError: the file is not there or cannot be read.
    """
    if files.root is not None:
        return read_container(files.root / name)
    size = files.place.sizes().get(name)
    if size is None:
        raise InputError(f"{files.place}, {name}", "no such file")
    return _Parser(_Pieces(files.place, name, size), Path(name), size).parse()


class _Pieces:
    """A file of a place, read from its beginning in pieces that grow as more is wanted."""

    def __init__(self, place: FileLocation, name: str, size: int) -> None:
        self._place, self._name, self._size = place, name, size
        self._fetched = b""
        self._begin = self._position = 0

    def read(self, count: int) -> bytes:
        at = self._position - self._begin
        if at + count > len(self._fetched):
            wanted = max(count, _FIRST_PIECE, self._position)
            wanted = min(wanted, self._size - self._position)
            self._fetched = self._place.read(self._name, self._position, wanted)
            self._begin, at = self._position, 0
        self._position += count
        return self._fetched[at : at + count]


class _Parser:
    """Reads a head from the beginning; knows how much of the file is left."""

    def __init__(self, file: _Readable, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._limit = min(self._size, _MAX_HEAD)
        self._buffer = b""
        self._begin = self._at = 0

    @property
    def _left(self) -> int:
        """Bytes that may still belong to the head."""
        return self._limit - self._begin - self._at

    def parse(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._error("does not begin with GGUF", expected="a GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._error(f"version {version}", expected="2 or 3, little-endian")
        tensors = self._count(_MAX_TENSORS, "tensors", least=24)
        count = self._count(_MAX_KEYS, "keys", least=13)
        keys: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in keys:
                raise self._error(f"key {key[:80]!r} twice")
            keys[key] = self._value(self._number("I"), depth=0)
        entries = [self._entry() for _ in range(tensors)]
        return GgufHeader(self._path, self._size, keys, self._placed(entries, keys))

    def _error(self, found: str, *, expected: str = "", hint: str = "") -> HeaderError:
        return HeaderError(self._path.name, found, expected=expected, hint=hint)

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._buffer):
            self._fill(count)
            end = count
        data = self._buffer[self._at : end]
        self._at = end
        return data

    def _fill(self, count: int) -> None:
        """Read on, so that `count` bytes and as a rule many more are at the buffer's beginning."""
        if count > self._left:
            raise self._error(
                f"ends within its head ({self._size} bytes)",
                hint="the file is truncated or damaged: write or download it again",
            )
        rest = self._buffer[self._at :]
        wanted = min(max(count, _AHEAD), self._left) - len(rest)
        data = self._file.read(wanted)
        if len(data) != wanted:
            raise self._error("changed while it was read")
        self._begin += self._at
        self._buffer, self._at = rest + data, 0

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, limit: int, what: str, *, least: int) -> int:
        """Read a count of things that take `least` bytes each."""
        count = int(self._number("Q"))
        if count > limit or count * least > self._left:
            raise self._error(f"promises {count} {what} in {self._size} bytes")
        return count

    def _string(self) -> str:
        if self._at + 8 > len(self._buffer):
            self._fill(8)
        (length,) = _LENGTH.unpack_from(self._buffer, self._at)
        self._at += 8
        if length > _MAX_STRING:
            raise self._error(f"a string of {length} bytes", expected=f"at most {_MAX_STRING}")
        return self._take(length).decode("utf-8", errors="replace")

    def _value(self, code: int, *, depth: int) -> Any:
        if code in _SCALARS:
            return self._number(_SCALARS[code])
        if code == _STRING:
            return self._string()
        if code != _ARRAY or depth > 2:
            raise self._error(f"value type {code}", expected="0 to 12, arrays three deep at most")
        item = self._number("I")
        width = struct.calcsize(f"<{_SCALARS[item]}") if item in _SCALARS else 8
        count = self._count(_MAX_ITEMS, "array items", least=width)
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * width)))
        if item == _STRING:
            return [self._string() for _ in range(count)]
        return [self._value(item, depth=depth + 1) for _ in range(count)]

    def _entry(self) -> GgufTensor:
        """Read a tensor's record; its offset is still relative to the data."""
        name = self._string()
        if not name or len(name.encode()) > _MAX_NAME:
            raise self._error(f"tensor name {name[:80]!r}")
        rank = self._number("I")
        if not 1 <= rank <= _MAX_RANK:
            raise self._error(f"tensor {name!r} of {rank} dimensions", expected="1 to 4")
        shape = tuple(reversed([int(self._number("Q")) for _ in range(rank)]))
        code, offset = self._number("I"), int(self._number("Q"))
        kind = _BY_CODE.get(code)
        if kind is None:
            raise self._error(f"tensor {name!r} of type {code}", expected="a type of ggml")
        if not all(0 < size < 2**48 for size in shape) or prod(shape) >= 2**48:
            raise self._error(f"tensor {name!r} of shape {list(shape)}")
        if shape[-1] % kind.block:
            raise self._error(
                f"tensor {name!r} with rows of {shape[-1]}",
                expected=f"a multiple of {kind.block} for {kind.name}",
            )
        return GgufTensor(name, kind, shape, offset)

    def _placed(self, entries: list[GgufTensor], keys: Mapping[str, Any]) -> dict[str, GgufTensor]:
        """Check that the data holds the tensors one after the other; make offsets absolute."""
        alignment = keys.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & alignment - 1:
            raise self._error(f"general.alignment {alignment!r}", expected="a power of two")
        done = self._begin + self._at
        start = done + -done % alignment
        placed: dict[str, GgufTensor] = {}
        position = 0
        for entry in entries:
            if entry.name in placed:
                raise self._error(f"tensor {entry.name!r} twice")
            if entry.begin != position:
                raise self._error(
                    f"tensor {entry.name!r} at offset {entry.begin}", expected=str(position)
                )
            placed[entry.name] = GgufTensor(entry.name, entry.kind, entry.shape, start + position)
            position += entry.nbytes + -entry.nbytes % alignment
        if entries and start + position > self._size:
            raise self._error(
                f"{self._size} bytes long",
                expected=f"{start + position} by its head",
                hint="the file is truncated: write or download it again",
            )
        return placed
