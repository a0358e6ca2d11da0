"""Every container, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import InputError
from qwen35.planning.container import Container
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.planning.safetensors_files.safetensors_container import SafetensorsContainer

__all__ = ["CONTAINERS", "container_of", "container_told"]

CONTAINERS: dict[str, Container] = {
    container.name: container for container in (SafetensorsContainer(), GgufContainer())
}
"""Name to container."""


def container_of(kind: object) -> Container:
    """Return the container that holds outputs of a recipe's format.

    Raises:
        InputError: there is no such format.
    """
    for container in CONTAINERS.values():
        if kind in container.formats:
            return container
    known = ", ".join(name for one in CONTAINERS.values() for name in one.formats)
    raise InputError("recipe", f"format {kind!r}", expected=known)


def container_told(manifest: Mapping[str, Any]) -> Container:
    """Return the container that holds what a manifest, or a work order, describes.

    Raises:
        InputError: it does not say, or names none that there is.
    """
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict) or "format" not in recipe:
        raise InputError(MANIFEST_NAME, "names no recipe")
    return container_of(recipe["format"])
