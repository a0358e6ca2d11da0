"""Parse and validate the header of GGUF files.

Format: magic, version, tensor count, key count, keys with typed values, one record per tensor
(name, sizes, type, offset), padding, data. All numbers are little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The reader of the `gguf` library trusts every count in the file and maps the file into memory; this
one enforces limits and reports each violation of the format.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.open import GgufFiles
from qwen35.codecs.ggml.codec import BlockSpec, codec_name
from qwen35.codecs.ggml.types import GGML_TYPES, GgmlType
from qwen35.codecs.registry import CODECS
from qwen35.errors import HeaderError, InputError
from qwen35.tensors import StoredTensor, Weight

__all__ = [
    "LORA_A",
    "LORA_ALPHA",
    "LORA_B",
    "MAGIC",
    "GgufHeader",
    "GgufTensor",
    "is_adapter",
    "is_draft",
    "is_gguf",
    "read_container",
    "read_gguf",
    "weights_of",
]

MAGIC = b"GGUF"
LORA_ALPHA, LORA_A, LORA_B = "adapter.lora.alpha", ".lora_a", ".lora_b"
"""An adapter's key, and what its tensors have after the names of the weights that they change."""

_ALIGNMENT, _DEFAULT_ALIGNMENT = "general.alignment", 32
_VERSIONS = (2, 3)
# Far above real files; they bound time and memory on hostile ones.
_MAX_KEYS = 100_000
_MAX_TENSORS = 1_000_000
_MAX_ITEMS = 10_000_000
_MAX_STRING = 64 * 2**20
_MAX_HEAD = 2**30
_MAX_NAME = 127
_MAX_RANK = 4  # GGML_MAX_DIMS
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
_FIRST_CHUNK = 256 * 1024
_READ_AHEAD = 64 * 1024  # records are tens of bytes: one read() each would dominate
_LENGTH = struct.Struct("<Q")
_BY_CODE = {kind.code: kind for kind in GGML_TYPES.values()}


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor record.

    Args:
        name: its name.
        kind: its ggml type.
        shape: dimensions, outermost first.
        begin: absolute offset of its first byte.
        file: the file that holds it; empty for that of the header.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    begin: int
    file: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.kind.size(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """A validated header; of a split model, that of its first file with the tensors of all.

    Args:
        path: the file; only its name for a file on the Hub.
        nbytes: size of the file, or of all files, in bytes.
        keys: metadata values by key; arrays are lists.
        tensors: tensors by name, in file order.
        spans: absolute begin and end of each key's value, without its type.
        records: absolute end of the tensor records.
        data: absolute offset of the tensors' data, after padding.
        others: the names of a split model's other files.
    """

    path: Path
    nbytes: int
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    records: int = 0
    data: int = 0
    others: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        return self.path.name, *self.others

    def labelled(self, tensor: str) -> str:
        """Return a tensor's name after that of its file; the first file for one that is missing."""
        entry = self.tensors.get(tensor)
        return f"{(entry.file if entry else '') or self.path.name}: {tensor}"

    @property
    def alignment(self) -> int:
        """What offsets of tensors are multiples of, in bytes."""
        alignment: int = self.keys.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        return alignment

    @property
    def architecture(self) -> str:
        """Value of ``general.architecture``, or an empty string."""
        return str(self.keys.get("general.architecture", ""))

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, and no model."""
        return self.keys.get("general.type") == "adapter"

    @property
    def mtp_alone(self) -> bool:
        """Whether it holds the multi-token-prediction layer without the layers before it."""
        blocks = self.keys.get(f"{self.architecture}.block_count")
        joined = f"blk.{blocks - 1}.nextn.eh_proj.weight" if type(blocks) is int else ""
        return joined in self.tensors and not any(n.startswith("blk.0.") for n in self.tensors)


def weights_of(container: GgufHeader) -> list[Weight]:
    """Group the tensors of a file into weights: some types have scales in tensors beside them."""
    stored = {
        name: StoredTensor(
            BlockSpec(name, t.kind.name, t.shape), t.file or container.path.name, t.begin
        )
        for name, t in container.tensors.items()
    }
    beside = {
        name: CODECS[codec_name(one.spec.dtype)].companions(stored, name) or ()
        for name, one in stored.items()
    }
    taken = {name for names in beside.values() for name in names}
    return [
        Weight(name, codec_name(one.spec.dtype), (one, *(stored[part] for part in beside[name])))
        for name, one in stored.items()
        if name not in taken
    ]


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a file that starts with the GGUF magic."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def is_adapter(path: Path) -> bool:
    """Return whether a file is named as an adapter, and is one.

    Raises:
        InputError: the file is named so, but cannot be read.
    """
    return path.name.endswith("-LoRA.gguf") and read_container(path).is_adapter


def is_draft(path: Path) -> bool:
    """Return whether a file is named as an MTP layer alone, and is one.

    Raises:
        InputError: the file is named so, but cannot be read.
    """
    return path.name.startswith("mtp-") and read_container(path).mtp_alone


def read_container(path: Path) -> GgufHeader:
    """Read and validate the header of a GGUF file.

    Raises:
        HeaderError: the header violates the format.
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _Parser(file, path, path.stat().st_size).parse()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error


def read_gguf(files: GgufFiles, name: str) -> GgufHeader:
    """Read and validate the header of one of `files`; from the Hub, without the tensor data.

    Raises:
        HeaderError: the header violates the format.
        HubError: the Hub refused a request or could not be reached.
        InputError: the file is missing or cannot be read.
    """
    if files.root is not None:
        return read_container(files.root / name)
    size = files.place.sizes().get(name)
    if size is None:
        raise InputError(f"{files.place}, {name}", "no such file")
    return _Parser(_RemoteFile(files.place, name, size), Path(name), size).parse()


class _RemoteFile:
    """Sequential reads of a remote file, fetched in growing chunks."""

    def __init__(self, place: FileLocation, name: str, size: int) -> None:
        self._place, self._name, self._size = place, name, size
        self._fetched = b""
        self._begin = self._position = 0

    def read(self, count: int) -> bytes:
        at = self._position - self._begin
        if at + count > len(self._fetched):
            # Doubling keeps the number of requests logarithmic in the header's size.
            length = max(count, _FIRST_CHUNK, self._position)
            length = min(length, self._size - self._position)
            self._fetched = self._place.read(self._name, self._position, length)
            self._begin, at = self._position, 0
        self._position += count
        return self._fetched[at : at + count]


class _Parser:
    """Parses a header front to back and checks every count against the bytes left."""

    def __init__(self, file: _Readable, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._limit = min(self._size, _MAX_HEAD)
        self._buffer = b""
        self._begin = self._at = 0

    @property
    def _position(self) -> int:
        """Absolute offset of the next byte."""
        return self._begin + self._at

    @property
    def _left(self) -> int:
        """Number of bytes that may still belong to the header."""
        return self._limit - self._position

    def parse(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._error("does not begin with GGUF", expected="a GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._error(f"version {version}", expected="2 or 3, little-endian")
        # Name length 8, rank 4, type 4, offset 8; key length 8, type 4, at least one byte of value.
        tensors = self._count(_MAX_TENSORS, "tensors", min_bytes=24)
        count = self._count(_MAX_KEYS, "keys", min_bytes=13)
        keys: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            key = self._string()
            if key in keys:
                raise self._error(f"key {key[:80]!r} twice")
            kind, begin = self._number("I"), self._position
            keys[key] = self._value(kind, depth=0)
            spans[key] = begin, self._position
        entries = [self._entry() for _ in range(tensors)]
        alignment = self._alignment(keys)
        end = self._position
        data = end + -end % alignment
        placed = self._with_offsets(entries, data, alignment)
        return GgufHeader(self._path, self._size, keys, placed, spans, end, data)

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
        """Refill the buffer so that it starts with the next `count` bytes."""
        if count > self._left:
            raise self._error(
                f"ends within its head ({self._size} bytes)",
                hint="the file is truncated or damaged: write or download it again",
            )
        rest = self._buffer[self._at :]
        length = min(max(count, _READ_AHEAD), self._left) - len(rest)
        data = self._file.read(length)
        if len(data) != length:
            raise self._error("changed while it was read")
        self._begin += self._at
        self._buffer, self._at = rest + data, 0

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, limit: int, items: str, *, min_bytes: int) -> int:
        """Read a count of `items` that occupy at least `min_bytes` each."""
        count = int(self._number("Q"))
        if count > limit or count * min_bytes > self._left:
            raise self._error(f"declares {count} {items} in {self._size} bytes")
        return count

    def _string(self) -> str:
        # Inlined _number() and _take(): vocabularies hold hundreds of thousands of strings.
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
        count = self._count(_MAX_ITEMS, "array items", min_bytes=width)
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * width)))
        if item == _STRING:
            return [self._string() for _ in range(count)]
        return [self._value(item, depth=depth + 1) for _ in range(count)]

    def _entry(self) -> GgufTensor:
        """Read a tensor record; its offset is relative to the data section."""
        name = self._string()
        if not name or len(name.encode()) > _MAX_NAME:
            raise self._error(f"tensor name {name[:80]!r}")
        rank = self._number("I")
        if not 1 <= rank <= _MAX_RANK:
            raise self._error(f"tensor {name!r} of {rank} dimensions", expected="1 to 4")
        # ggml lists the innermost dimension first.
        shape = tuple(reversed([int(self._number("Q")) for _ in range(rank)]))
        code, offset = self._number("I"), int(self._number("Q"))
        kind = _BY_CODE.get(code)
        if kind is None:
            raise self._error(f"tensor {name!r} of type {code}", expected="a type of ggml")
        # Bounded, so that byte counts and offsets stay far below 2**63.
        if not all(0 < size < 2**48 for size in shape) or prod(shape) >= 2**48:
            raise self._error(f"tensor {name!r} of shape {list(shape)}")
        if shape[-1] % kind.block:
            raise self._error(
                f"tensor {name!r} with rows of {shape[-1]}",
                expected=f"a multiple of {kind.block} for {kind.name}",
            )
        return GgufTensor(name, kind, shape, offset)

    def _alignment(self, keys: Mapping[str, Any]) -> int:
        alignment = keys.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & alignment - 1:
            raise self._error(f"{_ALIGNMENT} {alignment!r}", expected="a power of two")
        return alignment

    def _with_offsets(
        self, entries: list[GgufTensor], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Check that the tensors follow each other without gaps; make their offsets absolute."""
        tensors: dict[str, GgufTensor] = {}
        position = 0
        for entry in entries:
            if entry.name in tensors:
                raise self._error(f"tensor {entry.name!r} twice")
            if entry.begin != position:
                raise self._error(
                    f"tensor {entry.name!r} at offset {entry.begin}", expected=str(position)
                )
            tensors[entry.name] = GgufTensor(entry.name, entry.kind, entry.shape, start + position)
            position += entry.nbytes + -entry.nbytes % alignment
        if entries and start + position > self._size:
            raise self._error(
                f"{self._size} bytes long",
                expected=f"{start + position} by its head",
                hint="the file is truncated: write or download it again",
            )
        return tensors
