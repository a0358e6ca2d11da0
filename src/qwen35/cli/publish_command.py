"""Sync a folder with a Hub repository, in either direction.

  init    create the repository if needed; upload new and changed files
  files   upload the files named with --files
  diff    upload new and changed files
  check   show what diff would do
  pull    download new and changed files
  fetch   show what pull would do

A push is one commit on top of the compared state, or nothing. Nothing is deleted on either side
without --delete, which works with diff and pull. A folder written by qwen35 gets a model card
(README.md) unless it has one.

Exit code 0 on success, 1 if the folder holds something that must not be published, 2 for errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.publish_api import Mode, PublishRequest, PublishResult, prepare
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import keywords
from qwen35.publishing.diff_display import diff_text, findings_text

EXAMPLES = {
    "show what a push would do": "qwen35 publish OUT me/Qwen3.5-0.8B-bnb-4bit --mode check",
    "push, in one commit": "qwen35 publish OUT me/Qwen3.5-0.8B-bnb-4bit",
    "download into a folder": "qwen35 publish OUT me/Qwen3.5-0.8B-bnb-4bit --mode pull",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the artifact")
    parser.add_argument("repo", metavar="REPO", help="owner/name")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared with the old command."""
    parser.add_argument("--mode", choices=get_args(Mode), help="see above (default: init)")
    parser.add_argument(
        "--files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="with mode files: paths in the folder",
    )
    parser.add_argument("--message", help="commit message (default: by mode)")
    parser.add_argument(
        "--private", action="store_true", help="make a newly created repository private"
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument(
        "--delete", action="store_true", help="also delete files that only the target has"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="pull: also replace files that were changed here"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the difference, change nothing"
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="with a dry run: write the difference to FILE"
    )
    parser.add_argument(
        "--apply",
        type=Path,
        metavar="FILE",
        help="apply the difference in FILE, if it is still current",
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="first sign the folder with this key (PEM)"
    )
    parser.add_argument("--base-model", metavar="REPO", help="base named in the model card")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    request = keywords(args, "apply", "hf_token")
    request |= {"mode": args.mode or "init", "files": tuple(args.files)}
    sync = prepare(
        PublishRequest(**request),
        apply=args.apply,
        explicit_mode=args.mode is not None,
        token=args.hf_token,
        progress=output.progress(),
    )
    if sync.stopped or sync.request.dry:
        findings = list(findings_text(sync.diff))
        text = "\n".join([diff_text(sync.diff), *findings])
        output.data(text, PublishResult(sync.diff).to_json())
        return EXIT_FINDINGS if findings else 0
    sync = sync.finished()
    output.line(diff_text(sync.diff))
    result = sync.carry_out(output.progress())
    output.notes(result.notes)
    output.data(result.text, result.to_json())
    return 0
