"""Activation statistics: how large each input channel of a weight was in a forward pass.

The file is one JSON object, ``{weight name: {"input_channel_max": [a number per column]}}``.
`qwen35 calibrate` and `qwen35-collect-activation-stats` add to each weight
``input_channel_mean_square``, in the same form, and ``tokens``, the number of tokens seen. The
former also adds ``cache_max`` to ``k_proj`` and ``v_proj``: the largest magnitude of the keys
(after their norm and the rotary embedding) and values that enter a KV cache. Their entry
``__metadata__`` records how the file was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.errors import InputError, TensorError
from qwen35.model.roles import Role, role_of

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = [
    "ANOTHER_MODEL",
    "CACHE_LARGEST",
    "LARGEST",
    "PROVENANCE",
    "SQUARES",
    "TOKENS",
    "Activations",
    "Key",
    "load_activations",
    "other_geometry",
]

LARGEST, SQUARES, TOKENS = "input_channel_max", "input_channel_mean_square", "tokens"
CACHE_LARGEST = "cache_max"
PROVENANCE = "__metadata__"
ANOTHER_MODEL = "these are statistics of another model: collect them from this one"
# Bounds for hostile files, far above any real ones: a line holds one weight's columns.
MAX_BYTES = 2**30
MAX_LINE = 2**26
_LINE_FORMAT = b"{\n" + json.dumps(PROVENANCE).encode()
"""First bytes of the files we write, which hold one weight per line."""

Key = tuple[str, int | None, int | None]
"""Role, layer and expert. Names would not do: one weight has several, by prefix."""


@dataclass(frozen=True)
class Activations:
    """Per-column statistics of the inputs of weights.

    Args:
        name: file name.
        sha256: hash of the file.
        columns: per weight, the largest magnitudes: [columns] float32, non-negative.
        squares: per weight, the mean squares, where the file has them.
        provenance: how the file was made, if it says so.
        path: the file, if the statistics were read from one.
        cached: per ``k_proj`` and ``v_proj``, the largest magnitude in a KV cache, where the file
            has it.
    """

    name: str
    sha256: str
    columns: Mapping[Key, F32]
    squares: Mapping[Key, F32] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    cached: Mapping[Key, float] = field(default_factory=dict)

    def weights(self, role: Role, mode: str) -> F32 | None:
        """Return how much an error in each column of a weight matters; None if unknown.

        Mode ``search`` weighs by mean squares if available: to first order, the squared error of an
        output is the sum over columns of (weight error)^2 x^2. The other modes are documented to
        use the largest magnitudes.
        """
        key = role.name, role.layer, role.expert
        squares = self.squares.get(key) if mode == "search" else None
        return self.columns.get(key) if squares is None else squares

    def largest(self, role: Role) -> float | None:
        """Return the largest magnitude of a weight's inputs; None if unknown."""
        columns = self.columns.get((role.name, role.layer, role.expert))
        return None if columns is None else float(columns.max())

    def check(self, items: Sequence[InventoryItem], geometry: Mapping[str, int]) -> None:
        """Check that the statistics belong to the model with the weights `items`.

        Raises:
            InputError: a weight is missing or has a different number of columns, or the file
                records a geometry other than `geometry`.
        """
        difference = other_geometry(self.provenance, geometry)
        if difference is not None:
            raise self._foreign(*difference)
        shapes = {}
        for item in items:
            for part in (item, *item.experts()):
                shapes[part.role.name, part.role.layer, part.role.expert] = part.spec.shape
        for key, values in self.columns.items():
            name = ".".join(str(part) for part in key[1:2] + key[:1] if part is not None)
            if key not in shapes:
                raise self._foreign(f"has {name}, which this model lacks")
            if shapes[key][-1] != len(values):
                found = f"{len(values)} columns for {name}"
                raise self._foreign(found, expected=f"{shapes[key][-1]}")

    def _foreign(self, found: str, expected: str = "") -> InputError:
        return InputError(self.name, found, expected=expected, hint=ANOTHER_MODEL)

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user of the file."""
        below = self.provenance.get("experts_below_floor")
        if not below:
            return ()
        floor = self.provenance.get("floor")
        return (
            f"{self.name} saw fewer than {floor} tokens for {below} experts, which were filled up "
            "from the average of their layer",
        )


def other_geometry(
    provenance: Mapping[str, Any], geometry: Mapping[str, int]
) -> tuple[str, str] | None:
    """Return the recorded and the expected geometry as text; None if they agree.

    Args:
        provenance: how the statistics were made; files from other tools record no geometry.
        geometry: `ModelConfig.geometry`.
    """
    theirs = provenance.get("geometry")
    if not isinstance(theirs, dict) or theirs == dict(geometry):
        return None
    names = [name for name in {**theirs, **geometry} if theirs.get(name) != geometry.get(name)]
    found, expected = (", ".join(f"{n} {g.get(n)}" for n in names[:3]) for g in (theirs, geometry))
    return f"of a model with {found}"[:200], expected


def load_activations(path: Path) -> Activations:
    """Read a statistics file.

    Raises:
        InputError: the file cannot be read or is malformed.
    """
    provenance: Any = {}
    columns: dict[Key, F32] = {}
    squares: dict[Key, F32] = {}
    cached: dict[Key, float] = {}
    try:
        if path.exists() and not path.is_file():
            raise InputError(str(path), "not a file")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            for name, entry in _entries(file, path):
                if name == PROVENANCE:
                    provenance = entry
                    continue
                role = _role(path.name, name)
                key = role.name, role.layer, role.expert
                if key in columns:
                    raise InputError(path.name, f"names {name} twice", hint="under two prefixes")
                columns[key] = _values(path.name, name, entry, LARGEST)
                if SQUARES in entry:
                    squares[key] = _squares(path.name, name, entry, len(columns[key]))
                if CACHE_LARGEST in entry:
                    one = {CACHE_LARGEST: [entry[CACHE_LARGEST]]}
                    cached[key] = float(_values(path.name, name, one, CACHE_LARGEST)[0])
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error
    if not isinstance(provenance, dict) or not columns:
        raise _malformed(path)
    return Activations(path.name, digest, columns, squares, provenance, path, cached)


def _malformed(path: Path) -> InputError:
    return InputError(path.name, "malformed", expected="a table of weights")


def _entries(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each weight's name and entry.

    Files that we write are read line by line, one weight in memory at a time: those of large
    mixture-of-experts models take gigabytes. Any other file is read whole.
    """
    file.seek(0)
    start = file.read(len(_LINE_FORMAT))
    file.seek(0)
    if start == _LINE_FORMAT:
        yield from _lines(file, path)
        return
    if path.stat().st_size > MAX_BYTES:
        raise InputError(str(path), "too large for a statistics file", expected="at most 1 GiB")
    parsed = strict_json(file.read(), path.name)
    if not isinstance(parsed, dict):
        raise _malformed(path)
    yield from parsed.items()


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    file.readline()
    last = b""
    while (line := file.readline(MAX_LINE)).strip() != b"}":
        if last and not last.endswith(b","):
            raise _malformed(path)
        last = line.strip()
        parsed = strict_json(b"{" + last.removesuffix(b",") + b"}", path.name)
        if len(parsed) != 1:
            raise _malformed(path)
        yield from parsed.items()
    if last.endswith(b",") or file.read(1):
        raise _malformed(path)


def _role(file: str, name: str) -> Role:
    try:
        return role_of(name)
    except TensorError as error:
        raise InputError(file, f"names {name!r}", expected="weights of Qwen3.5") from error


def _squares(file: str, name: str, entry: Any, count: int) -> F32:
    squares = _values(file, name, entry, SQUARES)
    if len(squares) != count:
        raise InputError(file, f"{len(squares)} mean squares for {name}", expected=f"{count}")
    return squares


def _values(file: str, name: str, entry: Any, key: str) -> F32:
    import numpy as np  # late: planning without statistics needs no numpy

    values = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(values, list) or not values:
        raise InputError(file, f"{name} is malformed", expected=f"{key}: a number per column")
    if not all(type(value) in (int, float) for value in values):  # bool is an int
        raise InputError(file, f"{name} holds a value that is not a number")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, np.float64).astype(np.float32)
    except OverflowError:  # an integer beyond float64
        array = np.array([np.inf], np.float32)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise InputError(
            file,
            f"{name} holds a negative or infinite number, or NaN",
            hint="a forward pass that overflowed made it: collect the statistics in bf16 or f32",
        )
    return array
