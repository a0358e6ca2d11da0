"""Rules that give types to tensors: recipes by role, and llama-quantize's patterns on names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.checkpoint.place import read_bounded
from qwen35.errors import InputError, UsageError
from qwen35.gguf.names import Tensor
from qwen35.gguf.types import ggml_type
from qwen35.model.roles import in_group
from qwen35.plan.recipe import check_match, read_recipe

__all__ = ["BUILT_IN", "MIX", "Recipe", "Rule", "first_rule", "load_recipe", "pattern_rules"]

BUILT_IN = ("mix", "q8-gates", "q8-gates-plus")
"""Names of the recipes that come with the package."""

MIX = "mix"
"""The action that leaves a tensor to the mix of its file's type."""


@dataclass(frozen=True)
class Rule:
    """One rule; the first that matches a tensor decides.

    Args:
        subject: what to call it in a sentence (``--tensor-type x=q8_0``).
        match: a role, a group of roles, ``kind:linear`` or ``*``; or a pattern on names.
        kind: a type of ggml, or `MIX`.
        reason: why, in a few words.
        pattern: `match` compiled, if it is one.
        required: whether it is an error if nothing is left for it.
    """

    subject: str
    match: str
    kind: str
    reason: str
    pattern: re.Pattern[str] | None = None
    required: bool = True

    def matches(self, tensor: Tensor) -> bool:
        """Whether the rule speaks of `tensor`."""
        if self.pattern is not None:
            return self.pattern.search(tensor.name) is not None
        role = tensor.slabs[0].item.role
        if self.match == "*":
            return True
        if self.match.startswith("kind:"):
            return role.info.kind == self.match.removeprefix("kind:")
        return in_group(role.name, self.match)


@dataclass(frozen=True)
class Recipe:
    """A named list of rules for GGUF files.

    Args:
        name: built-in name or file name.
        description: one line.
        rules: in order; a tensor that none matches is left to the mix.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]


def first_rule(rules: Sequence[Rule], tensor: Tensor) -> Rule | None:
    """Return the first rule that matches `tensor`."""
    return next((rule for rule in rules if rule.matches(tensor)), None)


def load_recipe(name: str) -> Recipe:
    """Load a built-in recipe by name, or one from a TOML file.

    Raises:
        UsageError: there is no such recipe, or the file is not one.
    """
    return _parse(*read_recipe(name, "qwen35.gguf", BUILT_IN, "a built-in recipe for GGUF"))


def _parse(name: str, parsed: dict[str, Any], required: bool) -> Recipe:
    if parsed.get("format") != "gguf":
        found = f"format {parsed.get('format')!r}"
        raise UsageError(f"recipe {name}", found, expected="gguf, for this verb")
    rows = parsed.get("rules", [])
    if not isinstance(rows, list):
        raise UsageError(f"recipe {name}", "malformed rules", expected="[[rules]]")
    rules = [_rule(f"recipe {name}, rule {i}", row, required) for i, row in enumerate(rows, 1)]
    base = parsed.get("base")
    if base is not None:
        if base not in BUILT_IN:
            raise UsageError(f"recipe {name}", f"base {base!r}", expected=" or ".join(BUILT_IN))
        rules += load_recipe(base).rules
    return Recipe(name, str(parsed.get("description", "")), tuple(rules))


def _rule(subject: str, row: Any, required: bool) -> Rule:
    keys = {"match", "action", "reason"}
    if not isinstance(row, dict) or not {"match", "action"} <= set(row) <= keys:
        raise UsageError(subject, "malformed", expected="match, action and, if you like, reason")
    match, action = str(row["match"]), str(row["action"])
    check_match(subject, match)
    kind = MIX if action == MIX else ggml_type(action, subject).name
    reason = str(row.get("reason", f"match = {match!r}"))
    return Rule(subject, match, kind, reason, required=required and match != "*")


_MAX_BYTES = 2**24


def pattern_rules(lines: Sequence[str], files: Sequence[Path]) -> tuple[Rule, ...]:
    """Return the rules of ``--tensor-type`` lines, then those of ``--tensor-type-file`` files.

    A line is ``PATTERN=TYPE``; a file holds lines between spaces or line ends, as llama-quantize
    reads it: patterns are ECMAScript's, put into lower case, found anywhere in a name.

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


_ECMASCRIPT_LACKS = re.compile(r"\(\?(?![:=!])|\\[AZ]|\[\[[:.=]")
"""What Python's patterns and ECMAScript's do not share, and a name's pattern never needs."""


def _pattern(subject: str, line: str) -> Rule:
    text, separator, kind = line.partition("=")
    if not separator or not text or not kind:
        raise UsageError(subject, "malformed", expected="PATTERN=TYPE")
    name = ggml_type(kind, subject).name
    lowered = text.lower()
    if _ECMASCRIPT_LACKS.search(lowered):
        raise UsageError(subject, "not a pattern that llama-quantize would read the same way")
    try:
        pattern = re.compile(lowered, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(subject, f"not a pattern ({error})") from error
    return Rule(subject, text, name, f"{text}={kind}", pattern)


def check_used(rules: Sequence[Rule], chosen: Mapping[str, Rule | None]) -> None:
    """Refuse rules that decide nothing.

    Args:
        rules: all of them.
        chosen: tensor that can be quantized to the rule that decided its type.

    Raises:
        UsageError: a required rule is left without a tensor.
    """
    used = {id(rule) for rule in chosen.values()}
    for rule in rules:
        if rule.required and id(rule) not in used:
            raise UsageError(
                rule.subject,
                "no tensor that can be quantized is left for it",
                hint="names are those of `qwen35 gguf --dry-run --json`; the first rule decides",
            )


def exported(kinds: Mapping[str, str]) -> Iterator[str]:
    """Yield lines for ``llama-quantize --tensor-type-file`` that give each tensor its type."""
    for name, kind in kinds.items():
        yield f"^{re.escape(name)}$={kind}"
