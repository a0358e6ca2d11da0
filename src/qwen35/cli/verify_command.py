"""Check an artifact: its structure from headers, every number, or its answers.

With --endpoint, asks the server that runs it: answers, streams, tool calls, template switches.

Exit code 0 if nothing is wrong, 1 with findings, 2 if there is nothing to check.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from qwen35.api.verify_api import verify
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import (
    add_adapter,
    add_endpoint,
    add_model,
    add_mtp_from,
    keywords,
    positive,
)
from qwen35.verification.verdict import Depth, Engine
from qwen35.verification.verdict_display import verdict_text

EXAMPLES = {
    "config, headers and hashes of an artifact, in seconds": "qwen35 verify OUT",
    "every number and every copied byte against its source": (
        "qwen35 verify OUT --source Qwen/Qwen3.5-0.8B"
    ),
    "also load it and ask it questions": (
        "qwen35 verify OUT --source Qwen/Qwen3.5-0.8B --depth behaviour"
    ),
    "ask the server that runs it": (
        "qwen35 verify --endpoint http://127.0.0.1:8000 --source Qwen/Qwen3.5-0.8B"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, optional=True, files=True)
    add_endpoint(parser)
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="--endpoint: also ask about an input of N tokens",
    )
    parser.add_argument("--source", metavar="MODEL", help="checkpoint that it was made from")
    add_adapter(parser, "an adapter merged into it; its weight is in qwen35.json; may be repeated")
    add_mtp_from(parser, "the checkpoint whose MTP layer it has, if a folder")
    parser.add_argument(
        "--hessian",
        type=Path,
        metavar="DIR",
        help="the Hessians that refined its codes: compares errors in outputs too",
    )
    parser.add_argument(
        "--depth",
        choices=get_args(Depth),
        help="structure: headers and small files; numbers: every byte (default with --source); "
        "behaviour: also load it and ask it questions",
    )
    parser.add_argument(
        "--engine",
        choices=get_args(Engine),
        help="engine for checkpoints at depth behaviour (default: transformers); "
        "GGUF files use llama.cpp",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=positive,
        metavar="N",
        help="FP8: check that N GPUs can split every weight in whole tiles of 128",
    )
    parser.add_argument(
        "--record", action="store_true", help="write the result into the artifact's qwen35.json"
    )


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    reads = args.endpoint is None and (args.source or args.depth not in (None, "structure"))
    asks = args.endpoint is not None or args.depth == "behaviour"
    shown = output.progress() if reads else None
    asking = output.progress("questions") if asks else None
    verdict = verify(**keywords(args), progress=shown, questions=asking)
    output.data(verdict_text(verdict), verdict.to_json())
    return 0 if verdict.passed else EXIT_FINDINGS
