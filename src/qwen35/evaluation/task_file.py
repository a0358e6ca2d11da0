"""Tasks: prompts with checks of the answers, a JSON object a line.

``{"prompt": "What is 2 + 2?", "number": 4}``; in place of ``number``, ``exact``, ``pattern``, or
``choices`` with ``choice``. Answers are compared, and no code is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import read_bounded
from qwen35.display import cut
from qwen35.errors import InputError
from qwen35.linear_regex import compile_linear
from qwen35.serving.json_values import list_in, number_in, parsed, text_in

__all__ = ["ServedTask", "read_tasks"]

_MOST_TASKS = 100_000
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHECKS = ("exact", "number", "pattern", "choice")
_KEYS = {*_CHECKS, "prompt", "choices", "tolerance", "id"}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class ServedTask:
    """A prompt, and what the answer must be.

    Args:
        name: of the task: its ``id``, or its line.
        prompt: the user's turn, with the choices if there are any.
        check: ``exact``, ``number``, ``pattern`` or ``choice``.
        expect: the right answer, as text.
        tolerance: ``number``: the largest difference.
    """

    name: str
    prompt: str
    check: str
    expect: str
    tolerance: float = 0.0

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
            numbers = _NUMBER.findall(answer)
            return bool(numbers) and abs(_number(numbers[-1]) - float(self.expect)) <= (
                self.tolerance
            )
        letters = re.findall(r"\b[A-Z]\b", answer)
        return bool(letters) and letters[-1] == self.expect


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .").casefold()


def _number(text: str) -> float:
    return float(text.replace(",", ""))


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
    return [_task(f"{path.name}, line {number}", number, line) for number, line in rows]


def _task(place: str, number: int, line: bytes) -> ServedTask:
    try:
        row = parsed(line)
    except ValueError as error:
        raise InputError(place, f"not JSON ({cut(str(error), 80)})") from error
    prompt = text_in(row, "prompt")
    if not isinstance(row, dict) or not prompt:
        raise InputError(place, "no prompt", expected='{"prompt": "...", "exact": "..."}')
    if unknown := sorted(set(row) - _KEYS):
        found = f"unknown key {unknown[0]!r:.60}"
        raise InputError(place, found, expected=", ".join(sorted(_KEYS)))
    checks = [name for name in _CHECKS if name in row]
    if len(checks) != 1:
        raise InputError(place, f"{len(checks)} checks", expected=f"one of {', '.join(_CHECKS)}")
    [check] = checks
    tolerance = number_in(row, "tolerance") or 0.0
    name = text_in(row, "id") or f"{number}"
    return ServedTask(name, _shown(row, prompt), check, _expected(place, row, check), tolerance)


def _shown(row: Mapping[str, Any], prompt: str) -> str:
    choices = list_in(row, "choices")
    lines = [f"{letter}. {one}" for letter, one in zip(_LETTERS, choices, strict=False)]
    if not lines:
        return prompt
    return "\n".join([prompt, *lines, "Answer with the letter alone."])


def _expected(place: str, row: Mapping[str, Any], check: str) -> str:
    """Return the right answer of a task, after a check of it."""
    number = number_in(row, "number")
    text = text_in(row, check) if check != "number" else number is not None and repr(number)
    if not text:
        wanted = "a number" if check == "number" else "a text"
        raise InputError(place, f"{check} {str(row[check])!r:.60}", expected=wanted)
    if check == "choice":
        given = _LETTERS[: len(list_in(row, "choices"))]
        if len(text) != 1 or text not in given:
            found = f"choice {text!r:.60}"
            raise InputError(place, found, expected=f"a letter of {len(given)} choices")
    if check == "pattern":
        try:
            compile_linear(text)
        except ValueError as error:
            raise InputError(place, f"pattern {text!r:.60}: {error}", expected="RE2") from error
    return text
