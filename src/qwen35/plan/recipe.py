"""Recipes: tables from role to action, with a reason for each row. Built-in ones are TOML too."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from qwen35.checkpoint.place import read_bounded
from qwen35.errors import InputError, UsageError, did_you_mean
from qwen35.model.roles import ROLES, Role, in_group
from qwen35.plan.layers import parse_layers

__all__ = [
    "ACTIONS",
    "BUILT_IN",
    "Action",
    "Recipe",
    "Rule",
    "check_match",
    "load_recipe",
    "read_recipe",
    "read_rule",
]

_MAX_BYTES = 2**20
_MAX_DOTS = 100
"""In a line: Python's TOML parser takes the square of a key's dots in time and memory."""

Action = Literal["drop", "keep", "plain", "nf4", "fp8"]
Format = Literal["stored", "nf4", "fp8"]

ACTIONS: dict[str, str] = {
    "drop": "not written",
    "keep": "copied as stored, packed or not",
    "plain": "copied; if packed (NF4, FP8), decoded to the checkpoint's dtype",
    "nf4": "bitsandbytes NF4; copied if already NF4",
    "fp8": "block-wise FP8 (E4M3, 128 x 128); copied if already FP8",
}
"""What a rule may ask for."""

BUILT_IN = (
    "nf4",
    "text",
    "text-nf4",
    "fp8",
    "fp8-conservative",
    "text-fp8",
    "text-fp8-conservative",
    "bf16",
)
"""Names of the recipes that come with the package."""

_HOMES = {"convert": "qwen35.plan", "gguf": "qwen35.gguf"}
"""Verb to the package that has its recipes."""

_KEYS = {"format", "base", "description", "rules"}
_PACKING = ("nf4", "fp8")
_NEVER_PACKED = ("vector", "conv", "embedding", "router")
_ROLES_HINT = "`qwen35 plan --roles` prints the roles"
_KINDS = sorted({info.kind for info in ROLES.values()})


@dataclass(frozen=True)
class Rule:
    """One row of a recipe.

    With ``nf4`` and ``fp8``, a group leaves its norms, biases, tables, routers and convolutions
    alone.

    Args:
        match: a role or the group its first segments name, ``kind:linear``, or ``*``.
        action: a key of `ACTIONS`.
        reason: why, in a few words; shown by ``plan``.
        required: whether it is an error if no tensor matches.
        layers: the layers it is for; None for all, and for what is in no layer.
    """

    match: str
    action: Action
    reason: str
    required: bool = False
    layers: frozenset[int] | None = None

    def matches(self, role: Role) -> bool:
        """Whether the rule speaks of tensors with `role`."""
        if self.layers is not None and role.layer not in self.layers:
            return False
        if self.match == "*":
            return True
        if self.match.startswith("kind:"):
            return role.info.kind == self.match.removeprefix("kind:")
        part_of_group = role.name != self.match and role.info.kind in _NEVER_PACKED
        if self.action in _PACKING and part_of_group:
            return False
        return in_group(role.name, self.match)


@dataclass(frozen=True)
class Recipe:
    """A named list of rules; the first that matches a tensor decides.

    Args:
        name: built-in name or file name.
        format: what its rules may pack weights as; ``stored``: nothing that is not packed already.
        description: one line.
        rules: in order; together they match every role.
    """

    name: str
    format: Format
    description: str
    rules: tuple[Rule, ...]

    def rule_for(self, role: Role) -> Rule:
        """Return the first rule that matches `role`.

        Raises:
            UsageError: none does.
        """
        for rule in self.rules:
            if rule.matches(role):
                return rule
        raise UsageError(
            f"recipe {self.name}", f"no rule for {role.name}", hint='end it with match = "*"'
        )

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
        return replace(self, rules=(*rules, *self.rules))

    def dropping_mtp(self) -> Recipe:
        """Return this recipe with the multi-token-prediction layer dropped."""
        rule = Rule("mtp", "drop", "asked for by --drop-mtp")
        return replace(self, rules=(rule, *self.rules))


def load_recipe(name: str) -> Recipe:
    """Load a built-in recipe by name, or one from a TOML file.

    Raises:
        UsageError: there is no such recipe, or the file is not one.
    """
    return _parse(*read_recipe(name, "qwen35.plan", BUILT_IN, "a built-in recipe"))


def read_recipe(
    name: str, package: str, built_in: Sequence[str], known: str
) -> tuple[str, dict[str, Any], bool]:
    """Read a built-in recipe by name, or one from a TOML file.

    Args:
        name: as the user gave it.
        package: where the built-in ones are.
        built_in: their names.
        known: what an unknown name is not.

    Returns:
        Its name, its keys, and whether it is the user's own, so that each rule must match.

    Raises:
        UsageError: there is no such recipe, or it is not TOML with the keys of one.
    """
    own = name not in built_in
    if own and not name.endswith(".toml"):
        expected = f"{', '.join(built_in)} or a .toml file"
        hint = _other_verb(name, package) or did_you_mean(name, built_in)
        raise UsageError(f"recipe {name!r}", f"not {known}", expected=expected, hint=hint)
    if own:
        try:
            text = read_bounded(Path(name), _MAX_BYTES).decode()
        except InputError as error:
            raise UsageError(f"recipe {name}", error.found, expected=error.expected) from error
        except UnicodeDecodeError as error:
            raise UsageError(f"recipe {name}", "not UTF-8", expected="TOML") from error
        if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise UsageError(f"recipe {name}", f"a line of more than {_MAX_DOTS} dots")
        name = Path(name).name
    else:
        text = resources.files(package).joinpath(f"recipes/{name}.toml").read_text("utf-8")
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"recipe {name}", f"not valid TOML ({error})") from error
    unknown = set(parsed) - _KEYS
    if unknown:
        expected = ", ".join(sorted(_KEYS))
        raise UsageError(f"recipe {name}", f"unknown key {min(unknown)!r}", expected=expected)
    return name, parsed, own


def _other_verb(name: str, package: str) -> str:
    """Return a hint if `name` is a recipe of the other kind; `package` has those of this one."""
    for verb, home in _HOMES.items():
        known = name.replace("-", "").isalnum() and home != package
        if known and resources.files(home).joinpath(f"recipes/{name}.toml").is_file():
            return f"it is one of `qwen35 {verb}`"
    return ""


def _parse(name: str, parsed: dict[str, Any], required: bool) -> Recipe:
    kind: Any = parsed.get("format")
    if kind not in get_args(Format):
        raise UsageError(
            f"recipe {name}", f"format {kind!r}", expected=" or ".join(get_args(Format))
        )
    rules = parsed.get("rules", [])
    if not isinstance(rules, list) or not (rules or "base" in parsed):
        hint = 'write some, or go on with those of a built-in one: base = "nf4"'
        raise UsageError(f"recipe {name}", "no [[rules]] in it", hint=hint)
    for row in rules:
        action = row.get("action") if isinstance(row, dict) else None
        if action in _PACKING and action != kind:
            raise UsageError(
                f"recipe {name}", f"packs as {action.upper()}", hint=f'give it format = "{action}"'
            )
    own = tuple(_rule(f"recipe {name}, rule {i}", r, required) for i, r in enumerate(rules, 1))
    base = parsed.get("base")
    inherited = _base_rules(name, base, kind) if base is not None else ()
    return Recipe(name, kind, str(parsed.get("description", "")), (*own, *inherited))


def _base_rules(name: str, base: Any, kind: str) -> tuple[Rule, ...]:
    """Return the rules of the built-in recipe that another one goes on with."""
    if base not in BUILT_IN:
        raise UsageError(f"recipe {name}", f"base {base!r}", expected=" or ".join(BUILT_IN))
    recipe = load_recipe(base)
    if recipe.format != kind:
        raise UsageError(f"recipe {name}", f"format {kind!r}", expected=f"that of {base}")
    return recipe.rules


def _rule(subject: str, row: Any, required: bool) -> Rule:
    match, action, layers = read_rule(subject, row)
    if action not in ACTIONS:
        raise UsageError(subject, f"action {action!r}", expected=" or ".join(ACTIONS))
    reason = str(row.get("reason", f"match = {match!r}"))
    return Rule(match, action, reason, required and match != "*", layers)  # type: ignore[arg-type]


def read_rule(subject: str, row: Any) -> tuple[str, str, frozenset[int] | None]:
    """Return match, action and layers of a row of a recipe's rules, of any format.

    Raises:
        UsageError: the row is malformed, or names what the family has not.
    """
    known = {"match", "action", "layers", "reason"}
    if not isinstance(row, dict) or not {"match", "action"} <= set(row) <= known:
        expected = "match, action and, if you like, layers and reason"
        raise UsageError(subject, "malformed", expected=expected)
    match = str(row["match"])
    check_match(subject, match)
    layers = parse_layers(subject, row["layers"]) if "layers" in row else None
    return match, str(row["action"]), layers


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
