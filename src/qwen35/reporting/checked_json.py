"""Values of a JSON file that anybody may have written: each is checked where it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen35.display import cut
from qwen35.errors import InputError

__all__ = ["CheckedTable"]

_MOST = 2.0**63
"""Larger numbers are no size, count or divergence."""

_LONGEST = 10_000
"""Most entries of a list: a report has fewer of everything."""


class CheckedTable:
    """An object in a JSON file.

    Args:
        value: what the file holds there.
        subject: the file, for error messages.
        path: where in it the object is.

    Raises:
        InputError: it is no object; so do all methods if a value is not of the kind they return.
    """

    def __init__(self, value: Any, subject: str, path: str = "") -> None:
        self.subject, self._path = subject, path
        if not isinstance(value, dict):
            raise self._error(path or "it", value, "an object")
        self._value: dict[Any, Any] = value

    def _error(self, where: str, value: Any, expected: str) -> InputError:
        return InputError(self.subject, f"{where} is {cut(repr(value), 80)}", expected=expected)

    def _where(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _read(self, key: str, kinds: type | tuple[type, ...], expected: str) -> Any:
        if key not in self._value:
            raise InputError(self.subject, f"{self._where(key)} is missing", expected=expected)
        value = self._value[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self._error(self._where(key), value, expected)
        if isinstance(value, list) and len(value) > _LONGEST:
            found = f"{self._where(key)} has {len(value)} entries"
            raise InputError(self.subject, found, expected=f"at most {_LONGEST}")
        return value

    def has(self, key: str) -> bool:
        """Return whether there is a value that is not null."""
        return self._value.get(key) is not None

    def text(self, key: str) -> str:
        """Return a string, without surrogates, which no file can hold."""
        return _clean(self._read(key, str, "a string"))

    def texts(self, key: str) -> list[str]:
        """Return a list of strings."""
        values = self._read(key, list, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise self._error(self._where(key), values, "a list of strings")
        return [_clean(value) for value in values]

    def number(self, key: str) -> float:
        """Return a number."""
        return self._bounded(key, self._read(key, (int, float), "a number"))

    def _bounded(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
            raise self._error(self._where(key), value, "a number")
        return float(value)

    def count(self, key: str) -> int:
        """Return an integer that is not negative."""
        value: int = self._read(key, int, "a count")
        if not 0 <= value < _MOST:
            raise self._error(self._where(key), value, "a count")
        return value

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers; empty if there is none."""
        values = self._read(key, list, "a list of numbers") if self.has(key) else []
        return [self._bounded(key, value) for value in values]

    def numbers_or_none(self, key: str) -> list[float | None]:
        """Return a list of numbers and nulls; empty if there is none."""
        values = self._read(key, list, "a list of numbers") if self.has(key) else []
        return [None if value is None else self._bounded(key, value) for value in values]

    def table(self, key: str) -> CheckedTable:
        """Return an object."""
        value = self._read(key, dict, "an object")
        return CheckedTable(value, self.subject, self._where(key))

    def tables(self, key: str) -> list[CheckedTable]:
        """Return a list of objects; empty if there is none."""
        values = self._read(key, list, "a list of objects") if self.has(key) else []
        path = self._where(key)
        return [CheckedTable(v, self.subject, f"{path}[{i}]") for i, v in enumerate(values)]

    def rows(self, key: str, length: int) -> list[list[str]]:
        """Return a list of rows, each of `length` strings."""
        rows = self._read(key, list, "a list of rows")
        for row in rows:
            whole = isinstance(row, list) and all(isinstance(cell, str) for cell in row)
            if not whole or len(row) != length:
                raise self._error(self._where(key), row, f"rows of {length} strings")
        return [[_clean(cell) for cell in row] for row in rows]

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield names and values that are strings."""
        for key in self._value:
            yield _clean(str(key)), self.text(key)

    def numbered(self) -> Iterator[tuple[float, float]]:
        """Yield keys and values that are numbers both."""
        for key in self._value:
            try:
                name = float(key)
            except ValueError as error:
                raise self._error(self._path, key, "numbers as keys") from error
            yield self._bounded(key, name), self.number(key)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
