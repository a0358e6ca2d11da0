"""Recipes by name, for a given container."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen35.errors import UsageError, did_you_mean
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe_files import built_in_names, built_in_recipe, read_recipe_file
from qwen35.planning.rules import Recipe

__all__ = ["adjusted_recipe", "built_in", "load_recipe"]


def built_in(container: str) -> tuple[str, ...]:
    """Return the names of a container's built-in recipes."""
    return built_in_names(CONTAINERS[container])


def load_recipe(name: str, container: str = "safetensors", layout: str | None = None) -> Recipe:
    """Load a built-in recipe by name, or a recipe from a TOML file.

    Args:
        name: the user's input.
        container: name of the output's container.
        layout: another layout of its packings; where a built-in recipe is called ``name-layout``,
            that is taken, as its tool chooses other weights.

    Raises:
        UsageError: the recipe does not exist, is invalid, or has no such layout.
    """
    if layout is not None:
        of_layout = f"{name}-{layout}"
        if of_layout in built_in(container):
            return built_in_recipe(of_layout, CONTAINERS[container])
        return load_recipe(name, container).laid_out(layout)
    if name in built_in(container):
        return built_in_recipe(name, CONTAINERS[container])
    if name.endswith(".toml"):
        return read_recipe_file(Path(name), CONTAINERS[container])
    names = built_in(container)
    raise UsageError(
        f"recipe {name!r}",
        f"not {CONTAINERS[container].recipes}",
        expected=f"{', '.join(names)} or a .toml file",
        hint=_elsewhere(name) or did_you_mean(name, names),
    )


def _elsewhere(name: str) -> str:
    """Return the command that knows a name; empty if none does."""
    for container in CONTAINERS.values():
        if name in built_in(container.name):
            return f"it is one of `qwen35 {container.verb}`"
        if name.upper() in container.types:
            return f"it is a type, for `qwen35 {container.verb} --types {name.upper()}`"
    return ""


def adjusted_recipe(
    name: str,
    *,
    keep: Sequence[str] = (),
    layout: str | None = None,
    quantized_inputs: bool = False,
    drop_mtp: bool = False,
) -> Recipe:
    """Load a recipe of safetensors outputs and adjust it.

    Args:
        name: the user's input.
        keep: roles and groups of them to leave unquantized.
        layout: as for `load_recipe`.
        quantized_inputs: whether packings store scales of their layers' inputs.
        drop_mtp: whether to drop the multi-token-prediction layer.

    Raises:
        UsageError: the recipe does not exist, is invalid, or an adjustment does not fit it.
    """
    recipe = load_recipe(name, layout=layout).keeping(tuple(keep))
    if quantized_inputs:
        recipe = recipe.quantizing_inputs()
    return recipe.dropping_mtp() if drop_mtp else recipe
