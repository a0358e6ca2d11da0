"""Run a pipeline: a path, or the artifacts of a run file, through its gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import size_given
from qwen35.errors import Qwen35Error, UsageError
from qwen35.pipeline.run_request import (
    MeasurementRequest,
    PathName,
    RunOptions,
    RunRequest,
    path_artifacts,
    repo_problem,
)
from qwen35.progress import Progress, Silent
from qwen35.threads import default_threads

if TYPE_CHECKING:
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.pipeline.outcome import Outcome
    from qwen35.pipeline.pipeline_display import Forecast
    from qwen35.pipeline.planned_artifacts import PlannedArtifact
    from qwen35.verification.verdict import Depth

__all__ = ["PreparedRun", "RunOptions", "RunResult", "job_for", "prepare", "run"]


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Args:
        job: the request.
        outcomes: the outcome of each step, in order.
    """

    job: RunRequest
    outcomes: tuple[Outcome, ...]

    def __repr__(self) -> str:
        state = "passed" if self.passed else "a gate is closed"
        return f"<RunResult {self.job.out}: {len(self.outcomes)} steps, {state}>"

    @property
    def passed(self) -> bool:
        """Whether no gate is closed."""
        from qwen35.pipeline.outcome import passed

        return passed(self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        from qwen35.pipeline.outcome import outcomes_json

        return outcomes_json(self.job, self.outcomes)


@plain_arguments
def run(
    *what: str | Path,
    path: PathName | Sequence[PathName] | None = None,
    types: str | Sequence[str] | None = None,
    imatrix: str | None = None,
    codes: str | None = None,
    hessian: str | Path | None = None,
    adapter: Sequence[str | Path] | None = None,
    onto: str | None = None,
    mtp_from: str | Path | None = None,
    depth: Depth | None = None,
    text: str | Path | None = None,
    chunks: int | None = None,
    repo: str | None = None,
    private: bool | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    overwrite: bool = False,
    hf_token: str | None = None,
    serve: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> RunResult:
    """Make, verify, measure, document and publish artifacts; up-to-date ones are kept.

    Args:
        *what: a run file (``.toml``); or, with a path, the model and the folder of all artifacts.
        path: ``A``, ``B`` or ``fp8``, or several of them.
        types: path B: types besides F16, as names or as a comma-separated string.
        imatrix: path B: importance matrix: a file, or ``hf:owner/name/path``.
        codes: ``plain`` (if None), ``refined`` or ``refined+scales``, as for `convert` and `gguf`.
        hessian: for refined codes, the folder of `calibrate` with Hessians.
        adapter: LoRA adapters of peft to merge: folders, as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        mtp_from: take the MTP layer of this checkpoint, the original of a model saved without it.
        depth: of verification; ``behaviour`` if None.
        text: measure quality on this text.
        chunks: number of chunks to measure on.
        repo: where to publish: OWNER, or OWNER/NAME for one artifact.
        private: make newly created repositories private.
        device: device to encode on.
        threads: number of threads; all processors if None.
        memory: use fewer threads to stay below this many bytes, or ``4GB``.
        overwrite: replace outputs of other runs.
        hf_token: for the Hub; by default HF_TOKEN.
        serve: name of an artifact with an endpoint, to the command that starts its server, without
            a shell; it is ended afterwards.
        progress: receives bytes, then chunks.
        tell: receives status messages, one line per step.

    Raises:
        Qwen35Error: the first problem found before any work; the others are in its notes
            (``__notes__``).
    """
    job = job_for(
        [str(name) for name in what],
        path=[path] if isinstance(path, str) else list(path or ()),
        types=types,
        imatrix=imatrix,
        codes=codes,
        hessian=hessian,
        adapter=adapter,
        onto=onto,
        mtp_from=mtp_from,
        depth=depth,
        text=Path(text) if text else None,
        chunks=chunks,
        repo=repo,
        private=private,
    )
    limit = size_given("--memory", memory)
    options = RunOptions(device, threads, limit, overwrite, hf_token, dict(serve or {}))
    prepared = prepare(job, options)
    if prepared.problems:
        first, *others = prepared.problems
        for other in others:
            first.add_note(str(other))
        raise first
    shown = progress or Silent()
    return prepared.carry_out(shown, shown, tell or (lambda _: None), shown)


@dataclass(frozen=True)
class PreparedRun:
    """A checked run.

    Args:
        job: the request.
        options: how to run it.
        source: the model; None if the request itself is invalid.
        artifacts: the planned artifacts.
        problems: everything that prevents the run.
        threads: number of threads.
    """

    job: RunRequest
    options: RunOptions
    source: Checkpoint | None = None
    artifacts: tuple[PlannedArtifact, ...] = ()
    problems: tuple[Qwen35Error, ...] = ()
    threads: int = 1

    def forecast(self) -> Forecast:
        """Return what a run would do."""
        from qwen35.pipeline.freshness import up_to_date
        from qwen35.pipeline.graph import make_graph
        from qwen35.pipeline.pipeline_display import Forecast

        assert self.source is not None  # there are no problems
        kept = up_to_date(self.job, self.source, self.artifacts)
        graph = make_graph(self.job, self.artifacts)
        return Forecast(self.job, self.source, graph, self.threads, kept)

    def carry_out(
        self,
        progress: Progress,
        chunks: Progress,
        tell: Callable[[str], None],
        questions: Progress | None = None,
    ) -> RunResult:
        """Run it: `progress` receives bytes, `chunks` measured chunks, `tell` a line per step.

        `questions` receives the questions that artifacts are asked.

        Raises:
            OutputError: another run is active, or an output belongs to another run.
        """
        from qwen35.pipeline.graph import make_graph
        from qwen35.pipeline.pipeline_run import PipelineRunner

        assert self.source is not None  # there are no problems
        runner = PipelineRunner(
            self.job,
            self.source,
            make_graph(self.job, self.artifacts),
            self.options,
            self.threads,
            progress=progress,
            chunks=chunks,
            announce=tell,
            questions=questions or Silent(),
        )
        return RunResult(self.job, runner.run())


def _serve_problems(
    artifacts: Sequence[PlannedArtifact], serve: Mapping[str, str]
) -> list[Qwen35Error]:
    asked = [one.name for one in artifacts if one.request.endpoint is not None]
    expected = ", ".join(asked) or "none: no artifact of this run names one"
    return [
        UsageError(f"--serve {name[:80]}", "no artifact with an endpoint", expected=expected)
        for name in serve
        if name not in asked
    ]


def prepare(job: RunRequest, options: RunOptions, *, dry: bool = False) -> PreparedRun:
    """Check everything that a run needs; with `dry`, only headers are downloaded.

    Raises:
        InputError: the model cannot be read.
        HubError: the Hub refused a request or could not be reached.
        UsageError: the run does not fit into the memory limit.
        OutputError: the folder of the outputs holds a model of somebody's.
    """
    from qwen35.pipeline.planned_artifacts import plan_artifacts, threads_within
    from qwen35.planning.merged_source import opened_adapters, opened_source
    from qwen35.sinks.staging import os_errors, refuse_foreign_model

    problems: Sequence[Qwen35Error] = job.problems
    if problems:
        return PreparedRun(job, options, problems=tuple(problems))
    with os_errors(job.out):
        refuse_foreign_model(job.out)  # MODEL and OUT may have been swapped
    changes = (opened_adapters(job.adapters, job.onto), job.mtp_from or None)
    source = opened_source(job.model, *changes, headers=True, token=options.token)
    artifacts, problems = plan_artifacts(source, job, options.token)
    problems = [*problems, *_device_problems(options.device)]
    problems += _serve_problems(artifacts, options.serve)
    if not dry:
        problems += _token_problems(artifacts, options.token)
    if problems:
        return PreparedRun(job, options, source, problems=tuple(problems))
    threads = threads_within(artifacts, options.threads or default_threads(), options.memory)
    if not dry and not _is_here(source):
        # the first plan found problems before the download; this one reads the local files
        extra = ("README.md",)
        source = opened_source(job.model, *changes, token=options.token, extra=extra)
        artifacts, problems = plan_artifacts(source, job, options.token)
    return PreparedRun(job, options, source, tuple(artifacts), tuple(problems), threads)


def _is_here(source: Checkpoint) -> bool:
    """Whether all weights are on this machine already."""
    return all(one is None or one.root is not None for one in (source, source.donor))


def job_for(
    what: Sequence[str],
    *,
    path: Sequence[str],
    types: str | Sequence[str] | None,
    imatrix: str | None,
    codes: str | None,
    hessian: str | Path | None,
    adapter: Sequence[str | Path] | None,
    onto: str | None,
    mtp_from: str | Path | None,
    depth: Depth | None,
    text: Path | None,
    chunks: int | None,
    repo: str | None,
    private: bool | None,
) -> RunRequest:
    """Return the request in a run file or the arguments; arguments as for `run`.

    Raises:
        UsageError: the arguments contradict each other, or the file is malformed.
    """
    from qwen35.pipeline.run_file import read_run_file
    from qwen35.planning.gguf_files.mixes import type_names

    path_options = {
        "types": types, "imatrix": imatrix, "codes": codes, "hessian": hessian,
        "adapter": adapter, "onto": onto, "mtp-from": mtp_from, "depth": depth,
        "text": text, "chunks": chunks, "repo": repo,
        "private": private,
    }  # fmt: skip
    if not path:
        given = [name for name, value in path_options.items() if value is not None]
        if given:
            hint = "with a run file, set it in the file"
            raise UsageError(f"--{given[0]}", "is for --path", hint=hint)
        if len(what) != 1 or not what[0].endswith(".toml"):
            expected = "one FILE.toml, or --path with MODEL and OUT"
            raise UsageError("run", " ".join(what), expected=expected)
        return read_run_file(Path(what[0]))
    if len(what) != 2:
        raise UsageError("--path", f"given with {' '.join(what)!r}", expected="MODEL and OUT")
    names = type_names(types or ())
    refined = {"codes": codes, "hessian": Path(hessian) if hessian else None}
    artifacts = tuple(
        replace(request, **refined)  # type: ignore[arg-type]  # by the names of its fields
        for request in path_artifacts(path, types=names, imatrix=imatrix or "")
    )
    if chunks and text is None:
        raise UsageError("--chunks", "needs --text", hint="leave it out")
    measuring = MeasurementRequest(text, chunks or 0) if text else None
    job = RunRequest(
        what[0],
        Path(what[1]),
        artifacts,
        depth or "behaviour",
        adapters=tuple(map(str, adapter or ())),
        onto=onto,
        mtp_from=str(mtp_from or ""),
        measurement=measuring,
    )
    return _published(replace(job, private=bool(private)), repo)


def _published(job: RunRequest, repo: str | None) -> RunRequest:
    if repo is None:
        return job
    if "/" not in repo:
        job = replace(job, owner=repo)
        problem = repo_problem("--repo", f"{repo}/name")
    else:
        if len(job.artifacts) > 1:
            found = f"one repository for {len(job.artifacts)} artifacts"
            raise UsageError(f"--repo {repo}", found, expected="their OWNER")
        job = replace(job, artifacts=(replace(job.artifacts[0], repo=repo),))
        problem = repo_problem("--repo", repo)
    if problem:
        raise problem
    return job


def _device_problems(device: str) -> list[Qwen35Error]:
    from qwen35.codecs.devices import kernels_for

    try:
        kernels_for(device)
    except UsageError as error:
        return [error]
    return []


def _token_problems(artifacts: Sequence[PlannedArtifact], token: str | None) -> list[Qwen35Error]:
    """Return the problems with the token, if anything will be published."""
    from qwen35.publishing.sync import SyncTarget, check_token

    published = [artifact for artifact in artifacts if artifact.repo]
    if not published:
        return []
    first = published[0]
    assert first.repo
    try:
        check_token(SyncTarget.of(first.out, first.repo, token))
    except Qwen35Error as error:
        return [error]
    return []
