"""Recipes as TOML: those that come with the package, and files of one's own."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import read_bounded
from qwen35.errors import InputError, UsageError
from qwen35.planning.container import Container
from qwen35.planning.layers import parse_layers
from qwen35.planning.rules import Recipe, Rule, check_match

__all__ = ["own_recipe", "shipped", "shipped_recipe"]

_MAX_BYTES = 2**20
_MAX_DOTS = 100
"""In a line: Python's TOML parser takes the square of a key's dots in time and memory."""

_KEYS = {"format", "base", "description", "rules"}
_FIRST = (
    *("nf4", "text", "text-nf4"),
    *("fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative", "bf16"),
)
"""The recipes that lists of them begin with; others follow by name."""


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Return every built-in recipe, parsed, in the order in which they are listed."""
    folder = resources.files("qwen35.plan").joinpath("recipes")
    names = sorted(path.name.removesuffix(".toml") for path in folder.iterdir())
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return {name: tomllib.loads((folder / f"{name}.toml").read_text("utf-8")) for name in names}


@cache
def shipped(container: Container) -> tuple[str, ...]:
    """Return the names of the recipes that come with the package for a container."""
    formats = container.formats
    return tuple(name for name, parsed in _shipped().items() if parsed["format"] in formats)


def shipped_recipe(name: str, container: Container) -> Recipe:
    """Return one of the recipes that come with the package for a container."""
    return _parse(name, _shipped()[name], container, required=False)


def own_recipe(path: Path, container: Container) -> Recipe:
    """Return the recipe in a TOML file.

    Raises:
        UsageError: the file is not there, or is not one that the container could hold.
    """
    try:
        text = read_bounded(path, _MAX_BYTES).decode()
    except InputError as error:
        raise UsageError(f"recipe {path}", error.found, expected=error.expected) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}", "not UTF-8", expected="TOML") from error
    if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise UsageError(f"recipe {path}", f"a line of more than {_MAX_DOTS} dots")
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"recipe {path.name}", f"not valid TOML ({error})") from error
    return _parse(path.name, parsed, container, required=True)


def _parse(name: str, parsed: dict[str, Any], container: Container, *, required: bool) -> Recipe:
    subject = f"recipe {name}"
    unknown = set(parsed) - _KEYS
    if unknown:
        expected = ", ".join(sorted(_KEYS))
        raise UsageError(subject, f"unknown key {min(unknown)!r}", expected=expected)
    kind: Any = parsed.get("format")
    formats = container.formats
    if kind not in formats:
        one = f"{formats[0]}, for this verb" if len(formats) == 1 else " or ".join(formats)
        raise UsageError(subject, f"format {kind!r}", expected=one)
    rules = parsed.get("rules", [])
    if container.complete and not (isinstance(rules, list) and (rules or "base" in parsed)):
        hint = 'write some, or go on with those of a built-in one: base = "nf4"'
        raise UsageError(subject, "no [[rules]] in it", hint=hint)
    if not isinstance(rules, list):
        raise UsageError(subject, "malformed rules", expected="[[rules]]")
    own = [_rule(subject, i, row, kind, container, required) for i, row in enumerate(rules, 1)]
    base = parsed.get("base")
    inherited = _base_rules(subject, base, kind, container) if base is not None else ()
    description = str(parsed.get("description", ""))
    return Recipe(name, kind, description, (*own, *inherited), container)


def _base_rules(subject: str, base: Any, kind: str, container: Container) -> tuple[Rule, ...]:
    """Return the rules of the built-in recipe that another one goes on with."""
    known = shipped(container)
    if base not in known:
        raise UsageError(subject, f"base {base!r}", expected=" or ".join(known))
    recipe = shipped_recipe(base, container)
    if recipe.format != kind:
        raise UsageError(subject, f"format {kind!r}", expected=f"that of {base}")
    return recipe.rules


def _rule(
    recipe: str, number: int, row: Any, kind: str, container: Container, required: bool
) -> Rule:
    subject = f"{recipe}, rule {number}"
    known = {"match", "action", "layers", "reason"}
    if not isinstance(row, dict) or not {"match", "action"} <= set(row) <= known:
        expected = "match, action and, if you like, layers and reason"
        raise UsageError(subject, "malformed", expected=expected)
    match = str(row["match"])
    check_match(subject, match)
    layers = parse_layers(subject, row["layers"]) if "layers" in row else None
    action = container.action(recipe, subject, str(row["action"]), kind)
    reason = str(row.get("reason", f"match = {match!r}"))
    return Rule(match, action, reason, required and match != "*", layers, subject)
