"""Make a Hub repository like a folder, or the other way round, safely.

  init    create the repository if needed; upload what is new or changed
  files   upload the files named with --files
  diff    upload what is new or changed
  check   show what diff would do
  pull    download what is new or changed
  fetch   show what pull would do

A push is one commit on top of the state that was compared, or nothing. Nothing is deleted on either
side without --delete, which goes with diff and pull. A folder of qwen35's gets a model card
(README.md) unless it has its own.

Exit code 0 if done, 1 if something in the folder must not be published, 2 for errors.
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
    "what a push would do": "qwen35 publish OUT me/Qwen3.5-0.8B-bnb-4bit --mode check",
    "do it, in one commit": "qwen35 publish OUT me/Qwen3.5-0.8B-bnb-4bit",
    "make a folder like the repository": "qwen35 publish OUT me/Qwen3.5-0.8B-bnb-4bit --mode pull",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the artifact")
    parser.add_argument("repo", metavar="REPO", help="owner/name")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the old name of the verb shares."""
    parser.add_argument("--mode", choices=get_args(Mode), help="see above (default: init)")
    parser.add_argument(
        "--files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="with mode files: paths in the folder",
    )
    parser.add_argument("--message", help="commit message (default: by mode)")
    parser.add_argument("--private", action="store_true", help="if it is created: private")
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument(
        "--delete", action="store_true", help="also delete what only the side to change has"
    )
    parser.add_argument("--dry-run", action="store_true", help="show, change nothing")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="with a dry run: write the difference to FILE"
    )
    parser.add_argument(
        "--apply", type=Path, metavar="FILE", help="do what FILE says, if it still holds"
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign the folder first, with this key (PEM)"
    )
    parser.add_argument("--base-model", metavar="REPO", help="what the model card names as base")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    given = keywords(args, "apply", "hf_token")
    given |= {"mode": args.mode or "init", "files": tuple(args.files)}
    sync = prepare(
        PublishRequest(**given),
        apply=args.apply,
        given=args.mode is not None,
        token=args.hf_token,
        progress=output.progress(),
    )
    if sync.stopped or sync.asked.dry:
        stopped = list(findings_text(sync.diff))
        text = "\n".join([diff_text(sync.diff), *stopped])
        output.data(text, PublishResult(sync.diff).to_json())
        return EXIT_FINDINGS if stopped else 0
    sync = sync.finished()
    output.line(diff_text(sync.diff))
    done = sync.carry_out(output.progress())
    output.notes(done.notes)
    output.data(done.text, done.to_json())
    return 0
