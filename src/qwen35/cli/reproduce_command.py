"""Rebuild an artifact from its manifest and compare it byte for byte.

MANIFEST is a qwen35.json, its folder or a Hub id. The source named in it is fetched at its commit.
Exit code 0 if every file is the same, 1 if any differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.api.reproduce_api import reproduce
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import keywords, positive

EXAMPLES = {
    "rebuild an artifact of a repository and compare": (
        "qwen35 reproduce me/Qwen3.5-0.8B-bnb-4bit"
    ),
    "an artifact whose source is a local folder": "qwen35 reproduce OUT --source MODEL",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("manifest", metavar="MANIFEST", help="qwen35.json, its folder or a Hub id")
    parser.add_argument(
        "--source", metavar="MODEL", help="its source, if not the one in the manifest"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="the adapter merged into it; may be repeated",
    )
    parser.add_argument(
        "--mtp-from", metavar="MODEL", help="the checkpoint whose MTP layer it has, if a folder"
    )
    parser.add_argument(
        "--activation-stats", type=Path, metavar="FILE", help="the statistics used for it"
    )
    parser.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="GGUF: the importance matrix used for it"
    )
    parser.add_argument(
        "--hessian", type=Path, metavar="DIR", help="the Hessians that refined its codes"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="keep the rebuilt artifact here (default: temporary)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    result = reproduce(**keywords(args), progress=output.progress())
    lines = [f"DIFFERS {finding.subject}: {finding.message}" for finding in result.findings]
    if result.findings:
        lines += [f"note: {note}" for note in result.notes]
    outcome = "not reproduced" if result.findings else "reproduced, byte for byte"
    lines.append(f"{args.manifest}: {len(result.files)} files, {outcome}")
    output.data("\n".join(lines), result.to_json())
    return EXIT_FINDINGS if result.findings else 0
