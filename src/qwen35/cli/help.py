"""Layout of help texts: wrapped paragraphs, each option named once."""

from __future__ import annotations

import argparse
import textwrap

__all__ = ["HelpFormatter", "spellings"]


def spellings(action: argparse.Action) -> list[str]:
    """Return an option's names, without underscore variants of names with hyphens."""
    names = action.option_strings
    return [name for name in names if "_" not in name or name.replace("_", "-") not in names]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps paragraphs, except those with indented lines (lists, commands)."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            lines = paragraph.splitlines()
            if any(line.startswith(" ") for line in lines):
                paragraphs += [indent + line for line in lines]
            else:
                paragraphs += textwrap.wrap(" ".join(lines), width, break_on_hyphens=False)
            paragraphs.append("")
        return "\n".join(paragraphs).rstrip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap an option's help, without breaking names at hyphens."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Show the value once, after all names."""
        names = spellings(action)
        if not names or action.nargs == 0:
            return ", ".join(names) or super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {value}"
