"""What a parser of a command line knows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["actions_of", "defaults", "shown_actions_of"]


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return its flags and arguments, ``--help`` first; argparse has no public list of them."""
    return parser._actions


def shown_actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what its help shows: without former names, which still work."""
    return [action for action in actions_of(parser) if action.help != argparse.SUPPRESS]


def defaults(add: Callable[[argparse.ArgumentParser], Any]) -> dict[str, object]:
    """Return the defaults of what `add` adds to a parser."""
    parser = argparse.ArgumentParser()
    add(parser)
    return {action.dest: action.default for action in actions_of(parser) if action.dest != "help"}
