"""A parser of one command's arguments that answers a mistake with one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

from qwen35.cli.help import spellings
from qwen35.errors import UsageError, did_you_mean

__all__ = ["CommandParser"]

_N = TypeVar("_N")
_BAD_CHOICE = re.compile(r"invalid choice: (['\"])(?P<value>.*)\1 \(choose from ")

_SHARDS = {
    "--keep-shards": "files hold 5 GB each, or with --keep-shards what the source's hold",
    "--split-max-size": "did you mean --split-max-size?",
}
_OF_OTHERS = {
    **dict.fromkeys(("--max-shard-size", "--shard-size"), _SHARDS),
    "--lora": {"--adapter": "did you mean --adapter?"},
}
"""Options of other tools; by the first of these of ours that a command has, what to say."""


class CommandParser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse prints the usage and leaves.

    Attributes:
        elsewhere: returns the commands that know an option, by its name.
    """

    elsewhere: Callable[[str], Iterable[str]] = staticmethod(lambda _: ())

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: _N | None = None
    ) -> argparse.Namespace | _N:
        """Parse `args`.

        Raises:
            UsageError: an option is unknown or has no valid value, or an argument is missing or
                one too many.
        """
        assert args is not None
        for argument in _options(args):
            if argument not in self._option_string_actions:
                raise self._unknown_option(argument)
        self.exit_on_error = False
        try:
            parsed, left = self.parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise self._wrong_value(error) from error
        if left and left[0].startswith("-"):
            raise self._unknown_option(left[0])
        if left:
            expected = " ".join(self._argument_names()) or "options only"
            hint = self._joined(args, left[0]) or self._help()
            raise UsageError(left[0], "one argument too many", expected=expected, hint=hint)
        return parsed

    def _joined(self, args: Sequence[str], extra: str) -> str:
        """Return how to write a list that somebody wrote with spaces; empty if it is none."""
        at = list(args).index(extra)
        option, value = args[max(0, at - 2) : at] if at >= 2 else ("", "")
        action = self._option_string_actions.get(option)
        several = action is not None and str(action.metavar).endswith(",...")
        return f"write {option} {value},{extra}" if several else ""

    def error(self, message: str) -> NoReturn:
        """Raise `message`: argparse calls this for required arguments, which it names itself.

        Raises:
            UsageError: always.
        """
        raise UsageError(self.prog, message, hint=self._help())

    def _unknown_option(self, option: str) -> UsageError:
        names = [name for action in self._actions for name in spellings(action)]
        known = _OF_OTHERS.get(option.replace("_", "-"), {})
        hint = next((known[name] for name in known if name in names), "")
        hint = hint or did_you_mean(option, (name for name in names if name.startswith("--")))
        if not hint:
            others = sorted(self.elsewhere(option))
            hint = f"it is an option of {', '.join(others)}" if others else self._help()
        return UsageError(option, f"not an option of {self.prog}", hint=hint)

    def _wrong_value(self, error: argparse.ArgumentError) -> UsageError:
        if error.argument_name is None:
            return UsageError(self.prog, error.message, hint=self._help())
        subject = error.argument_name.partition("/")[0]
        choice = _BAD_CHOICE.match(error.message)
        action = self._option_string_actions.get(subject)
        if choice is None or action is None or action.choices is None:
            return UsageError(subject, error.message)
        known = [str(name) for name in action.choices]
        hint = did_you_mean(choice["value"], known)
        return UsageError(subject, repr(choice["value"]), expected=" or ".join(known), hint=hint)

    def _argument_names(self) -> list[str]:
        actions = (action for action in self._actions if not action.option_strings)
        return [str(action.metavar or action.dest) for action in actions]

    def _help(self) -> str:
        return f"{self.prog} --help shows all"


def _options(arguments: Sequence[str]) -> Iterable[str]:
    """Yield the names that argparse takes for options: no values begin like them."""
    for argument in arguments:
        if argument == "--":
            return
        if argument.startswith("--") and " " not in argument:
            yield argument.partition("=")[0]
