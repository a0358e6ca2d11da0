"""What every page has: templates, its style, and its script, which no other may join."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib import resources
from typing import Any

__all__ = ["page_style", "render"]


def render(template: str, **values: Any) -> str:
    """Render a template of this package into a page without network requests."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = _visible
    script = _part("page.js")
    digest = b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.from_string(_part(template)).render(
        style=Markup(page_style()),  # noqa: S704
        script=Markup(script),  # noqa: S704
        policy=Markup(policy),  # noqa: S704
        **values,
    )


def page_style() -> str:
    """Return the style of every page."""
    return _part("style.css")


def _part(name: str) -> str:
    return resources.files("qwen35.reporting").joinpath(name).read_text("utf-8")


def _visible(text: str) -> str:
    r"""Make white space in a token visible.

    >>> _visible(" a"), _visible("\n")
    ('␣a', '⏎')
    """
    return text.replace(" ", "␣").replace("\t", "⇥").replace("\n", "⏎")
