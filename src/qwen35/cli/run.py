"""Run a path, or a file's own choice of artifacts, through its gates.

  qwen35 run FILE.toml                    what the file says (docs/pipeline.md)
  qwen35 run --path A MODEL OUT           text-only NF4, to train on
  qwen35 run --path B MODEL OUT           text-only, and GGUF with its F16
  qwen35 run --path fp8 MODEL OUT         block FP8, to serve

Each artifact is made, verified, given its card and, if a repository is named, published. A closed
gate stops what depends on it. Run again, and only what is missing or changed is done. Exit code 0
if every gate opened, 1 if one is closed, 2 for errors before anything was done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.cli.output import Output
from qwen35.cli.shared import positive, size_of
from qwen35.errors import Qwen35Error, UsageError
from qwen35.threads import default_threads

if TYPE_CHECKING:
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.pipeline.job import Job
    from qwen35.pipeline.planned import Artifact

EXIT_CLOSED = 1
EXIT_USAGE = 2
PATHS = ("A", "B", "fp8")
DEPTHS = ("structure", "numbers", "behaviour")
_OF_A_PATH = ("types", "imatrix", "depth", "text", "chunks", "repo", "private")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "what", nargs="+", metavar="FILE.toml | MODEL OUT", help="a run's file; or, with --path, "
        "folder or Hub id of the source, and the folder of all artifacts"
    )  # fmt: skip
    group = parser.add_argument_group("instead of a file")
    group.add_argument("--path", action="append", choices=PATHS, help="may be given several times")
    group.add_argument("--types", metavar="T,...", help="path B: types beside its F16")
    group.add_argument("--imatrix", metavar="FILE", help="path B: importance matrix")
    group.add_argument("--depth", choices=DEPTHS, help="of verification (default: behaviour)")
    group.add_argument("--text", type=Path, metavar="FILE", help="measure quality on this text")
    group.add_argument("--chunks", type=positive, metavar="N", help="on so many chunks of it")
    group.add_argument(
        "--repo", metavar="OWNER[/NAME]", help="publish there; names are those of the folders"
    )
    group.add_argument("--private", action="store_true", default=None, help="repositories made")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or a list")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs of other runs")
    parser.add_argument("--dry-run", action="store_true", help="print the graph, touch nothing")


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    from qwen35.checkpoint.open import describe, fetch
    from qwen35.pipeline.graph import make_graph
    from qwen35.pipeline.outcome import outcomes_json, outcomes_text, passed
    from qwen35.pipeline.planned import plan_artifacts, threads_within
    from qwen35.pipeline.run import Options, Runner

    job = _job(args)
    problems: Sequence[Qwen35Error] = job.problems
    if problems:
        return _refuse(problems, output)
    described = describe(job.model, token=args.hf_token)
    artifacts, problems = plan_artifacts(described, job, args.hf_token)
    if problems := [*problems, *_device_problems(args), *_token_problems(args, artifacts)]:
        return _refuse(problems, output)
    threads = threads_within(artifacts, args.threads or default_threads(), args.memory)
    if args.dry_run:
        return _forecast(job, described, artifacts, threads, output)
    source = fetch(job.model, token=args.hf_token, extra=("README.md",))
    artifacts, problems = plan_artifacts(source, job, args.hf_token)
    if problems:
        return _refuse(problems, output)
    runner = Runner(
        job,
        source,
        make_graph(job, artifacts),
        Options(threads, args.device, args.overwrite, args.hf_token),
        progress=output.progress(),
        chunks=output.progress("chunks"),
        tell=output.info,
    )
    outcomes = runner.run()
    output.data(outcomes_text(outcomes), outcomes_json(job, outcomes))
    return 0 if passed(outcomes) else EXIT_CLOSED


def _job(args: argparse.Namespace) -> Job:
    """Return what a file or the flags ask for."""
    from qwen35.pipeline.job import Job, Measuring, path_artifacts
    from qwen35.pipeline.toml import read_job

    if not args.path:
        given = [name for name in _OF_A_PATH if getattr(args, name) is not None]
        if given:
            raise UsageError(f"--{given[0]}", "is for --path", hint="say it in the file")
        if len(args.what) != 1 or not args.what[0].endswith(".toml"):
            expected = "one FILE.toml, or --path with MODEL and OUT"
            raise UsageError("run", " ".join(args.what), expected=expected)
        return read_job(Path(args.what[0]))
    if len(args.what) != 2:
        raise UsageError("--path", f"{len(args.what)} names after it", expected="MODEL OUT")
    model, out = args.what
    types = [name.strip().upper() for name in (args.types or "").split(",") if name.strip()]
    wanted = path_artifacts(args.path, types=types, imatrix=args.imatrix or "")
    if args.chunks and args.text is None:
        raise UsageError("--chunks", "needs --text", hint="leave it out")
    measuring = Measuring(args.text, args.chunks or 0) if args.text else None
    job = Job(model, Path(out), wanted, args.depth or "behaviour", measuring)
    return _published(job, args)


def _published(job: Job, args: argparse.Namespace) -> Job:
    from dataclasses import replace

    from qwen35.pipeline.job import repo_problem

    job = replace(job, private=bool(args.private))
    if args.repo is None:
        return job
    if "/" not in args.repo:
        job = replace(job, owner=args.repo)
        problem = repo_problem("--repo", f"{args.repo}/name")
    else:
        if len(job.artifacts) > 1:
            found = f"one repository for {len(job.artifacts)} artifacts"
            raise UsageError(f"--repo {args.repo}", found, expected="their OWNER")
        job = replace(job, artifacts=(replace(job.artifacts[0], repo=args.repo),))
        problem = repo_problem("--repo", args.repo)
    if problem:
        raise problem
    return job


def _device_problems(args: argparse.Namespace) -> list[Qwen35Error]:
    from qwen35.codecs.devices import encoders_for

    try:
        encoders_for(args.device)
    except UsageError as error:
        return [error]
    return []


def _token_problems(args: argparse.Namespace, artifacts: Sequence[Artifact]) -> list[Qwen35Error]:
    """Return what is wrong with the token, if something is to be published."""
    from qwen35.publish.sync import Target, check_token

    published = [artifact for artifact in artifacts if artifact.repo]
    if not published or args.dry_run:
        return []
    first = published[0]
    assert first.repo
    try:
        check_token(Target.of(first.out, first.repo, args.hf_token))
    except Qwen35Error as error:
        return [error]
    return []


def _forecast(
    job: Job, source: Checkpoint, artifacts: Sequence[Artifact], threads: int, output: Output
) -> int:
    from qwen35.pipeline.fresh import up_to_date
    from qwen35.pipeline.graph import make_graph
    from qwen35.pipeline.show import Forecast

    kept = up_to_date(job, source, artifacts)
    forecast = Forecast(job, source, make_graph(job, artifacts), threads, kept)
    output.data(forecast.text(), forecast.to_json())
    return 0


def _refuse(problems: Sequence[Qwen35Error], output: Output) -> int:
    """Print every problem, each a sentence; nothing was done."""
    output.errors(problems)
    return EXIT_USAGE
