"""llama-quantize's name patterns as recipe rules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen35.checkpoint.locations import read_bounded
from qwen35.codecs.ggml.types import ggml_type
from qwen35.errors import InputError, UsageError
from qwen35.linear_regex import MOST_PATTERNS, compile_linear
from qwen35.planning.rules import Rule

__all__ = ["exported", "pattern_rules"]

_MAX_BYTES = 2**24


def pattern_rules(lines: Sequence[str], files: Sequence[Path]) -> tuple[Rule, ...]:
    """Return the rules of ``--tensor-type`` lines, then those of ``--tensor-type-file`` files.

    A line is ``PATTERN=TYPE``; a file holds lines separated by white space. As in llama-quantize,
    patterns are ECMAScript regular expressions, lower-cased, and may match anywhere in a name;
    only those that RE2 reads too, in linear time: no look-ahead, no back-references.

    Raises:
        UsageError: a line or file is malformed, a type is unknown, or there are too many.
    """
    rules = [_pattern(f"--tensor-type {line}", line) for line in lines]
    for path in files:
        try:
            text = read_bounded(path, _MAX_BYTES).decode()
        except (InputError, UnicodeDecodeError) as error:
            raise UsageError(f"--tensor-type-file {path}", f"cannot be read ({error})") from error
        found = text.split()
        if not found:
            raise UsageError(f"--tensor-type-file {path}", "no rules in it")
        _refuse_many(f"--tensor-type-file {path}", len(found))
        rules += [_pattern(f"{path.name}, {line}", line) for line in found]
    _refuse_many("--tensor-type and its files", len(rules))
    return tuple(rules)


def _refuse_many(subject: str, count: int) -> None:
    if count > MOST_PATTERNS:
        raise UsageError(subject, f"{count} rules", expected=f"at most {MOST_PATTERNS}")


_READ_OTHERWISE = re.compile(r"\(\?(?![:=!])|\\(?![dwsbnrtfvx])[a-z]|\[\[[:.=]")
"""Syntax that RE2 and ECMAScript do not share, and that patterns on names never need."""


def _pattern(subject: str, line: str) -> Rule:
    text, separator, kind = line.rpartition("=")  # the last, so that look-around is named
    if not separator or not text or not kind:
        raise UsageError(subject, "malformed", expected="PATTERN=TYPE")
    name = ggml_type(kind, subject).name
    lowered = text.lower()  # llama-quantize does so, even to `\S`, which becomes `\s`
    if _READ_OTHERWISE.search(lowered):
        raise UsageError(subject, "not a pattern that llama-quantize would read the same way")
    try:
        pattern = compile_linear(lowered)
    except ValueError as error:
        expected = "a regular expression without look-ahead and back-references (RE2)"
        raise UsageError(subject, f"not a pattern ({error})", expected=expected) from error
    if "=" in text:  # llama-quantize takes the rest for a type
        raise UsageError(subject, "more than one =", expected="PATTERN=TYPE")
    return Rule(text, name, f"{text}={kind}", required=True, subject=subject, pattern=pattern)


def exported(kinds: Mapping[str, str]) -> Iterator[str]:
    """Yield ``llama-quantize --tensor-type-file`` lines that set each tensor's type."""
    for name, kind in kinds.items():
        yield f"^{re.escape(name)}$={kind}"
