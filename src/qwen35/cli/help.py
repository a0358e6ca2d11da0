"""How help is laid out: paragraphs folded to the width, each option named once."""

from __future__ import annotations

import argparse
import textwrap

__all__ = ["Formatter"]


class Formatter(argparse.RawDescriptionHelpFormatter):
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

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Leave out spellings with underscores beside those with hyphens, and say values once."""
        known = action.option_strings
        names = [n for n in known if "_" not in n or n.replace("_", "-") not in known]
        if not names or action.nargs == 0:
            return ", ".join(names) or super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {value}"
