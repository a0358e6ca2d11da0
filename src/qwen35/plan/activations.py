"""Statistics of activations: how large the input of each weight's columns was in a forward pass.

The file is one JSON object, ``{weight name: {"input_channel_max": [a number per column]}}``, as
`qwen35-collect-activation-stats` writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.inventory import Item
from qwen35.checkpoint.place import read_bounded
from qwen35.errors import InputError, TensorError
from qwen35.model.roles import Role, role_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Activations", "Key", "load_activations"]

_KEY = "input_channel_max"
_MAX_BYTES = 2**30

Key = tuple[str, int | None, int | None]
"""Role, layer and expert: the same weight has several names."""


@dataclass(frozen=True)
class Activations:
    """Largest magnitudes of the inputs of weights, per column.

    Args:
        name: of the file.
        sha256: of the file.
        columns: for each weight, [columns] float32, not negative.
    """

    name: str
    sha256: str
    columns: Mapping[Key, npt.NDArray[np.float32]]

    def of(self, role: Role) -> npt.NDArray[np.float32] | None:
        """Return the magnitudes of one weight, if there are any."""
        return self.columns.get((role.name, role.layer, role.expert))

    def check(self, items: Sequence[Item]) -> None:
        """Check that these are statistics of the model with the weights `items`.

        Raises:
            InputError: a weight is not there, or has another number of columns.
        """
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
        hint = "these are statistics of another model: collect them from this one"
        return InputError(self.name, found, expected=expected, hint=hint)


def load_activations(path: Path) -> Activations:
    """Read a file of statistics.

    Raises:
        InputError: it cannot be read or is malformed.
    """
    data = read_bounded(path, _MAX_BYTES)
    parsed = strict_json(data, path.name)
    if not isinstance(parsed, dict) or not parsed:
        raise InputError(path.name, "malformed", expected="a table of weights")
    columns: dict[Key, npt.NDArray[np.float32]] = {}
    for name, entry in parsed.items():
        role = _role(path.name, name)
        key = role.name, role.layer, role.expert
        if key in columns:
            raise InputError(path.name, f"names {name} twice", hint="under two prefixes")
        columns[key] = _values(path.name, name, entry)
    return Activations(path.name, hashlib.sha256(data).hexdigest(), columns)


def _role(file: str, name: str) -> Role:
    try:
        return role_of(name)
    except TensorError as error:
        raise InputError(file, f"names {name!r}", expected="weights of Qwen3.5") from error


def _values(file: str, name: str, entry: Any) -> npt.NDArray[np.float32]:
    import numpy as np

    values = entry.get(_KEY) if isinstance(entry, dict) else None
    if not isinstance(values, list) or not values:
        raise InputError(file, f"{name} is malformed", expected=f"{_KEY}: a number per column")
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
