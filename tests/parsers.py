"""What a parser of a command line knows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["actions_of", "defaults"]


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return its flags and arguments, ``--help`` first; argparse has no public list of them."""
    return parser._actions


def defaults(add: Callable[[argparse.ArgumentParser], Any]) -> dict[str, object]:
    """Return the defaults of what `add` adds to a parser."""
    parser = argparse.ArgumentParser()
    add(parser)
    return {action.dest: action.default for action in actions_of(parser) if action.dest != "help"}
