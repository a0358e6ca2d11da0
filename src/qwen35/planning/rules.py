"""Recipes: tables of rules that map roles to actions, each with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError, did_you_mean
from qwen35.linear_regex import LinearPattern
from qwen35.model.roles import ROLES, Role, in_group
from qwen35.planning.container import Container

__all__ = ["KEPT", "Recipe", "Rule", "check_match", "check_used"]

KEPT = "asked for by --keep"
"""The reason of rules that `Recipe.keeping` adds."""

_ROLES_HINT = "`qwen35 plan --roles` prints the roles"
_KINDS = sorted({info.kind for info in ROLES.values()})


@dataclass(frozen=True)
class Rule:
    """One row of a recipe; the first that matches a weight applies.

    In a group, a packing action skips what its codec cannot hold: norms, biases, tables, routers
    and convolutions.

    Args:
        match: a role, a group (the first segments of role names), ``kind:linear`` or ``*``; or a
            pattern on the output's tensor names.
        action: as `Container.action` spells it.
        reason: why, in a few words; shown by ``plan``.
        required: whether a rule that decides no tensor is an error.
        layers: the layers it applies to; None for all, and for tensors outside layers.
        subject: its name in error messages, if not `match` and `reason`.
        pattern: `match` compiled, if it is a pattern.
        codes: one of `qwen35.planning.refinement.CODES`; empty for what ``--codes`` says.
    """

    match: str
    action: str
    reason: str
    required: bool = False
    layers: frozenset[int] | None = None
    subject: str = field(default="", compare=False)
    pattern: LinearPattern | None = None
    codes: str = ""

    def matches(self, role: Role, name: str = "") -> bool:
        """Return whether the rule matches a weight with `role`, called `name` in the output."""
        if self.pattern is not None:
            return self.pattern.search(name) is not None
        if self.layers is not None and role.layer not in self.layers:
            return False
        if self.match == "*":
            return True
        if self.match.startswith("kind:"):
            return role.info.kind == self.match.removeprefix("kind:")
        # Naming a role exactly asks for it; the codec then refuses what it cannot hold.
        if role.name != self.match and role.info.kind in _spared(self.action):
            return False
        return in_group(role.name, self.match)


@cache
def _spared(action: str) -> frozenset[str]:
    codec = CODECS.get(action)
    return codec.spared if codec else frozenset()


@dataclass(frozen=True)
class Recipe:
    """A named list of rules; the first that matches a weight applies.

    Args:
        name: built-in name or file name.
        format: a format of `container`; it limits the actions of rules.
        description: one line.
        rules: in order of precedence.
        container: the output's container.
    """

    name: str
    format: str
    description: str
    rules: tuple[Rule, ...]
    container: Container

    @property
    def quantizes_inputs(self) -> bool:
        """Whether a packing stores a scale of its layers' inputs (`Codec.quantized_inputs`)."""
        names = {self.format, *(rule.action for rule in self.rules)} & CODECS.keys()
        return any(CODECS[name].quantized_inputs for name in names)

    def find(self, role: Role, name: str = "") -> Rule | None:
        """Return the first rule that matches a weight, or None."""
        return next((rule for rule in self.rules if rule.matches(role, name)), None)

    def rule_for(self, role: Role, name: str = "") -> Rule:
        """Return the first rule that matches a weight.

        Raises:
            UsageError: no rule matches.
        """
        rule = self.find(role, name)
        if rule is None:
            hint = 'end it with match = "*"'
            raise UsageError(f"recipe {self.name}", f"no rule for {role.name}", hint=hint)
        return rule

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
            # A role inside a group that is kept too would get a rule that decides nothing.
            if not any(role != other and in_group(role, other) for other in roles):
                rules.append(Rule(role, "plain", KEPT, required=True))
        return self.preceded(rules)

    def laid_out(self, layout: str) -> Recipe:
        """Return this recipe with its packings in another layout.

        Raises:
            UsageError: a packing has no such layout, or nothing is packed.
        """
        packing = {self.format, *(rule.action for rule in self.rules)}
        codecs = [CODECS[name] for name in packing if name in CODECS and CODECS[name].packed]
        for codec in sorted(codecs, key=lambda codec: codec.name):
            if not codec.layouts:
                found, hint = f"{codec.label} has only one", "leave it out"
                raise UsageError(f"--layout {layout}", found, hint=hint)
            if layout not in codec.layouts:
                found, expected = f"{codec.label} has no such layout", " or ".join(codec.layouts)
                raise UsageError(f"--layout {layout}", found, expected=expected)
        if not codecs:
            found, hint = "this recipe packs nothing", "leave it out"
            raise UsageError(f"--layout {layout}", found, hint=hint)
        renamed = {codec.name: codec.layouts[layout] for codec in codecs}
        rules = (replace(rule, action=renamed.get(rule.action, rule.action)) for rule in self.rules)
        return replace(self, format=renamed[self.format], rules=tuple(rules))

    def quantizing_inputs(self) -> Recipe:
        """Return this recipe with packings that quantize the inputs of their layers as well.

        Raises:
            UsageError: no packing can.
        """
        names = {self.format, *(rule.action for rule in self.rules)} & CODECS.keys()
        renamed = {name: CODECS[name].with_inputs for name in names if CODECS[name].with_inputs}
        if not renamed:
            found = (
                f"{CODECS[self.format].label if self.format in CODECS else 'nothing'} has no form"
            )
            found = f"{found} with inputs quantized by statistics"
            raise UsageError("--activations", found, hint="leave it out")
        rules = (replace(rule, action=renamed.get(rule.action, rule.action)) for rule in self.rules)
        return replace(self, format=renamed.get(self.format, self.format), rules=tuple(rules))

    def dropping_mtp(self) -> Recipe:
        """Return this recipe with the multi-token-prediction layer dropped."""
        return self.preceded([Rule("mtp", "drop", "asked for by --drop-mtp")])

    def preceded(self, rules: Iterable[Rule]) -> Recipe:
        """Return this recipe with `rules` put first."""
        return replace(self, rules=(*rules, *self.rules))


def check_used(
    rules: Sequence[Rule],
    used: Iterable[Rule | None],
    *,
    name: Callable[[Rule], str],
    found: str,
    hint: str,
) -> None:
    """Raise if a required rule decides no tensor.

    Args:
        rules: all rules.
        used: the rules that decide a tensor.
        name: the error's subject, from a rule.
        found: the error's message.
        hint: what to do about it.

    Raises:
        UsageError: a required rule decides no tensor.
    """
    # By identity: two equal rules are still two lines of a recipe, and the second is unused.
    identities = {id(rule) for rule in used}
    for rule in rules:
        if rule.required and id(rule) not in identities:
            raise UsageError(name(rule), found, hint=hint)


def _role_names() -> list[str]:
    """Return every role and group of roles, sorted."""
    parts = (path.removesuffix(".weight").split(".") for path in ROLES)
    return sorted({".".join(names[:end]) for names in parts for end in range(1, len(names) + 1)})


def check_match(subject: str, match: str) -> None:
    """Raise if a rule's `match` names nothing in this model family.

    Raises:
        UsageError: `match` is not ``*``, ``kind:`` and a kind, a role, or a group of roles.
    """
    if match == "*":
        return
    if match.startswith("kind:"):
        if match.removeprefix("kind:") not in _KINDS:
            expected = f"kind: and {', '.join(_KINDS)}"
            hint = did_you_mean(match.removeprefix("kind:"), _KINDS)
            raise UsageError(subject, repr(match), expected=expected, hint=hint)
        return
    if not any(in_group(path.removesuffix(".weight"), match) for path in ROLES):
        near = did_you_mean(match, _role_names())
        hint = f"{near} {_ROLES_HINT}" if near else _ROLES_HINT
        raise UsageError(subject, f"{match!r} is not a role", hint=hint)
