"""The switches that a chat template documents, and what it keeps of a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.errors import InputError
from qwen35.verification.bounded_rendering import render

__all__ = ["TemplateText"]

_LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SWITCHES = ("preserve_thinking", "add_vision_id")
"""Variables with which the templates of this family change a prompt, beside ``enable_thinking``."""


@dataclass(frozen=True)
class TemplateText:
    """A chat template.

    Args:
        text: its text.
        tokens: special tokens by name.
    """

    text: str
    tokens: Mapping[str, str]

    @property
    def efforts(self) -> tuple[str, ...]:
        """The levels of ``reasoning_effort`` that it names."""
        if "reasoning_effort" not in self.text:
            return ()
        quoted = set(re.findall(r"""["'](\w+)["']""", self.text))
        return tuple(level for level in _LEVELS if level in quoted)

    @property
    def switches(self) -> tuple[tuple[str, bool], ...]:
        """Other switches that it names, each on and off."""
        words = set(re.findall(r"\w+", self.text))
        return tuple((name, on) for name in _SWITCHES if name in words for on in (True, False))

    def prompts(self, conversations: list[dict[str, Any]]) -> list[str | None]:
        """Return the prompts that it writes; None where it refuses or takes too long."""
        try:
            [results] = render([self.text], [{**self.tokens, **one} for one in conversations])
        except InputError:
            return [None] * len(conversations)
        return [None if one.failed else one.text for one in results]

    def keeps_reasoning(
        self, turns: Callable[..., list[dict[str, Any]]], mode: Mapping[str, Any]
    ) -> bool | None:
        """Whether its prompts hold the reasoning of earlier turns; None if it renders none."""
        shared = {"add_generation_prompt": True, "enable_thinking": False, "tools": None, **mode}
        both = [{"messages": turns(reasoned=one), **shared} for one in (False, True)]
        without, within = self.prompts(both)
        if without is None or within is None:
            return None
        return len(within) > len(without) + 20
