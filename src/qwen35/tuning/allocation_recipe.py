"""An allocation as an ordinary recipe: a rule per role, after rules for layers that differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from qwen35.planning.layers import spell_layers
from qwen35.tuning.units import Allocation, Unit

__all__ = ["recipe_text"]


def recipe_text(
    kind: str,
    units: Sequence[Unit],
    chosen: Allocation,
    *,
    description: str,
    base: str,
    default: str = "",
    explicit: bool = False,
) -> str:
    """Return the TOML of a recipe that stores every unit as `chosen`.

    Args:
        kind: the recipe's format.
        units: all units.
        chosen: unit to action.
        description: one line.
        base: the built-in recipe for everything else.
        default: the action of `base` for every unit, which needs no rule; empty if it differs.
        explicit: write a rule for every unit, instead of as few as possible.
    """
    lines = [f'format = "{kind}"', f'base = "{base}"', f'description = "{description}"']
    for role, layers, action in _rules(units, chosen, default, explicit=explicit):
        if action == default:
            continue
        lines += ["", "[[rules]]", f'match = "{role}"']
        lines += [f'layers = "{layers}"'] if layers else []
        lines += [f'action = "{action}"']
    return "\n".join(lines) + "\n"


def _rules(
    units: Sequence[Unit], chosen: Allocation, default: str, *, explicit: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield role, layers (empty for all) and action."""
    by_role: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        for role in unit.roles:
            by_role[role].append(unit)
    for role, members in by_role.items():
        if members[0].layer is None:
            yield role, "", chosen[members[0].name]
        elif explicit:
            for unit in members:
                yield role, str(unit.layer), chosen[unit.name]
        else:
            yield from _ranges(role, members, chosen, default)


def _ranges(
    role: str, members: Sequence[Unit], chosen: Allocation, default: str
) -> Iterator[tuple[str, str, str]]:
    """Yield a rule per action; the last, without layers, is `default` or the most common.

    The first matching rule wins, so the rule for all layers comes last.
    """
    layers: dict[str, list[int]] = defaultdict(list)
    for unit in members:
        assert unit.layer is not None  # request before
        layers[chosen[unit.name]].append(unit.layer)
    [(usual, _)] = Counter({action: len(of) for action, of in layers.items()}).most_common(1)
    last = default if default in layers else usual
    for action, of in layers.items():
        if action != last:
            yield role, spell_layers(of), action
    yield role, "", last
