"""Make a Hub repository like a folder, or the other way round, safely.

  init    create the repository if needed; upload what is new or changed (default)
  files   upload the files named with --files
  diff    upload what is new or changed; with --delete, delete what the folder does not have
  check   show what diff would do
  pull    download what is new or changed; with --delete, remove what the repository does not have
  fetch   show what pull would do

A push is one commit on top of the state that was compared, or nothing. Nothing is deleted on either
side without --delete. A folder of qwen35's gets a model card (README.md) unless it has its own.
Exit code 0 if done, 1 if something in the folder must not be published, 2 for errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.cli.output import Output
from qwen35.errors import UsageError
from qwen35.publish.diff import Diff, check_same, load_diff
from qwen35.publish.show import counters, diff_text, findings_text

if TYPE_CHECKING:
    from qwen35.publish.sync import Target

MODES = ("init", "files", "diff", "check", "pull", "fetch")
PULLS = ("pull", "fetch")
DRY = ("check", "fetch")
MESSAGES = {"init": "Upload model", "files": "Update files", "diff": "Push changed files"}
EXIT_FINDINGS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the artifact")
    parser.add_argument("repo", metavar="REPO", help="owner/name")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the old name of the verb shares."""
    parser.add_argument("--mode", choices=MODES, help="see above (default: init)")
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


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    from qwen35.publish.sync import Target, check_token, finish_folder, save_diff

    saved = load_diff(args.apply) if args.apply else None
    if saved:
        _follow(args, saved)
    mode = args.mode or "init"
    dry = args.dry_run or mode in DRY
    _check(args, mode, dry)
    target = Target.of(args.folder, args.repo, args.hf_token, output.progress())
    if not dry and mode not in PULLS:
        check_token(target)
    diff = _diff(args, mode, target)
    if saved:
        check_same(saved, diff)
    if args.save:
        save_diff(diff, args.save)
    if diff.findings or dry:
        stopped = list(findings_text(diff))
        text = "\n".join([diff_text(diff), *stopped])
        output.data(text, {**diff.to_json(), "counters": counters(diff)})
        return EXIT_FINDINGS if stopped else 0
    if mode in ("init", "diff") and finish_folder(
        target, base_model=args.base_model, signing_key=args.sign
    ):
        diff = _diff(args, mode, target)
    output.line(diff_text(diff))
    done, value = (_pull if mode in PULLS else _push)(args, mode, target, diff, output)
    output.data(done, {**diff.to_json(), "counters": counters(diff), **value})
    return 0


def _follow(args: argparse.Namespace, saved: Diff) -> None:
    """Take mode, files and deletion from a saved difference."""
    if args.mode or args.files or args.delete:
        raise UsageError("--apply", "brings its own mode, files and deletions", hint="leave yours")
    if saved.repo != args.repo:
        raise UsageError(str(args.apply), f"is for {saved.repo}", expected=args.repo)
    push = "files" if saved.only else "diff" if saved.base else "init"
    args.mode = "pull" if saved.direction == "pull" else push
    args.files, args.delete = list(saved.only), saved.delete


def _check(args: argparse.Namespace, mode: str, dry: bool) -> None:
    """Refuse flags that do not go together, before anything is looked at."""
    if (mode == "files") != bool(args.files):
        found = "needs --files" if mode == "files" else "takes no --files"
        raise UsageError(f"--mode {mode}", found)
    if args.delete and mode in ("init", "files"):
        raise UsageError("--delete", f"mode {mode} deletes nothing", hint="use diff or pull")
    if args.save and not dry:
        raise UsageError("--save", "is for a dry run", hint="add --dry-run")
    if args.save and args.save.resolve().is_relative_to(args.folder.resolve()):
        raise UsageError(f"--save {args.save}", "lies in the folder", hint="save it elsewhere")
    if args.sign and (mode in (*PULLS, "files") or dry or args.apply):
        raise UsageError("--sign", "is for a fresh push of the folder", hint="leave it out")


def _diff(args: argparse.Namespace, mode: str, target: Target) -> Diff:
    from qwen35.publish.sync import diff_pull, diff_push

    if mode in PULLS:
        return diff_pull(target, delete=args.delete)
    return diff_push(
        target,
        create=mode in ("init", "check"),
        delete=args.delete,
        only=args.files,
        base_model=args.base_model,
    )


def _push(
    args: argparse.Namespace, mode: str, target: Target, diff: Diff, output: Output
) -> tuple[str, dict[str, str]]:
    from qwen35.publish.push import apply_push

    pushed = apply_push(
        diff,
        target.folder,
        message=args.message or MESSAGES[mode],
        token=target.token,
        private=args.private,
        hasher=target.hasher,
        progress=output.progress(),
    )
    for note in pushed.notes:
        output.info(f"note: {note}")
    done = f"{target.repo}@{pushed.commit[:12]}: "
    done += "holds all of it, verified" if diff.changes else "nothing to do"
    return done, {"commit": pushed.commit}


def _pull(
    args: argparse.Namespace, mode: str, target: Target, diff: Diff, output: Output
) -> tuple[str, dict[str, str]]:
    from qwen35.publish.pull import apply_pull

    del args, mode
    pulled = apply_pull(
        diff,
        target.folder,
        token=target.token,
        hasher=target.hasher,
        progress=output.progress(),
    )
    return f"{pulled.folder}: as {target.repo}@{pulled.commit[:12]}", {"commit": pulled.commit}
