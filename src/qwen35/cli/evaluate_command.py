"""Measure perplexity and KL divergence of quantized models against the unquantized one.

Prints the table of llama-perplexity --kl-divergence, with a column per candidate in any format.
Base and candidates run side by side, chunk by chunk, so no logits go to disk. Without candidates,
prints the perplexity of BASE. Repeat an interrupted run with --report or --resume to continue it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.evaluate_api import evaluate, prepared, state_of
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import keywords, positive, size_of
from qwen35.display import size

if TYPE_CHECKING:
    from qwen35.evaluation.evaluation_job import EvaluationJob

EXAMPLES = {
    "two artifacts against their source, with an HTML report": (
        "qwen35 evaluate MODEL OUT-nf4 OUT-fp8 --text wiki.test.raw \\\n      --report report"
    ),
    "all GGUF files in a folder, on 20 chunks, with their speed": (
        "qwen35 evaluate OUT/MODEL-F16.gguf OUT --text wiki.test.raw \\\n      --chunks 20 --speed"
    ),
    "the perplexity of one model": "qwen35 evaluate MODEL --text wiki.test.raw",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "base", metavar="BASE", help="the unquantized model: folder, Hub id or GGUF file"
    )
    parser.add_argument(
        "candidates",
        metavar="CANDIDATE",
        nargs="*",
        help="artifacts in any format; a folder of GGUF files gives one candidate per file, "
        "hf:owner/name/path is a file on the Hub",
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to measure on")
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens per chunk (default: 512)"
    )
    parser.add_argument(
        "--chunks",
        type=positive,
        metavar="N",
        help="largest number of chunks (default: the whole text)",
    )
    parser.add_argument("--report", metavar="DIR", type=Path, help=_REPORT_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace the report in DIR")
    parser.add_argument("--resume", metavar="FILE", type=Path, help=_RESUME_HELP)
    parser.add_argument("--kl-divergence-base", metavar="FILE", type=Path, help=_KLD_HELP)
    parser.add_argument("--cache", metavar="FILE", type=Path, help=_CACHE_HELP)
    parser.add_argument("--unquantized", metavar="MODEL", help=_UNQUANTIZED_HELP)
    parser.add_argument(
        "--speed",
        action="store_true",
        help="measure tokens per second of GGUF candidates against F16",
    )
    parser.add_argument(
        "--device", default="auto", help="for transformers: auto, cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="refuse to use more, e.g. 16GB"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")


_REPORT_HELP = "write report.json and report.html into DIR"
_RESUME_HELP = "keep results of an unfinished run in FILE, to resume from (default: beside DIR)"
_KLD_HELP = "llama-perplexity file: read instead of running BASE if it exists, otherwise written"
_CACHE_HELP = "compact reference, 50 times smaller: read if it exists, otherwise written"
_UNQUANTIZED_HELP = (
    "BASE in the other engine's format, for the noise floor between engines (default: made from "
    "BASE; required if BASE is a GGUF file and a candidate is not)"
)


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.evaluation.evaluation_table import report_text

    if args.dry_run:
        return _dry_run(args, output)
    report = evaluate(**keywords(args, "dry_run"), progress=output.progress("chunks"))
    if args.report is not None:
        output.info(f"{args.report}: report.json and report.html")
    output.data(report_text(report, output.width), report.to_json())
    return EXIT_FINDINGS if report.findings else 0


def _dry_run(args: argparse.Namespace, output: Console) -> int:
    job = prepared(**keywords(args, "dry_run", "speed"))
    state = state_of(args.resume, args.report)
    output.data(_job_text(job, state), _job_json(job, state))
    return 0


def _job_json(job: EvaluationJob, state: Path | None) -> dict[str, object]:
    chunks = job.chunks
    return {
        "base": job.base.name,
        "candidates": [
            {"name": m.name, "stored": m.stored, "engine": m.engine, "bytes": m.nbytes}
            for m in job.candidates
        ],
        "simulations": [m.name for m in job.simulations],
        "chunks": chunks.count,
        "context": chunks.context,
        "scored": chunks.count * chunks.scored,
        "reads": str(job.reference_file) if job.reference_file else None,
        "writes": {str(path): nbytes for path, nbytes in job.writes.items()},
        "temporary_bytes": job.temporary,
        "peak_memory": job.memory,
        "state": str(state) if state else None,
    }


def _job_text(job: EvaluationJob, state: Path | None) -> str:
    chunks = job.chunks
    lines = [
        f"{job.base.name}: {job.base.stored} in {job.base.engine}, {size(job.base.nbytes)}",
        *(f"  {m.name}: {m.stored} in {m.engine}, {size(m.nbytes)}" for m in job.candidates),
        *(f"  {m.name}: simulated, {m.served_inputs}" for m in job.simulations),
        *(
            f"  {m.name}: its inputs cannot be simulated as config.json has them"
            for m in job.candidates
            if m.unknown_inputs
        ),
        *(f"  noise floor: {m.name} in {m.engine}" for m in job.floors),
        f"{chunks.count} chunks of {chunks.context} tokens, {chunks.count * chunks.scored} scored",
        f"peak memory at most about {size(job.memory)} with {job.threads} threads",
    ]
    if job.reference_file is not None:
        lines.append(f"reads {job.reference_file} instead of running the base")
    lines += [f"writes {path}, at most {size(nbytes)}" for path, nbytes in job.writes.items()]
    if job.temporary:
        lines.append(
            f"writes the base as F16 GGUF for the noise floor, about {size(job.temporary)} in the "
            "temporary folder, removed afterwards"
        )
    if state is not None:
        lines.append(f"keeps results in {state} until the run is complete ({size(job.results)})")
    return "\n".join(lines)
