"""llama-quantize's name patterns as recipe rules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen35.checkpoint.locations import read_bounded
from qwen35.codecs.ggml.types import ggml_type
from qwen35.errors import InputError, UsageError
from qwen35.linear_regex import compile_linear
from qwen35.planning.rules import Rule

__all__ = ["exported", "pattern_rules"]

_MAX_BYTES = 2**24


def pattern_rules(lines: Sequence[str], files: Sequence[Path]) -> tuple[Rule, ...]:
    """Return the rules of ``--tensor-type`` lines, then those of ``--tensor-type-file`` files.

    A line is ``PATTERN=TYPE``; a file holds lines separated by white space. As in llama-quantize,
    patterns are ECMAScript regular expressions, lower-cased, and may match anywhere in a name;
    only those that RE2 reads too, in linear time: no look-ahead, no back-references.

    Raises:
        UsageError: a line or file is malformed, or a type is unknown.
    """
    rules = [_pattern(f"--tensor-type {line}", line) for line in lines]
    for path in files:
        try:
            text = read_bounded(path, _MAX_BYTES).decode()
        except (InputError, UnicodeDecodeError) as error:
            raise UsageError(f"--tensor-type-file {path}", f"cannot be read ({error})") from error
        if not text.split():
            raise UsageError(f"--tensor-type-file {path}", "no rules in it")
        rules += [_pattern(f"{path.name}, {line}", line) for line in text.split()]
    return tuple(rules)


_READ_OTHERWISE = re.compile(r"\(\?(?![:=!])|\\(?![dwsbnrtfvx])[a-z]|\[\[[:.=]")
"""Syntax that RE2 and ECMAScript do not share, and that patterns on names never need."""


def _pattern(subject: str, line: str) -> Rule:
    text, separator, kind = line.partition("=")
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
    return Rule(text, name, f"{text}={kind}", required=True, subject=subject, pattern=pattern)


def exported(kinds: Mapping[str, str]) -> Iterator[str]:
    """Yield ``llama-quantize --tensor-type-file`` lines that set each tensor's type."""
    for name, kind in kinds.items():
        yield f"^{re.escape(name)}$={kind}"
