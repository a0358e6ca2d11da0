"""How help is laid out: paragraphs folded to the width, each option named once."""

from __future__ import annotations

import argparse
import textwrap

__all__ = ["HelpFormatter", "spellings"]


def spellings(action: argparse.Action) -> list[str]:
    """Return an option's names, without those with underscores beside the same with hyphens."""
    known = action.option_strings
    return [name for name in known if "_" not in name or name.replace("_", "-") not in known]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Folds paragraphs; leaves those with indented lines (lists, commands) as they are."""

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
        """Fold an option's help; a name with hyphens stays whole."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Say values once, behind all names."""
        names = spellings(action)
        if not names or action.nargs == 0:
            return ", ".join(names) or super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {value}"
