"""Tasks: prompts with checks of the answers, a JSON object a line.

``{"prompt": "What is 2 + 2?", "number": 4}``; in place of ``number``, ``exact``, ``pattern``, or
``choices`` with ``choice``. Answers are compared, and no code is run.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import read_bounded
from qwen35.display import cut
from qwen35.errors import InputError
from qwen35.linear_regex import compile_linear
from qwen35.serving.json_values import number_in, parsed, text_in, value_in

__all__ = ["ServedTask", "read_tasks"]

_MOST_TASKS = 100_000
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHECKS = ("exact", "number", "pattern", "choice")
_KEYS = {*_CHECKS, "prompt", "choices", "tolerance", "id"}

_MINUS = str.maketrans("\u2212\u2012\ufe63\uff0d", "----")
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])-)?"  # between two numbers it stands for "minus" or "to"
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d{1,9}(?!\d))?"
)
_LONGEST_NUMBER = 400
_EXACTLY = decimal.Context(
    prec=2 * _LONGEST_NUMBER, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[]
)


@dataclass(frozen=True)
class ServedTask:
    """A prompt, and what the answer must be.

    Args:
        name: of the task: its ``id``, or its line.
        prompt: the user's turn, with the choices if there are any.
        check: ``exact``, ``number``, ``pattern`` or ``choice``.
        expect: the right answer, as text.
        tolerance: ``number``: the largest difference, as text.
        letters: ``choice``: those of the choices.
    """

    name: str
    prompt: str
    check: str
    expect: str
    tolerance: str = "0"
    letters: str = _LETTERS

    def is_right(self, answer: str) -> bool:
        """Judge an answer, without its reasoning.

        >>> ServedTask("1", "2 + 2?", "number", "4").is_right("2 + 2 makes 4.")
        True
        """
        if self.check == "exact":
            return _plain(answer) == _plain(self.expect)
        if self.check == "pattern":
            return compile_linear(self.expect).search(answer) is not None
        if self.check == "number":
            return self._is_near(answer)
        letters = re.findall(rf"\b[{self.letters}]\b", answer)
        return bool(letters) and letters[-1] == self.expect

    def _is_near(self, answer: str) -> bool:
        numbers = _NUMBER.findall(answer.translate(_MINUS))
        if not numbers or len(numbers[-1]) > _LONGEST_NUMBER:
            return False
        # In decimal, exactly: 9007199254740993 is no float.
        found = Decimal(numbers[-1].replace(",", ""))
        difference = _EXACTLY.abs(_EXACTLY.subtract(found, Decimal(self.expect)))
        return difference <= Decimal(self.tolerance)


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .").casefold()


def read_tasks(path: Path) -> list[ServedTask]:
    """Read a file of tasks.

    Raises:
        InputError: it cannot be read, or a line is no task.
    """
    lines = read_bounded(path, 2**28).split(b"\n")
    rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows or len(rows) > _MOST_TASKS:
        found = f"{len(rows)} tasks"
        raise InputError(path.name, found, expected=f"1 to {_MOST_TASKS}, a JSON object a line")
    tasks: dict[str, ServedTask] = {}
    for number, line in rows:
        place = f"{path.name}, line {number}"
        task = _task(place, number, line)
        if task.name in tasks:
            found = f"id {cut(repr(task.name), 60)} is that of another task"
            raise InputError(place, found, hint="a task without an id has its line's number")
        tasks[task.name] = task
    return list(tasks.values())


def _task(place: str, number: int, line: bytes) -> ServedTask:
    try:
        row = parsed(line)
    except ValueError as error:
        raise InputError(place, f"not JSON ({cut(str(error), 80)})") from error
    prompt = text_in(row, "prompt")
    if not isinstance(row, dict) or not prompt or not prompt.strip():
        raise InputError(place, "no prompt", expected='{"prompt": "...", "exact": "..."}')
    if unknown := sorted(set(row) - _KEYS):
        found = f"unknown key {unknown[0]!r:.60}"
        raise InputError(place, found, expected=", ".join(sorted(_KEYS)))
    checks = [name for name in _CHECKS if name in row]
    if len(checks) != 1:
        raise InputError(place, f"{len(checks)} checks", expected=f"one of {', '.join(_CHECKS)}")
    [check] = checks
    for key, owner in (("tolerance", "number"), ("choices", "choice")):
        if key in row and check != owner:
            raise InputError(place, f"{key} with {check}", expected=f"it with {owner} only")
    choices = _choices(place, row) if check == "choice" else []
    return ServedTask(
        _name(place, row, number),
        _with_choices(prompt, choices),
        check,
        _EXPECTED[check](place, row),
        _tolerance(place, row),
        _LETTERS[: len(choices)] or _LETTERS,
    )


def _no(place: str, row: Mapping[str, Any], key: str, expected: str) -> InputError:
    return InputError(place, f"{key} {cut(_json_kind(row[key]), 60)}", expected=expected)


def _json_kind(value: Any) -> str:
    """Return a value of JSON, or what it is: what has parts may be nested too deeply to print."""
    kinds = {list: "with a list", dict: "with an object", type(None): "null"}
    return kinds.get(type(value)) or repr(value)


def _name(place: str, row: Mapping[str, Any], number: int) -> str:
    name = row.get("id", number)
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    text = text_in(row, "id")
    if not text or not text.strip():
        raise _no(place, row, "id", "a text or a whole number")
    return text


def _choices(place: str, row: Mapping[str, Any]) -> list[str]:
    choices = row.get("choices")
    texts = [text_in(one) for one in choices] if isinstance(choices, list) else []
    given = [text for text in texts if text and text.strip()]
    if len(given) != len(texts) or len(set(given)) != len(given) or not given:
        found = "choices that are no list of different texts"
        raise InputError(place, found, expected='"choices": ["...", "..."]')
    if len(given) > len(_LETTERS):
        raise InputError(place, f"{len(given)} choices", expected=f"at most {len(_LETTERS)}")
    return given


def _with_choices(prompt: str, choices: list[str]) -> str:
    if not choices:
        return prompt
    lines = [f"{letter}. {one}" for letter, one in zip(_LETTERS, choices, strict=False)]
    return "\n".join([prompt, *lines, "Answer with the letter alone."])


def _tolerance(place: str, row: Mapping[str, Any]) -> str:
    if "tolerance" not in row:
        return "0"
    value = number_in(row, "tolerance")
    if value is None or value < 0:
        raise _no(place, row, "tolerance", "a number, 0 or more")
    return str(row["tolerance"])


# --- the right answer, after a check of it


def _exact(place: str, row: Mapping[str, Any]) -> str:
    text = text_in(row, "exact")
    if not text or not _plain(text):  # an empty answer would be right
        raise _no(place, row, "exact", "a text")
    return text


def _number(place: str, row: Mapping[str, Any]) -> str:
    value = value_in(row, "number")
    if number_in(row, "number") is None or len(str(value)) > _LONGEST_NUMBER:
        raise _no(place, row, "number", "a number")
    return str(value)


def _pattern(place: str, row: Mapping[str, Any]) -> str:
    text = text_in(row, "pattern")
    if not text:
        raise _no(place, row, "pattern", "a text")
    try:
        found = compile_linear(text).search("")
    except ValueError as error:
        why = f"pattern {text!r:.60}: {cut(str(error), 80)}"
        raise InputError(place, why, expected="RE2") from error
    if found is not None:
        found_text = f"pattern {text!r:.60} is found in an empty answer"
        raise InputError(place, found_text, hint="write one that is not")
    return text


def _choice(place: str, row: Mapping[str, Any]) -> str:
    text = text_in(row, "choice")
    given = _LETTERS[: len(_choices(place, row))]
    if text is None or len(text) != 1 or text not in given:
        raise _no(place, row, "choice", f"a letter of {len(given)} choices")
    return text


_EXPECTED = {"exact": _exact, "number": _number, "pattern": _pattern, "choice": _choice}
