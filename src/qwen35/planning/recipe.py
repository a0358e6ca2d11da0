"""Recipes by name, for the container that is to hold the output."""

from __future__ import annotations

from pathlib import Path

from qwen35.errors import UsageError, did_you_mean
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe_files import own_recipe, shipped, shipped_recipe
from qwen35.planning.rules import Recipe

__all__ = ["built_in", "load_recipe"]


def built_in(container: str) -> tuple[str, ...]:
    """Return the names of the recipes that come with the package for a container."""
    return shipped(CONTAINERS[container])


def load_recipe(name: str, container: str = "safetensors") -> Recipe:
    """Load a built-in recipe by name, or one from a TOML file.

    Args:
        name: as the user gave it.
        container: what must hold its output.

    Raises:
        UsageError: there is no such recipe, or the file is not one.
    """
    if name in built_in(container):
        return shipped_recipe(name, CONTAINERS[container])
    if name.endswith(".toml"):
        return own_recipe(Path(name), CONTAINERS[container])
    names = built_in(container)
    verb = next((c.verb for c in CONTAINERS.values() if name in built_in(c.name)), "")
    raise UsageError(
        f"recipe {name!r}",
        f"not {CONTAINERS[container].recipes}",
        expected=f"{', '.join(names)} or a .toml file",
        hint=f"it is one of `qwen35 {verb}`" if verb else did_you_mean(name, names),
    )
