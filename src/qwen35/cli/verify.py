"""Check an artifact: its structure from headers, every number in it, or what it answers.

Exit code 0 if nothing is wrong, 1 with findings, 2 if there is nothing to check.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.checkpoint.open import GgufFiles, describe, fetch, gguf_files, looks_like_artifact
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, positive
from qwen35.errors import Finding, InputError, UsageError
from qwen35.publish.documents import record_verdict
from qwen35.publish.signing import SIGNATURE_NAME
from qwen35.verify.artifact import Depth, Engine, Verdict, verify
from qwen35.verify.show import verdict_text

EXIT_FINDINGS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)
    parser.add_argument("--source", metavar="MODEL", help="what it was made from")
    parser.add_argument(
        "--depth",
        choices=get_args(Depth),
        help="structure: headers only; numbers: every byte (default with --source); "
        "behaviour: also load it and ask it questions",
    )
    parser.add_argument(
        "--engine",
        choices=get_args(Engine),
        help="what a checkpoint is asked in at depth behaviour (default: transformers); "
        "a GGUF file is asked in llama.cpp",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=positive,
        metavar="N",
        help="FP8: whether N GPUs can share every weight in whole tiles of 128",
    )
    parser.add_argument(
        "--record", action="store_true", help="write the result into the artifact's qwen35.json"
    )


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    folder = _recorded(args) if args.record else None
    verdict = _verdict(args, output)
    if folder is not None:
        record_verdict(folder, verdict)
    output.data(verdict_text(verdict), verdict.to_json())
    return 0 if verdict.passed else EXIT_FINDINGS


def _recorded(args: argparse.Namespace) -> Path:
    """Return the folder whose manifest is to hold the verdict.

    Raises:
        UsageError: it has no manifest, or is signed: another byte would break the signature.
    """
    folder = Path(args.model).expanduser()
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError("--record", f"{args.model} holds no {MANIFEST_NAME}", hint="leave it out")
    if (folder / SIGNATURE_NAME).is_file():
        hint = "remove it, record, then sign again with `qwen35 publish --sign`"
        raise UsageError("--record", f"{SIGNATURE_NAME} signs the manifest as it is", hint=hint)
    return folder


def _verdict(args: argparse.Namespace, output: Output) -> Verdict:
    depth: Depth = args.depth or ("numbers" if args.source else "structure")
    if args.engine and depth != "behaviour":
        hint = "add --depth behaviour, or leave it out"
        raise UsageError("--engine", f"is not used at depth {depth}", hint=hint)
    if files := gguf_files(args.model, token=args.hf_token):
        if args.engine:
            raise UsageError("--engine", "is for checkpoints", expected="llama.cpp, for GGUF")
        return _gguf_verdict(args, files, depth, output)
    opened = describe if depth == "structure" else fetch
    if depth == "structure" and args.source:
        raise UsageError("--source", "is not read at depth structure", hint="leave one of them out")
    try:
        artifact = opened(args.model, token=args.hf_token, lenient=True)
    except InputError as error:
        if not looks_like_artifact(args.model):
            raise
        message = str(error).removeprefix(f"{error.subject}: ")
        finding = Finding("readable", error.subject, message)
        counts = {"weights": 0, "packed": 0, "files": 0}
        return Verdict(args.model, "unreadable", depth, counts, (), (finding,))
    source = fetch(args.source, token=args.hf_token) if args.source else None
    return verify(
        artifact,
        source=source,
        depth=depth,
        threads=args.threads,
        tensor_parallel=args.tensor_parallel,
        engine=args.engine or "transformers",
        progress=None if depth == "structure" else output.progress(),
    )


def _gguf_verdict(
    args: argparse.Namespace, files: GgufFiles, depth: Depth, output: Output
) -> Verdict:
    from qwen35.verify.gguf import verify_gguf

    if depth == "structure" and args.source:
        raise UsageError("--source", "is not read at depth structure", hint="leave one of them out")
    source = fetch(args.source, token=args.hf_token) if args.source else None
    progress = None if depth == "structure" else output.progress()
    return verify_gguf(
        args.model,
        files,
        source=source,
        depth=depth,
        threads=args.threads,
        token=args.hf_token,
        progress=progress,
    )
