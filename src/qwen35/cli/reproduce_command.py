"""Make an artifact again from its manifest, and compare it byte for byte.

MANIFEST is a qwen35.json, the folder it lies in or a Hub id. The source named there is fetched at
its commit. Exit code 0 if every file is the same, 1 if one is not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.reproduce_api import reproduce
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import keywords, positive

EXAMPLES = {
    "make an artifact of a repository again, and compare": (
        "qwen35 reproduce me/Qwen3.5-0.8B-bnb-4bit"
    ),
    "one whose source is a folder here": "qwen35 reproduce OUT --source MODEL",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("manifest", metavar="MANIFEST", help="qwen35.json, its folder or a Hub id")
    parser.add_argument("--source", metavar="MODEL", help="where its source is, if elsewhere")
    parser.add_argument(
        "--activation-stats", type=Path, metavar="FILE", help="FP8: the statistics it was made with"
    )
    parser.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="GGUF: the importance matrix it was made with"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="keep what is made here (default: in TMPDIR)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    made = reproduce(**keywords(args), progress=output.progress())
    lines = [f"DIFFERS {finding.subject}: {finding.message}" for finding in made.findings]
    if made.findings:
        lines += [f"note: {note}" for note in made.notes]
    result = "not reproduced" if made.findings else "reproduced, byte for byte"
    lines.append(f"{args.manifest}: {len(made.files)} files, {result}")
    output.data("\n".join(lines), made.to_json())
    return EXIT_FINDINGS if made.findings else 0
