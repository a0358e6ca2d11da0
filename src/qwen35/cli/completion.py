"""Scripts that complete `qwen35` in a shell, made from the parsers of the verbs by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from qwen35.cli.help import spellings
from qwen35.cli.main import whole_parser
from qwen35.gguf.rules import BUILT_IN as GGUF_RECIPES
from qwen35.plan.recipe import BUILT_IN

__all__ = ["script"]

_FOLDERS = ("DIR", "MODEL", "OUT", "OUTDIR")
_FILES = ("BASE", "CANDIDATE", "FILE", "FILE.toml | MODEL OUT", "KEY", "MANIFEST")
"""What arguments are, by their metavar; others are completed by their choices, or not at all."""


def script(shell: str) -> str:
    """Return the script for a shell, one of `qwen35.cli.main.SHELLS`."""
    import shtab

    parser = whole_parser()
    for action in _actions(parser):
        action.option_strings = spellings(action)
        completed = _completed(shtab, action)
        if completed is not None:
            action.complete = completed  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell)
    return text.rstrip()


def _completed(shtab: Any, action: argparse.Action) -> dict[str, str] | None:
    """Return what completes an argument in each shell."""
    if action.dest == "recipe":
        names = GGUF_RECIPES if action.default in GGUF_RECIPES else BUILT_IN
        found: dict[str, str] = shtab.cmd(f"printf '%s\\n' {' '.join(names)}")
        return found
    if action.metavar in _FOLDERS:
        return dict(shtab.DIRECTORY)
    return dict(shtab.FILE) if action.metavar in _FILES else None


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield all arguments of all verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from verb._actions
        else:
            yield action
