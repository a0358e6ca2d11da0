"""What a source's model card says in its front matter: licence, base, datasets, languages.

Manifests record it, and the card of what was made says it again. Cards and manifests are foreign:
whatever is not a word of the expected kind is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwen35.checkpoint.source import Checkpoint

__all__ = ["card_words", "source_card"]

_CARD = "README.md"
_MAX_BYTES = 2**20
_MAX_CHARACTERS = 2**17
"""Bound on front matter: PyYAML takes a second for that much."""

_MOST = 200
"""Bound on the items of a list."""

_HUB_ID = r"[\w][\w.-]{0,95}/[\w.-]{1,96}"
_WORDS: dict[str, str] = {
    "license": r"[\w.+-]{1,64}",
    "license_name": r"[\w .+-]{1,96}",
    "license_link": r"https://[^\s<>\"'`()\[\]|\\]{1,500}|[\w.-]{1,96}",
    "base_model": _HUB_ID,
    "datasets": rf"{_HUB_ID}|[\w][\w.-]{{0,95}}",
    "language": r"[A-Za-z]{2,8}(?:-\w{1,8}){0,3}|[Cc]ode|multilingual",
}
"""Keys of front matter that a card made from it repeats, with what a word of each is."""

_LISTS = ("base_model", "datasets", "language")


def source_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint's model card says; nothing without one that can be read."""
    import yaml  # late: most commands need none

    place = checkpoint.place
    size = place.sizes().get(_CARD) if place is not None else None
    if place is None or size is None or size > _MAX_BYTES:
        return {}
    lines = place.read(_CARD, 0, size).decode(errors="replace").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    matter = "\n".join(lines[1 : lines.index("---", 1)])
    if len(matter) > _MAX_CHARACTERS:
        return {}
    try:  # the base loader leaves every scalar as it is written: "no" is a language
        parsed = yaml.load(matter, yaml.BaseLoader)  # noqa: S506 - it builds texts alone
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}  # no part of the weights, and nobody's input here
    return card_words(parsed)


def card_words(values: object) -> dict[str, Any]:
    """Return the keys and words that a card may have; lists where the Hub takes them.

    >>> card_words({"license": "mit", "language": ["no", 3], "datasets": "a/b", "x": "y"})
    {'license': 'mit', 'datasets': ['a/b'], 'language': ['no']}
    """
    if not isinstance(values, Mapping):
        return {}
    found: dict[str, Any] = {}
    for key, pattern in _WORDS.items():
        value = values.get(key)
        items = value if isinstance(value, list) else [value]
        fit = [one for one in items[:_MOST] if isinstance(one, str) and _is_word(pattern, one)]
        words = list(dict.fromkeys(fit))
        if words:
            found[key] = words if key in _LISTS else words[0]
    return found


def _is_word(pattern: str, text: str) -> bool:
    """Return whether a text is a word; YAML's null, which the base loader leaves, is none."""
    return text.lower() != "null" and re.fullmatch(pattern, text, re.ASCII) is not None
