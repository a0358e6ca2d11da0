"""Every container, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import InputError
from qwen35.planning.container import Container
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.planning.safetensors_files.safetensors_container import SafetensorsContainer

__all__ = ["CONTAINERS", "container_from_manifest", "container_of"]

CONTAINERS: dict[str, Container] = {
    container.name: container for container in (SafetensorsContainer(), GgufContainer())
}
"""Name to container."""


def container_of(kind: object) -> Container:
    """Return the container for a recipe's format.

    Raises:
        InputError: the format is unknown.
    """
    for container in CONTAINERS.values():
        if kind in container.formats:
            return container
    known = ", ".join(name for container in CONTAINERS.values() for name in container.formats)
    raise InputError("recipe", f"format {kind!r}", expected=known)


def container_from_manifest(manifest: Mapping[str, Any]) -> Container:
    """Return the container of the output that a manifest or work order describes.

    Raises:
        InputError: the recipe's format is missing or unknown.
    """
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict) or "format" not in recipe:
        raise InputError(MANIFEST_NAME, "names no recipe")
    return container_of(recipe["format"])
