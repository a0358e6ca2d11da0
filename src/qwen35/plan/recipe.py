"""Recipes: tables from role to action, with a reason for each row. Built-in ones are TOML too."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qwen35.checkpoint.place import read_bounded
from qwen35.codecs.registry import CODECS
from qwen35.errors import InputError, UsageError, did_you_mean
from qwen35.model.roles import ROLES, Role, in_group
from qwen35.plan.containers import CONTAINERS, Container, container_of
from qwen35.plan.layers import parse_layers

__all__ = [
    "Recipe",
    "Rule",
    "built_in",
    "check_match",
    "check_used",
    "load_recipe",
]

_MAX_BYTES = 2**20
_MAX_DOTS = 100
"""In a line: Python's TOML parser takes the square of a key's dots in time and memory."""

_KEYS = {"format", "base", "description", "rules"}
_ROLES_HINT = "`qwen35 plan --roles` prints the roles"
_KINDS = sorted({info.kind for info in ROLES.values()})
_FIRST = (
    *("nf4", "text", "text-nf4"),
    *("fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative", "bf16"),
)
"""The recipes that lists of them begin with; others follow by name."""


@dataclass(frozen=True)
class Rule:
    """One row of a recipe; the first that matches a weight decides.

    An action that packs leaves alone, in a group, what its codec cannot hold: norms, biases,
    tables, routers and convolutions.

    Args:
        match: a role or the group its first segments name, ``kind:linear``, ``*``; or, in a file
            that names its tensors otherwise, a pattern on those names.
        action: what a container's `Container.actions` names.
        reason: why, in a few words; shown by ``plan``.
        required: whether it is an error if no tensor is left for it.
        layers: the layers it is for; None for all, and for what is in no layer.
        subject: what sentences call it, if not by `match` and `reason`.
        pattern: `match` compiled, if it is a pattern.
    """

    match: str
    action: str
    reason: str
    required: bool = False
    layers: frozenset[int] | None = None
    subject: str = field(default="", compare=False)
    pattern: re.Pattern[str] | None = None

    def matches(self, role: Role, name: str = "") -> bool:
        """Whether the rule speaks of the weight with `role`, which the output calls `name`."""
        if self.pattern is not None:
            return self.pattern.search(name) is not None
        if self.layers is not None and role.layer not in self.layers:
            return False
        if self.match == "*":
            return True
        if self.match.startswith("kind:"):
            return role.info.kind == self.match.removeprefix("kind:")
        if role.name != self.match and role.info.kind in _spared(self.action):
            return False
        return in_group(role.name, self.match)


@cache
def _spared(action: str) -> frozenset[str]:
    codec = CODECS.get(action)
    return codec.spared if codec else frozenset()


@dataclass(frozen=True)
class Recipe:
    """A named list of rules; the first that matches a weight decides.

    Args:
        name: built-in name or file name.
        format: what its rules may make of weights: a format of some container.
        description: one line.
        rules: in order.
    """

    name: str
    format: str
    description: str
    rules: tuple[Rule, ...]

    @property
    def container(self) -> Container:
        """What holds the output."""
        return container_of(self.format)

    def find(self, role: Role, name: str = "") -> Rule | None:
        """Return the first rule that matches a weight, if any does."""
        return next((rule for rule in self.rules if rule.matches(role, name)), None)

    def rule_for(self, role: Role, name: str = "") -> Rule:
        """Return the first rule that matches a weight.

        Raises:
            UsageError: none does.
        """
        found = self.find(role, name)
        if found is None:
            hint = 'end it with match = "*"'
            raise UsageError(f"recipe {self.name}", f"no rule for {role.name}", hint=hint)
        return found

    def keeping(self, roles: tuple[str, ...]) -> Recipe:
        """Return this recipe with `roles` left unquantized.

        Raises:
            UsageError: a name is neither a role nor a group of roles.
        """
        rules = []
        for role in dict.fromkeys(roles):
            if role == "*" or role.startswith("kind:"):
                raise UsageError(f"--keep {role}", "not a role", hint=_ROLES_HINT)
            check_match(f"--keep {role}", role)
            if not any(role != other and in_group(role, other) for other in roles):
                rules.append(Rule(role, "plain", "asked for by --keep", required=True))
        return self.preceded(rules)

    def dropping_mtp(self) -> Recipe:
        """Return this recipe with the multi-token-prediction layer dropped."""
        return self.preceded([Rule("mtp", "drop", "asked for by --drop-mtp")])

    def preceded(self, rules: Iterable[Rule]) -> Recipe:
        """Return this recipe with `rules` before its own."""
        return replace(self, rules=(*rules, *self.rules))


def check_used(
    rules: Sequence[Rule],
    used: Iterable[Rule | None],
    *,
    name: Callable[[Rule], str],
    found: str,
    hint: str,
) -> None:
    """Refuse rules that decide nothing.

    Args:
        rules: all of them.
        used: those that decide something.
        name: what to call a rule.
        found: what to say of one that does not.
        hint: what to do about it.

    Raises:
        UsageError: a required rule is left without a tensor.
    """
    identities = {id(rule) for rule in used}
    for rule in rules:
        if rule.required and id(rule) not in identities:
            raise UsageError(name(rule), found, hint=hint)


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Return every built-in recipe, parsed, in the order in which they are listed."""
    folder = resources.files("qwen35.plan").joinpath("recipes")
    names = sorted(path.name.removesuffix(".toml") for path in folder.iterdir())
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return {name: tomllib.loads((folder / f"{name}.toml").read_text("utf-8")) for name in names}


@cache
def built_in(container: str) -> tuple[str, ...]:
    """Return the names of the recipes that come with the package for a container."""
    formats = CONTAINERS[container].formats
    return tuple(name for name, parsed in _shipped().items() if parsed["format"] in formats)


def load_recipe(name: str, container: str = "safetensors") -> Recipe:
    """Load a built-in recipe by name, or one from a TOML file.

    Args:
        name: as the user gave it.
        container: what must hold its output.

    Raises:
        UsageError: there is no such recipe, or the file is not one.
    """
    own = name not in built_in(container)
    parsed = _read(name, container) if own else _shipped()[name]
    return _parse(Path(name).name if own else name, parsed, container, required=own)


def _unknown(name: str, container: str) -> UsageError:
    names = built_in(container)
    verb = next((c.verb for c in CONTAINERS.values() if name in built_in(c.name)), "")
    return UsageError(
        f"recipe {name!r}",
        f"not {CONTAINERS[container].recipes}",
        expected=f"{', '.join(names)} or a .toml file",
        hint=f"it is one of `qwen35 {verb}`" if verb else did_you_mean(name, names),
    )


def _read(name: str, container: str) -> dict[str, Any]:
    """Read a recipe of the user's own."""
    if not name.endswith(".toml"):
        raise _unknown(name, container)
    try:
        text = read_bounded(Path(name), _MAX_BYTES).decode()
    except InputError as error:
        raise UsageError(f"recipe {name}", error.found, expected=error.expected) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {name}", "not UTF-8", expected="TOML") from error
    if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise UsageError(f"recipe {name}", f"a line of more than {_MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"recipe {Path(name).name}", f"not valid TOML ({error})") from error


def _parse(name: str, parsed: dict[str, Any], container: str, *, required: bool) -> Recipe:
    subject = f"recipe {name}"
    unknown = set(parsed) - _KEYS
    if unknown:
        expected = ", ".join(sorted(_KEYS))
        raise UsageError(subject, f"unknown key {min(unknown)!r}", expected=expected)
    kind: Any = parsed.get("format")
    formats = CONTAINERS[container].formats
    if kind not in formats:
        one = f"{formats[0]}, for this verb" if len(formats) == 1 else " or ".join(formats)
        raise UsageError(subject, f"format {kind!r}", expected=one)
    holder = CONTAINERS[container]
    rules = parsed.get("rules", [])
    if holder.complete and not (isinstance(rules, list) and (rules or "base" in parsed)):
        hint = 'write some, or go on with those of a built-in one: base = "nf4"'
        raise UsageError(subject, "no [[rules]] in it", hint=hint)
    if not isinstance(rules, list):
        raise UsageError(subject, "malformed rules", expected="[[rules]]")
    own = [_rule(subject, i, row, kind, required) for i, row in enumerate(rules, 1)]
    base = parsed.get("base")
    inherited = _base_rules(subject, base, kind) if base is not None else ()
    return Recipe(name, kind, str(parsed.get("description", "")), (*own, *inherited))


def _base_rules(subject: str, base: Any, kind: str) -> tuple[Rule, ...]:
    """Return the rules of the built-in recipe that another one goes on with."""
    container = container_of(kind).name
    known = built_in(container)
    if base not in known:
        raise UsageError(subject, f"base {base!r}", expected=" or ".join(known))
    recipe = load_recipe(base, container)
    if recipe.format != kind:
        raise UsageError(subject, f"format {kind!r}", expected=f"that of {base}")
    return recipe.rules


def _rule(recipe: str, number: int, row: Any, kind: str, required: bool) -> Rule:
    subject = f"{recipe}, rule {number}"
    known = {"match", "action", "layers", "reason"}
    if not isinstance(row, dict) or not {"match", "action"} <= set(row) <= known:
        expected = "match, action and, if you like, layers and reason"
        raise UsageError(subject, "malformed", expected=expected)
    match = str(row["match"])
    check_match(subject, match)
    layers = parse_layers(subject, row["layers"]) if "layers" in row else None
    action = container_of(kind).action(recipe, subject, str(row["action"]), kind)
    reason = str(row.get("reason", f"match = {match!r}"))
    return Rule(match, action, reason, required and match != "*", layers, subject)


def check_match(subject: str, match: str) -> None:
    """Refuse a rule's `match` that names nothing of the family.

    Raises:
        UsageError: it is neither ``*`` nor ``kind:`` and a kind, nor a role, nor a group of roles.
    """
    if match == "*":
        return
    if match.startswith("kind:"):
        if match.removeprefix("kind:") not in _KINDS:
            raise UsageError(subject, f"{match!r}", expected=f"kind: and {', '.join(_KINDS)}")
        return
    if not any(in_group(path.removesuffix(".weight"), match) for path in ROLES):
        raise UsageError(subject, f"{match!r} is not a role", hint=_ROLES_HINT)
