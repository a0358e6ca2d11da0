"""Render strangers' chat templates in a child process with limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.errors import InputError
from qwen35.verification import rendering_child

__all__ = ["Rendered", "render"]

SECONDS = 20
_MEMORY = 2**30


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
        InputError: a template took too long or too much memory.
    """
    job = json.dumps({"templates": list(templates), "with": list(conversations)})
    command = [
        sys.executable,
        "-I",
        str(Path(rendering_child.__file__)),
        str(SECONDS),
        str(_MEMORY),
    ]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, on a file of this package
            command, input=job.encode(), capture_output=True, timeout=2 * SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _too_much() from error
    if done.returncode:
        raise _too_much()
    return [
        [Rendered(text, kind == "error") for kind, text in results]
        for results in json.loads(done.stdout)
    ]


def _too_much() -> InputError:
    expected = f"at most {SECONDS} s and {_MEMORY // 2**20} MiB"
    return InputError(
        "chat template", "takes too long or too much memory to render", expected=expected
    )
