"""Every container, by name."""

from __future__ import annotations

from qwen35.errors import InputError
from qwen35.plan.container import Container
from qwen35.plan.gguf.container import GgufContainer
from qwen35.plan.safetensors.container import SafetensorsContainer

__all__ = ["CONTAINERS", "Container", "container_of"]

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
