"""Render strangers' chat templates: only in a child process with limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.errors import InputError
from qwen35.planning.bounded_child import Limits, run_bounded
from qwen35.planning.safetensors_files.chat_template import MAX_LENGTH
from qwen35.verification import rendering_child

__all__ = ["LIMITS", "Rendered", "render"]

LIMITS = Limits(seconds=3, memory=2**29, output=2**26)
_endless: set[bytes] = set()
"""SHA-256 of the templates that went beyond the limits: none is tried twice."""


@dataclass(frozen=True)
class Rendered:
    """What a template made of a conversation.

    Args:
        text: the text, or the error's.
        failed: whether the template raised an error.
    """

    text: str
    failed: bool


def render(
    templates: Sequence[str], conversations: Sequence[Mapping[str, Any]]
) -> list[list[Rendered]]:
    """Render every template with the variables of every conversation.

    Raises:
        InputError: a template is too long, or took too long or too much memory.
    """
    digests = [hashlib.sha256(t.encode(errors="replace")).digest() for t in templates]
    longest = max(map(len, templates), default=0)
    if longest > MAX_LENGTH:
        found = f"{longest} characters"
        raise InputError("chat template", found, expected=f"at most {MAX_LENGTH}")
    if not _endless.isdisjoint(digests):
        raise _too_much()
    job = json.dumps({"templates": list(templates), "with": list(conversations)})
    program = Path(rendering_child.__file__)
    try:
        output, whole = run_bounded(program, job.encode(), LIMITS, ("jinja2", "markupsafe"))
    except OSError as error:
        found = f"cannot be rendered: no process for it ({error.strerror})"
        raise InputError("chat template", found) from error
    lines = output.split(b"\n")[:-1]
    if not whole or len(lines) != len(templates):
        _endless.update(digests[len(lines) : len(lines) + 1])
        raise _too_much()
    return [[Rendered(text, kind == "error") for kind, text in json.loads(line)] for line in lines]


def _too_much() -> InputError:
    found, expected = "takes too long or too much memory to render", f"at most {LIMITS}"
    return InputError("chat template", found, expected=expected)
