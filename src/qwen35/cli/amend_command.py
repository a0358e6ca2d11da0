"""Record edits of an artifact's small files, so that verify, publish and reproduce accept them.

Checks that the weights are those that were written and that edited sidecars can be read, then
records in qwen35.json what changed, when and why. Sidecars are edited in place, before; a chat
template can be given as a file, which GGUF files need: it is a part of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.amend_api import amend
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import keywords
from qwen35.display import printable

EXAMPLES = {
    "after an edit of generation_config.json or chat_template.jinja": (
        'qwen35 amend OUT --why "temperature of the model card"'
    ),
    "another chat template for all GGUF files of a folder": (
        "qwen35 amend OUT --chat-template fixed.jinja"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the artifact")
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="put this template into the artifact, GGUF files included",
    )
    parser.add_argument(
        "--why", default="", metavar="TEXT", help="the reason, for manifest and model card"
    )
    parser.add_argument("--dry-run", action="store_true", help="only check, write nothing")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    result = amend(**keywords(args), progress=output.progress())
    lines = [f"[{one.check}] {one.subject}: {one.message}" for one in result.findings]
    if lines:
        lines.append(f"{result.out}: nothing recorded")
    elif result.files:
        verb = "would be recorded" if args.dry_run else "recorded"
        lines.append(f"{result.out}: {verb}: {', '.join(result.files)}")
    else:
        lines.append(f"{result.out}: as its manifest says, nothing to record")
    output.data("\n".join(map(printable, lines)), result.to_json())
    return EXIT_FINDINGS if result.findings else 0
