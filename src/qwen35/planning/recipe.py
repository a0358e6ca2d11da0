"""Recipes by name, for a given container."""

from __future__ import annotations

from pathlib import Path

from qwen35.errors import UsageError, did_you_mean
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe_files import built_in_names, built_in_recipe, read_recipe_file
from qwen35.planning.rules import Recipe

__all__ = ["built_in", "load_recipe"]


def built_in(container: str) -> tuple[str, ...]:
    """Return the names of a container's built-in recipes."""
    return built_in_names(CONTAINERS[container])


def load_recipe(name: str, container: str = "safetensors") -> Recipe:
    """Load a built-in recipe by name, or a recipe from a TOML file.

    Args:
        name: the user's input.
        container: name of the output's container.

    Raises:
        UsageError: the recipe does not exist or is invalid.
    """
    if name in built_in(container):
        return built_in_recipe(name, CONTAINERS[container])
    if name.endswith(".toml"):
        return read_recipe_file(Path(name), CONTAINERS[container])
    names = built_in(container)
    verb = next((c.verb for c in CONTAINERS.values() if name in built_in(c.name)), "")
    raise UsageError(
        f"recipe {name!r}",
        f"not {CONTAINERS[container].recipes}",
        expected=f"{', '.join(names)} or a .toml file",
        hint=f"it is one of `qwen35 {verb}`" if verb else did_you_mean(name, names),
    )
