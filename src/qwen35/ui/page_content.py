"""The one page: its template, style and script, and what it offers to choose from."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from qwen35.display import printable
from qwen35.model.sizes import PUBLISHED
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.mtp_choice import MTP_CHOICES
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.reporting.page_frame import page_style
from qwen35.ui.actions import ACTIONS
from qwen35.verification.verdict import Depth
from qwen35.version import __version__

__all__ = ["page_html"]

_MOST_PLACES = 200
_CHOICES: dict[str, tuple[str, ...]] = {
    "types": tuple(FILE_TYPES),
    "mtp": MTP_CHOICES,
    "depth": get_args(Depth),
}
_COMMON = list(FILE_TYPES).index("Q4_0") + 1
_PRESET: dict[str, dict[str, Any]] = {
    "gguf": {"types": ["Q4_K_M", "Q8_0"]},
    "publish": {"private": True},
}


def page_html() -> tuple[str, str]:
    """Return the page, and the part of its policy that lets its own script and style run."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = page_style() + _part("ui.css"), _part("ui.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    html = environment.from_string(_part("ui.html.jinja")).render(
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        version=__version__,
        folder=printable(str(Path.cwd())),
        actions=ACTIONS,
        choices=_CHOICES,
        recipes=_recipes(),
        models=[*_places(), *PUBLISHED],
        preset=_PRESET,
        common=_COMMON,
    )
    return html, f"script-src {_digest(script)}; style-src {_digest(style)}"


def _part(name: str) -> str:
    return resources.files("qwen35.ui").joinpath(name).read_text("utf-8")


def _digest(part: str) -> str:
    """Return the source expression of an inline part of a policy."""
    return f"'sha256-{b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"


def _recipes() -> dict[str, list[tuple[str, str]]]:
    containers = {"convert": "safetensors", "gguf": "gguf", "fit": "gguf"}
    return {
        action: [(name, load_recipe(name, held).description) for name in built_in(held)]
        for action, held in containers.items()
    }


def _places() -> list[str]:
    """Return checkpoints and GGUF files in the working folder, as far as we may look."""
    try:
        paths = sorted(Path.cwd().iterdir())[:_MOST_PLACES]
    except OSError:
        return []
    # Path.is_file raises PermissionError for what is in somebody else's folder
    isfile = os.path.isfile
    return [
        printable(path.name)
        for path in paths
        if path.suffix == ".gguf" or isfile(path / "config.json")
    ]
