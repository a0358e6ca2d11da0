"""Importance matrices: the mean square of every input channel of a matrix over a text.

Reads GGUF files by llama-imatrix and others (``NAME.in_sum2``, ``NAME.counts``), and the older
binary form (``.dat``). Values equal those that llama-quantize uses, bit for bit.
Source: llama.cpp 0c1e5709, ``common/imatrix-loader.cpp`` and ``tools/quantize/quantize.cpp``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen35.array_types import F32
from qwen35.checkpoint.gguf_header import GgufHeader, is_gguf, read_container
from qwen35.checkpoint.gguf_header import GgufTensor as Listed
from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.hub import download_file
from qwen35.checkpoint.open import hub_token
from qwen35.errors import InputError
from qwen35.planning.activations import ANOTHER_MODEL, other_geometry

__all__ = [
    "COUNTS",
    "IMATRIX_NAME",
    "PROVENANCE_KEY",
    "SUMS",
    "Imatrix",
    "imatrix_file",
    "open_imatrix",
    "read_imatrix",
]

IMATRIX_NAME = "imatrix.gguf"
"""The file's name in the folder that `qwen35 calibrate` writes."""

SUMS, COUNTS = ".in_sum2", ".counts"
PROVENANCE_KEY = "qwen35.calibration"
"""Our own key: JSON on how the file was made. Other readers ignore it."""

_BLOCK = re.compile(r"blk\.(\d{1,6})\.", re.ASCII)
_KEY_BYTES = 127
"""llama-quantize cuts the text of a key to this length."""

_MAX_NAME = 4096


@dataclass(frozen=True)
class ImatrixEntry:
    """The entry of one matrix; its values stay in the file until needed.

    Args:
        path: the file.
        begin: offset of the sums.
        width: values per slice.
        divisors: divisor of each slice's sums; 0 for a slice that no token of the text reached,
            whose values are then 1. An ordinary matrix has one slice, a stack of experts one per
            expert.
    """

    path: Path
    begin: int
    width: int
    divisors: F32

    @property
    def size(self) -> int:
        """The number of values."""
        return self.width * len(self.divisors)

    @property
    def unseen(self) -> int:
        """The number of slices that no token of the text reached."""
        return int(np.count_nonzero(self.divisors <= 0))

    def slice(self, number: int, row: int) -> F32:
        """Return the importance of the `row` input channels of one matrix of a stack.

        If no token reached the matrix, or its inputs were all zero, all channels weigh the same:
        encoders could make anything of a weight without importance, and make zeros of it. The older
        form has a single divisor for a whole stack, so `row` may be less than `width`.

        Raises:
            InputError: the file cannot be read, or changed since it was opened.
        """
        divisor = self.divisors[number * row // self.width]
        if divisor <= 0:  # as llama-quantize
            return np.ones(row, np.float32)
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin + 4 * row * number)
                data = file.read(4 * row)
        except OSError as error:
            raise InputError(str(self.path), f"cannot be read ({error.strerror})") from error
        if len(data) != 4 * row:
            raise InputError(str(self.path), "changed while it was read")
        values: F32 = np.frombuffer(data, "<f4") / divisor
        return values if values.any() else np.ones(row, np.float32)

    @property
    def values(self) -> F32:
        """All values, slice by slice."""
        return np.concatenate([self.slice(i, self.width) for i in range(len(self.divisors))])


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Args:
        name: the user's name for the file.
        entries: entries by tensor name.
        dataset: the text it was computed on, if recorded.
        chunks: number of chunks of that text; 0 if not recorded.
        digest: SHA-256 of the file.
        provenance: how `qwen35 calibrate` made the file, with the model's geometry; else empty.
        path: the file, if it was read from one.
    """

    name: str
    entries: Mapping[str, ImatrixEntry]
    dataset: str
    chunks: int
    digest: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def check(self, geometry: Mapping[str, int]) -> None:
        """Check that it belongs to a model with this geometry, as far as the file records it.

        Raises:
            InputError: it belongs to another model.
        """
        difference = other_geometry(self.provenance, geometry)
        if difference is not None:
            found, expected = difference
            raise InputError(self.name, found, expected=expected, hint=ANOTHER_MODEL)
        if "geometry" in self.provenance:  # it may have any number of MTP layers
            return
        last = geometry["layers"]  # the block of an MTP layer, which the model may lack
        for name in self.entries:
            match = _BLOCK.match(name)
            if match and int(match[1]) > last:
                raise InputError(
                    self.name, f"an entry {name}", expected=f"{last} layers", hint=ANOTHER_MODEL
                )

    def keys(self) -> dict[str, str | int]:
        """Return the keys that llama-quantize writes for it, in its order."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": _cut(self.name)}
        if self.dataset:
            keys["quantize.imatrix.dataset"] = _cut(self.dataset)
        keys["quantize.imatrix.entries_count"] = len(self.entries)
        if self.chunks > 0:
            keys["quantize.imatrix.chunks_count"] = self.chunks
        return keys


def _cut(text: str) -> str:
    """Truncate as llama-quantize does, but never within a character."""
    return text.encode()[:_KEY_BYTES].decode(errors="ignore")


def open_imatrix(name: str, token: str | None = None) -> Imatrix:
    """Read an importance matrix from a file, `qwen35 calibrate`'s folder or ``hf:owner/name/path``.

    Raises:
        InputError: the file is not an importance matrix, or the folder holds none.
        HubError: the Hub refused, or could not be reached.
    """
    if name.startswith("hf:"):
        path = download_file(name.removeprefix("hf:"), hub_token(token))
        return read_imatrix(path, name=name)
    given = Path(name)
    path = imatrix_file(given)
    # the file's name goes into the outputs: folder and file give the same bytes
    return read_imatrix(path, name=name if path == given else str(path))


def imatrix_file(path: Path) -> Path:
    """Return the importance matrix in a folder of `qwen35 calibrate`, or `path` if it is no folder.

    Raises:
        InputError: the folder holds none.
    """
    if not path.is_dir():
        return path
    file = path / IMATRIX_NAME
    if not file.is_file():
        raise InputError(
            str(path),
            f"a folder without {IMATRIX_NAME}",
            expected="an importance matrix, or the folder that `qwen35 calibrate` wrote",
        )
    return file


def read_imatrix(path: Path, *, name: str = "") -> Imatrix:
    """Read an importance matrix of either form.

    Args:
        path: the file.
        name: the user's name for it; the path if empty.

    Raises:
        InputError: the file is not an importance matrix, or holds values that cannot be mean
            squares.
    """
    if path.exists() and not path.is_file():
        raise InputError(str(path), "not a file", expected="an importance matrix")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error
    read = _from_gguf if is_gguf(path) else _from_dat
    entries, dataset, chunks, provenance = read(path)
    # Checked completely now: a bad value found while encoding would cost the whole run.
    for key, entry in entries.items():
        for i in range(len(entry.divisors)):
            values = entry.slice(i, entry.width)
            if not np.isfinite(values).all() or (values < 0).any():
                raise InputError(str(path), f"{key} holds values that cannot be mean squares")
    return Imatrix(name or str(path), entries, dataset, chunks, digest, provenance, path)


_Contents = tuple[dict[str, ImatrixEntry], str, int, Mapping[str, Any]]


def _from_gguf(path: Path) -> _Contents:
    container = read_container(path)
    keys = container.keys
    required = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    missing = [key for key in required if key not in keys]
    if missing:
        raise InputError(str(path), f"no {missing[0]} in it", expected="an importance matrix")
    entries = {}
    names = {key.removesuffix(SUMS).removesuffix(COUNTS): None for key in container.tensors}
    for name in names:
        sums, counts = (_tensor(container, name + suffix) for suffix in (SUMS, COUNTS))
        size, slices = prod(sums.shape), prod(counts.shape)
        if size % slices:
            raise InputError(str(path), f"{size} sums and {slices} counts for {name}")
        with path.open("rb") as file:
            file.seek(counts.begin)
            divisors = np.rint(np.frombuffer(file.read(counts.nbytes), "<f4"))
        entries[name] = ImatrixEntry(path, sums.begin, size // slices, divisors)
    if not entries:
        raise InputError(str(path), "no entries in it")
    datasets = keys["imatrix.datasets"]
    first = datasets[0] if isinstance(datasets, list) and datasets else ""
    chunks = keys["imatrix.chunk_count"]
    if type(chunks) is not int:
        raise InputError(str(path), f"imatrix.chunk_count {str(chunks)[:80]!r}", expected="a count")
    text = str(keys.get(PROVENANCE_KEY, "{}"))
    provenance = strict_json(text.encode(), f"{PROVENANCE_KEY} of {path.name}")
    if not isinstance(provenance, dict):
        raise InputError(str(path), f"a malformed {PROVENANCE_KEY}")
    return entries, str(first), chunks, provenance


def _tensor(container: GgufHeader, name: str) -> Listed:
    entry = container.tensors.get(name)
    if entry is None or entry.kind.name != "f32":
        found = entry.kind.name if entry else "missing"
        raise InputError(container.path.name, f"{name} is {found}", expected="f32")
    return entry


def _from_dat(path: Path) -> _Contents:
    with path.open("rb") as file:
        reader = _Dat(file, path)
        entries = dict(reader.entries())
        dataset, chunks = reader.trailer()
    return entries, dataset, chunks, {}


class _Dat:
    """The older form: counted records of (name, calls, values), then chunks and dataset."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = path.stat().st_size

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= self._left:  # before reading: a hostile count could exhaust memory
            raise InputError(
                str(self._path), "ends too early", expected="an importance matrix, GGUF or .dat"
            )
        self._left -= count
        return self._file.read(count)

    def _number(self, most: int) -> int:
        (value,) = struct.unpack("<i", self._take(4))
        if not 0 <= value <= most:
            raise InputError(
                str(self._path), f"a count of {value}", expected="an importance matrix"
            )
        return int(value)

    def entries(self) -> Iterator[tuple[str, ImatrixEntry]]:
        count = self._number(self._left)
        if count == 0:
            raise InputError(str(self._path), "no entries in it")
        for _ in range(count):
            name = self._take(self._number(_MAX_NAME)).decode(errors="replace")
            calls = self._number(2**31 - 1)
            size = self._number(self._left // 4)
            if size == 0:
                raise InputError(str(self._path), f"no values for {name[:80]!r}")
            begin = self._file.tell()
            self._take(4 * size)
            yield name, ImatrixEntry(self._path, begin, size, np.array([calls or 1], np.float32))

    def trailer(self) -> tuple[str, int]:
        if self._left < 8:
            return "", self._number(2**31 - 1) if self._left >= 4 else 0
        chunks = self._number(2**31 - 1)
        return self._take(self._number(self._left)).decode(errors="replace"), chunks
