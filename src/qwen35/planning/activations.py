"""Statistics of activations: how large the input of each weight's columns was in a forward pass.

The file is one JSON object, ``{weight name: {"input_channel_max": [a number per column]}}``.
`qwen35 calibrate` and `qwen35-collect-activation-stats` add ``input_channel_mean_square``, in the
same form, to each weight, ``tokens``, the number it saw, and the entry ``__metadata__``: what made
the file.
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
    "LARGEST",
    "MADE",
    "SQUARES",
    "TOKENS",
    "Activations",
    "Key",
    "load_activations",
    "other_geometry",
]

LARGEST, SQUARES, TOKENS = "input_channel_max", "input_channel_mean_square", "tokens"
MADE = "__metadata__"
ANOTHER_MODEL = "these are statistics of another model: collect them from this one"
_MAX_BYTES = 2**30
_MAX_LINE = 2**26
_BY_LINE = b"{\n" + json.dumps(MADE).encode()
"""How a file of ours begins, which has a weight a line."""

Key = tuple[str, int | None, int | None]
"""Role, layer and expert: the same weight has several names."""


@dataclass(frozen=True)
class Activations:
    """What the inputs of weights were, per column.

    Args:
        name: of the file.
        sha256: of the file.
        columns: for each weight, [columns] float32, not negative: the largest magnitudes.
        squares: the same of mean squares, for the weights that have them.
        made: what made the file, if it says so.
        path: where it is, if it was read from there.
    """

    name: str
    sha256: str
    columns: Mapping[Key, F32]
    squares: Mapping[Key, F32] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def weights(self, role: Role, mode: str) -> F32 | None:
        """Return how much the error of each column of a weight matters, if it is known.

        Mode ``search`` weighs by mean squares where there are any: to first order, the squared
        error of an output is the sum over columns of (error of the weight)^2 x^2. The other modes
        are documented with the largest magnitudes.
        """
        key = role.name, role.layer, role.expert
        found = self.squares.get(key) if mode == "search" else None
        return self.columns.get(key) if found is None else found

    def check(self, items: Sequence[InventoryItem], geometry: Mapping[str, int]) -> None:
        """Check that these are statistics of the model with the weights `items`.

        Raises:
            InputError: a weight is not there or has another number of columns, or the file names
                another geometry than `geometry`.
        """
        difference = other_geometry(self.made, geometry)
        if difference is not None:
            raise self._foreign(*difference)
        shapes = {}
        for item in items:
            for one in (item, *item.experts()):
                shapes[one.role.name, one.role.layer, one.role.expert] = one.spec.shape
        for key, values in self.columns.items():
            name = ".".join(str(part) for part in key[1:2] + key[:1] if part is not None)
            if key not in shapes:
                raise self._foreign(f"has {name}, which this model has not")
            if shapes[key][-1] != len(values):
                found = f"{len(values)} columns for {name}"
                raise self._foreign(found, expected=f"{shapes[key][-1]}")

    def _foreign(self, found: str, expected: str = "") -> InputError:
        return InputError(self.name, found, expected=expected, hint=ANOTHER_MODEL)

    def notes(self) -> tuple[str, ...]:
        """Return what a user of the file should know."""
        below = self.made.get("experts_below_floor")
        if not below:
            return ()
        floor = self.made.get("floor")
        return (
            f"{self.name} saw fewer than {floor} tokens for {below} experts, which were filled up "
            "from the average of their layer",
        )


def other_geometry(made: Mapping[str, Any], geometry: Mapping[str, int]) -> tuple[str, str] | None:
    """Return what is found and what is expected, if statistics name another geometry.

    Args:
        made: what made the statistics; files of others say nothing.
        geometry: `ModelConfig.geometry`.
    """
    theirs = made.get("geometry")
    if not isinstance(theirs, dict) or theirs == dict(geometry):
        return None
    names = [name for name in {**theirs, **geometry} if theirs.get(name) != geometry.get(name)]
    found, expected = (", ".join(f"{n} {g.get(n)}" for n in names[:3]) for g in (theirs, geometry))
    return f"of a model with {found}"[:200], expected


def load_activations(path: Path) -> Activations:
    """Read a file of statistics.

    Raises:
        InputError: it cannot be read or is malformed.
    """
    made: Any = {}
    columns: dict[Key, F32] = {}
    squares: dict[Key, F32] = {}
    try:
        if path.exists() and not path.is_file():
            raise InputError(str(path), "not a file")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            for name, entry in _entries(file, path):
                if name == MADE:
                    made = entry
                    continue
                role = _role(path.name, name)
                key = role.name, role.layer, role.expert
                if key in columns:
                    raise InputError(path.name, f"names {name} twice", hint="under two prefixes")
                columns[key] = _values(path.name, name, entry, LARGEST)
                if SQUARES in entry:
                    squares[key] = _values(path.name, name, entry, SQUARES)
                    if len(squares[key]) != len(columns[key]):
                        found = f"{len(squares[key])} mean squares for {name}"
                        raise InputError(path.name, found, expected=f"{len(columns[key])}")
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error
    if not isinstance(made, dict) or not columns:
        raise _malformed(path)
    return Activations(path.name, digest, columns, squares, made, path)


def _malformed(path: Path) -> InputError:
    return InputError(path.name, "malformed", expected="a table of weights")


def _entries(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what the file says of each weight.

    A file of ours has a weight a line, and only one of them is in memory: those of large mixtures
    of experts take gigabytes. Any other is read whole.
    """
    file.seek(0)
    first = file.read(len(_BY_LINE))
    file.seek(0)
    if first == _BY_LINE:
        yield from _lines(file, path)
        return
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(str(path), "larger than any statistics", expected="at most 1 GiB")
    parsed = strict_json(file.read(), path.name)
    if not isinstance(parsed, dict):
        raise _malformed(path)
    yield from parsed.items()


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    file.readline()
    last = b""
    while (line := file.readline(_MAX_LINE)).strip() != b"}":
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


def _values(file: str, name: str, entry: Any, what: str) -> F32:
    import numpy as np

    values = entry.get(what) if isinstance(entry, dict) else None
    if not isinstance(values, list) or not values:
        raise InputError(file, f"{name} is malformed", expected=f"{what}: a number per column")
    if not all(type(value) in (int, float) for value in values):
        raise InputError(file, f"{name} holds what is not a number")
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
