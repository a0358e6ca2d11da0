"""Measure perplexity and KL divergence of quantized models against the unquantized one.

Prints the table of llama-perplexity --kl-divergence, with a column per candidate in any format.
Base and candidates run side by side, chunk by chunk, so no logits go to disk. Without candidates,
prints the perplexity of BASE, which may then be quantized. Repeat an interrupted run with --report
or --resume to continue it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.evaluate_api import (
    SIMULATED,
    evaluate,
    evaluate_lm_eval,
    evaluate_tasks,
    prepared,
    state_of,
)
from qwen35.api.given_values import refuse_given
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.cli.shared_flags import (
    add_adapter,
    add_chunks,
    add_endpoint,
    add_onto,
    keywords,
    positive,
    size_of,
)
from qwen35.display import counted, size
from qwen35.errors import UsageError

if TYPE_CHECKING:
    from qwen35.evaluation.evaluation_job import EvaluationJob

EXAMPLES = {
    "two artifacts against their source, with an HTML report": (
        "qwen35 evaluate MODEL OUT-nf4 OUT-fp8 --text wiki.test.raw \\\n      --report report"
    ),
    "all GGUF files in a folder, on 20 chunks, with their speed": (
        "qwen35 evaluate OUT/MODEL-F16.gguf OUT --text wiki.test.raw \\\n      --chunks 20 --speed"
    ),
    "the perplexity of one model, quantized or not": (
        "qwen35 evaluate MODEL-Q4_K_M.gguf --text wiki.test.raw"
    ),
    "what a server runs, against its source": (
        "qwen35 evaluate MODEL --endpoint http://127.0.0.1:8000 --text wiki.test.raw"
    ),
    "accuracy of two servers on tasks of one's own": (
        "qwen35 evaluate --tasks tasks.jsonl --endpoint http://127.0.0.1:8000 \\\n"
        "      --endpoint http://127.0.0.1:8001"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "base",
        metavar="BASE",
        nargs="?",
        help="the unquantized model: folder, Hub id or GGUF file; with --tasks, any artifact",
    )
    parser.add_argument(
        "candidates",
        metavar="CANDIDATE",
        nargs="*",
        help="artifacts in any format; a folder of GGUF files gives one candidate per file, "
        "hf:owner/name/path is a file on the Hub",
    )
    add_endpoint(parser, several=True)
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    add_adapter(parser, "merge a LoRA adapter of peft into BASE, a checkpoint; may be repeated")
    add_onto(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to measure on")
    parser.add_argument(
        "--tasks",
        metavar="FILE",
        type=Path,
        help="instead: accuracy of BASE, CANDIDATE and --endpoint on tasks, a JSON object a line",
    )
    parser.add_argument(
        "--lm-eval",
        metavar="TASK,...",
        help="instead: figures of each --endpoint on tasks of lm-eval, the extra",
    )
    parser.add_argument(
        "--include-path", metavar="DIR", type=Path, help="--lm-eval: folder with more tasks"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens per chunk (default: 512)"
    )
    add_chunks(parser, "largest number of chunks (default: the whole text)")
    parser.add_argument("--report", metavar="DIR", type=Path, help=_REPORT_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace the report in DIR")
    parser.add_argument("--resume", metavar="FILE", type=Path, help=_RESUME_HELP)
    parser.add_argument("--kl-divergence-base", metavar="FILE", type=Path, help=_KLD_HELP)
    parser.add_argument("--cache", metavar="FILE", type=Path, help=_CACHE_HELP)
    parser.add_argument("--unquantized", metavar="MODEL", help=_UNQUANTIZED_HELP)
    parser.add_argument(
        "--speed",
        action="store_true",
        help="measure tokens per second of GGUF candidates against F16, and of servers",
    )
    parser.add_argument(
        "--device", default="auto", help="for transformers: auto, cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument("--memory", type=size_of, metavar="SIZE", help=_MEMORY_HELP)
    parser.add_argument("--streamed", action="store_true", help=_STREAMED_HELP)
    parser.add_argument("--simulate", choices=[SIMULATED], help=_SIMULATE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")


_REPORT_HELP = "write report.json and report.html into DIR"
_RESUME_HELP = "keep results of an unfinished run in FILE, to resume from (default: beside DIR)"
_KLD_HELP = "llama-perplexity file: read instead of running BASE if it exists, otherwise written"
_CACHE_HELP = "compact reference, 50 times smaller: read if it exists, otherwise written"
_MEMORY_HELP = "most memory to use, e.g. 16GB: models that do not fit run layer by layer"
_STREAMED_HELP = "run models layer by layer, in float32: GGUF files too, without llama.cpp"
_SIMULATE_HELP = (
    "with --streamed, a further column for GGUF files, with llama.cpp's inputs of layers"
)
_UNQUANTIZED_HELP = (
    "BASE in the other engine's format, for the noise floor between engines (default: made from "
    "BASE; required if BASE is a GGUF file and a candidate is not)"
)


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    from qwen35.evaluation.evaluation_table import report_text

    if args.lm_eval is not None:
        return _lm_eval(args, output)
    refuse_given({"--include-path": args.include_path}, "is for --lm-eval")
    if args.tasks is not None:
        return _tasks(args, output)
    if args.base is None:
        hint = "name the unquantized model, or --tasks to ask a server"
        raise UsageError("BASE", "missing", hint=hint)
    if args.dry_run:
        refuse_given({"--serve": args.serve}, "is not for --dry-run, which starts nothing")
        return _dry_run(args, output)
    report = evaluate(**keywords(args, "dry_run", *_OTHER_WAYS), progress=output.progress("chunks"))
    if args.report is not None:
        output.info(f"{args.report}: report.json and report.html")
    output.data(report_text(report, output.width), report.to_json())
    return EXIT_FINDINGS if report.findings else 0


_OTHER_WAYS = ("tasks", "lm_eval", "include_path")
_SERVERS = ("endpoint", "served_model", "api_key_env", "timeout", "serve")
_SERVER_FLAGS = (*_SERVERS, "json", "quiet", "device")
_TASK_FLAGS = ("tasks", "base", "candidates", "threads", "hf_token", *_SERVER_FLAGS)
_LM_EVAL_FLAGS = ("lm_eval", "include_path", *_SERVER_FLAGS)


def _refuse_others(args: argparse.Namespace, allowed: Sequence[str], what: str) -> None:
    """Refuse flags about divergence."""
    names = {"base": "BASE", "candidates": "CANDIDATE"}
    others = {
        names.get(name, f"--{name.replace('_', '-')}"): value
        for name, value in vars(args).items()
        if name not in allowed
    }
    refuse_given(others, f"is not for {what}")


def _lm_eval(args: argparse.Namespace, output: Console) -> int:
    """Run tasks of lm-eval."""
    _refuse_others(args, _LM_EVAL_FLAGS, "--lm-eval")
    report = evaluate_lm_eval(
        args.lm_eval.split(","),
        **{name: getattr(args, name) for name in _SERVERS},
        include_path=args.include_path,
        progress=output.progress("questions"),
    )
    output.data(report.text(output.width), report.to_json())
    return 0


def _tasks(args: argparse.Namespace, output: Console) -> int:
    """Measure accuracy; other flags are about divergence."""
    _refuse_others(args, _TASK_FLAGS, "--tasks")
    report = evaluate_tasks(
        args.tasks,
        models=[] if args.base is None else [args.base, *args.candidates],
        **{name: getattr(args, name) for name in _SERVERS},
        threads=args.threads,
        hf_token=args.hf_token,
        progress=output.progress("tasks"),
    )
    output.data(report.text(output.width), report.to_json())
    return 0


def _dry_run(args: argparse.Namespace, output: Console) -> int:
    job = prepared(**keywords(args, "dry_run", "speed", "serve", *_OTHER_WAYS))
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
        "streamed": _stream_json(job),
        "state": str(state) if state else None,
    }


def _temporary(job: EvaluationJob) -> str:
    merged = ["the base with its adapters"] if job.merged else []
    floor = ["the base as F16 GGUF for the noise floor"] if job.floor_to_make else []
    return " and ".join(merged + floor)


def _stream_json(job: EvaluationJob) -> dict[str, object] | None:
    if job.stream is None:
        return None
    stream, sizes = job.stream, job.stream.sizes
    own = {"why": stream.why, "group": stream.group, "states": stream.states}
    return {"layer": sizes.layer, "batch": sizes.batch, "wide": sizes.wide, **own}


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
        f"{counted(chunks.count, 'chunk')} of {chunks.context} tokens, "
        f"{chunks.count * chunks.scored} scored",
        f"peak memory at most about {size(job.memory)} with {counted(job.threads, 'thread')}",
    ]
    if job.stream is not None:
        why = f" ({job.stream.why})" * bool(job.stream.why)
        where = "beside its results" if state else "in the temporary folder"
        lines.append(
            f"layer by layer{why}: a layer of {size(job.stream.sizes.layer)}, hidden states of "
            f"{size(job.stream.states)} {where}, removed afterwards"
        )
    if job.reference_file is not None:
        lines.append(f"reads {job.reference_file} instead of running the base")
    lines += [f"writes {path}, at most {size(nbytes)}" for path, nbytes in job.writes.items()]
    if job.temporary:
        lines.append(
            f"writes {_temporary(job)}, about {size(job.temporary)} in the temporary folder, "
            "removed afterwards"
        )
    if state is not None:
        lines.append(f"keeps results in {state} until the run is complete ({size(job.results)})")
    return "\n".join(lines)
