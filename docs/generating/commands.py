"""Every command with its arguments, from the commands' own parsers."""

from __future__ import annotations

import argparse
import importlib
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from generating.markdown import cell, code, heading, table
from qwen35.cli.main import VERBS, run_verb

__all__ = ["commands_page", "old_commands", "old_commands_page", "parsers"]

_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_LEAD = (
    "MODEL is a folder, a Hub id (`owner/name[@revision]`) or, for verbs that only read headers, "
    "a published size such as `Qwen3.5-9B`. Data goes to stdout, everything else to stderr. All "
    "commands share the same [exit codes](runtime.md#exit-codes)."
)
_OLD_LEAD = (
    "The commands of the earlier toolkits, which call the same functions; "
    "[migration](../migration.md) gives their new equivalents and the differences."
)

_UNTITLED = ("positional arguments", "options")
"""argparse's names for the groups that every command has."""


class _CapturedError(Exception):
    """Carries a parser out of the command that creates it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _parser_of(run: Callable[[], Any]) -> argparse.ArgumentParser:
    """Return the parser that a command creates, without parsing."""

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _CapturedError(self)

    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
            run()
    except _CapturedError as captured:
        return captured.parser
    raise AssertionError("a command that parses nothing")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every verb of `qwen35`, by ``qwen35 VERB``."""
    return {f"qwen35 {verb}": _parser_of(partial(run_verb, verb, [])) for verb in VERBS}


def old_commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every other command that the package installs, by name."""
    scripts = tomllib.loads(_PYPROJECT.read_text("utf-8"))["project"]["scripts"]
    found = {}
    for name, target in sorted(scripts.items()):
        if name == "qwen35":
            continue
        module, _, function = target.partition(":")
        command = getattr(importlib.import_module(module), function)
        found[name] = _parser_of(partial(command, []))
    return found


def commands_page() -> str:
    """Return the page of the verbs."""
    rows = ([f"[`qwen35 {verb}`](#qwen35-{verb})", cell(text)] for verb, text in VERBS.items())
    lines = [*heading("Commands", _LEAD), *table(("command", "does"), rows)]
    for name, parser in parsers().items():
        lines += _section(name, parser)
    return "\n".join(lines).rstrip() + "\n"


def old_commands_page() -> str:
    """Return the page of the old names."""
    lines = heading("Old commands", _OLD_LEAD)
    for name, parser in old_commands().items():
        lines += _section(name, parser)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (f"## {name}", "")
    yield from (f"`{name} {_synopsis(parser)}`".replace(" `", "`"), "")
    yield from _prose(parser.description or "")
    groups: dict[str, list[tuple[str, str]]] = {}
    for group in parser._action_groups:
        title = "" if group.title in _UNTITLED else str(group.title)
        rows = [_row(action, parser) for action in group._group_actions if _shown(action)]
        groups.setdefault(title, []).extend(rows)
    for title, rows in groups.items():
        if rows:
            yield from (f"**{title}**", "") if title else ()
            yield from table(("argument", "meaning"), rows)
    yield from _prose(parser.epilog or "")


def _synopsis(parser: argparse.ArgumentParser) -> str:
    words = []
    for action in filter(_shown, parser._actions):
        if not action.option_strings:
            words.append(_positional(action))
        elif action.required:
            words.append(f"{action.option_strings[0]} {_value(action)}")
    return " ".join([*words, "[options]"])


def _positional(action: argparse.Action) -> str:
    name = _value(action)
    many = {"?": f"[{name}]", "*": f"[{name}...]", "+": f"{name}..."}
    return many.get(str(action.nargs), name)


def _shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _value(action: argparse.Action) -> str:
    """Return the placeholder of the value: its metavar, its choices, or its name."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest if not action.option_strings else action.dest.upper()


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> tuple[str, str]:
    value = _value(action)
    if not action.option_strings:
        return code(_positional(action)), _meaning(action, parser)
    many = "..." if action.nargs in ("+", "*") else ""
    spelled = ", ".join(action.option_strings)
    return code(f"{spelled} {value}{many}".strip()), _meaning(action, parser)


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    default = action.default
    none = default is None or default is False or default in ([], argparse.SUPPRESS)
    if not none and "default" not in text:
        text = f"{text} (default: {default})"
    return cell(f"{text} (required)" if action.option_strings and action.required else text)


def _prose(text: str) -> Iterator[str]:
    """Return argparse text as Markdown: paragraphs, and indented parts as blocks."""
    for part in text.strip("\n").split("\n\n"):
        if not part.strip():
            continue
        if any(line.startswith("  ") for line in part.splitlines()):
            yield from ("```text", *part.splitlines(), "```", "")
        else:
            yield from (cell(part), "")
