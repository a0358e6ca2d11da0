"""Recipes in TOML: the built-in ones, and the user's files."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import read_bounded
from qwen35.errors import InputError, UsageError, unknown_name
from qwen35.planning.container import Container
from qwen35.planning.layers import parse_layers
from qwen35.planning.refinement import CODES
from qwen35.planning.rules import Recipe, Rule, check_match

__all__ = ["built_in_names", "built_in_recipe", "read_recipe_file"]

_MAX_BYTES = 2**20
"""Bound on a recipe file, far above real ones."""

_MAX_DOTS = 100
"""Per line: Python's TOML parser takes quadratic time and memory in the dots of a key."""

KEYS = {"format", "base", "description", "rules"}
_FIRST = (
    *("nf4", "text", "text-nf4"),
    *("fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative", "bf16"),
)
"""Recipes listed first; the others follow by name."""


@cache
def _parsed_built_ins() -> dict[str, dict[str, Any]]:
    """Return all built-in recipes, parsed, in listing order."""
    folder = resources.files("qwen35.planning").joinpath("recipes")
    names = sorted(path.name.removesuffix(".toml") for path in folder.iterdir())
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return {name: tomllib.loads((folder / f"{name}.toml").read_text("utf-8")) for name in names}


@cache
def built_in_names(container: Container) -> tuple[str, ...]:
    """Return the names of a container's built-in recipes."""
    formats = container.formats
    recipes = _parsed_built_ins().items()
    return tuple(name for name, parsed in recipes if parsed["format"] in formats)


def built_in_recipe(name: str, container: Container) -> Recipe:
    """Return one of a container's built-in recipes."""
    # Not required: a dense model has no experts, and a text-only source no vision tower.
    return _parse(name, _parsed_built_ins()[name], container, required=False)


def read_recipe_file(path: Path, container: Container) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        UsageError: the file is missing, malformed, or of a format the container cannot hold.
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
    except (ValueError, RecursionError) as error:  # nested arrays exhaust the parser's stack
        raise UsageError(f"recipe {path.name}", f"not valid TOML ({error})") from error
    return _parse(path.name, parsed, container, required=True)


def _parse(name: str, parsed: dict[str, Any], container: Container, *, required: bool) -> Recipe:
    subject = f"recipe {name}"
    unknown = set(parsed) - KEYS
    if unknown:
        raise unknown_name(subject, min(unknown), sorted(KEYS), f"unknown key {min(unknown)!r}")
    kind: Any = parsed.get("format")
    formats = container.formats
    if kind not in formats:
        expected = f"{formats[0]}, for this verb" if len(formats) == 1 else " or ".join(formats)
        raise UsageError(subject, f"format {kind!r}", expected=expected)
    rules = parsed.get("rules", [])
    if container.complete and not (isinstance(rules, list) and (rules or "base" in parsed)):
        hint = 'add some, or extend a built-in recipe: base = "nf4"'
        raise UsageError(subject, "no [[rules]] in it", hint=hint)
    if not isinstance(rules, list):
        raise UsageError(subject, "malformed rules", expected="[[rules]]")
    own = [_rule(subject, i, row, kind, container, required) for i, row in enumerate(rules, 1)]
    base = parsed.get("base")
    inherited = _base_rules(subject, base, kind, container) if base is not None else ()
    description = str(parsed.get("description", ""))
    return Recipe(name, kind, description, (*own, *inherited), container)


def _base_rules(subject: str, base: Any, kind: str, container: Container) -> tuple[Rule, ...]:
    """Return the rules of the built-in recipe that another one extends."""
    known = built_in_names(container)
    if base not in known:
        raise unknown_name(subject, base, known, f"base {base!r}")
    recipe = built_in_recipe(base, container)
    if recipe.format != kind:
        raise UsageError(subject, f"format {kind!r}", expected=f"that of {base}")
    return recipe.rules


def _rule(
    recipe: str, number: int, row: Any, kind: str, container: Container, required: bool
) -> Rule:
    subject = f"{recipe}, rule {number}"
    known = {"match", "action", "layers", "codes", "reason"}
    if not isinstance(row, dict) or not {"match", "action"} <= set(row) <= known:
        expected = "match and action, optionally layers, codes and reason"
        raise UsageError(subject, "malformed", expected=expected)
    match = str(row["match"])
    check_match(subject, match)
    layers = parse_layers(subject, row["layers"]) if "layers" in row else None
    action = container.action(recipe, subject, str(row["action"]), kind)
    reason = str(row.get("reason", f"match = {match!r}"))
    codes = row.get("codes", "")
    if "codes" in row and codes not in CODES:
        found, expected = f"codes = {codes!r:.80}", " or ".join(map(repr, CODES))
        raise UsageError(subject, found, expected=expected)
    return Rule(match, action, reason, required and match != "*", layers, subject, codes=str(codes))
