"""Shell completion scripts for `qwen35`, generated from the verbs' parsers by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from qwen35.cli.help import spellings
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe import built_in

__all__ = ["script"]

_FOLDERS = ("DIR", "MODEL", "OUT", "OUTDIR")
_FILES = ("BASE", "CANDIDATE", "FILE", "FILE.toml | MODEL OUT", "KEY", "MANIFEST")
"""Kinds of arguments by metavar; others complete to their choices, or not at all."""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion script of a parser for a shell."""
    import shtab  # only this flag needs it

    for action in _actions(parser):
        action.option_strings = spellings(action)
        completed = _completed(shtab, action)
        if completed is not None:
            action.complete = completed  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell)
    return text.rstrip()


def _completed(shtab: Any, action: argparse.Action) -> dict[str, str] | None:
    """Return the completion of an argument for each shell."""
    if action.dest == "recipe":
        recipes = [built_in(container) for container in CONTAINERS]
        matching = [names for names in recipes if action.default in (None, *names)]
        names = [name for group in matching for name in group]
        completion: dict[str, str] = shtab.cmd(f"printf '%s\\n' {' '.join(names)}")
        return completion
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
