"""A path, or a file's own choice of artifacts, through its gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """What came of a run.

    Args:
        job: what was asked for.
        outcomes: what became of each step, in order.
    """

    job: RunRequest
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether no gate is closed."""
        from qwen35.pipeline.outcome import passed

        return passed(self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        from qwen35.pipeline.outcome import outcomes_json

        return outcomes_json(self.job, self.outcomes)


def run(
    *what: str | Path,
    path: PathName | Sequence[PathName] | None = None,
    types: str | Sequence[str] | None = None,
    imatrix: str | None = None,
    depth: Depth | None = None,
    text: str | Path | None = None,
    chunks: int | None = None,
    repo: str | None = None,
    private: bool | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> RunResult:
    """Make, verify, measure, document and publish artifacts; what is up to date stays.

    Args:
        *what: a run's file (``.toml``); or, with a path, the model and the folder of all artifacts.
        path: ``A``, ``B``, ``fp8``, or several of them.
        types: path B: types beside its F16, as names or as one text with commas.
        imatrix: path B: importance matrix: a file, or ``hf:owner/name/path``.
        depth: of verification; ``behaviour`` if None.
        text: measure quality on this text.
        chunks: on so many chunks of it.
        repo: publish there: OWNER, or OWNER/NAME for one artifact.
        private: repositories that are made.
        device: where weights are encoded.
        threads: at most so many; all processors if None.
        memory: use fewer threads to stay below so many bytes.
        overwrite: replace outputs of other runs.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: told of bytes, then of chunks.
        tell: told what is going on, a line for each step.

    Raises:
        Qwen35Error: the first of everything that is wrong before anything was done; the others are
            in its notes (``__notes__``).
    """
    job = job_for(
        [str(name) for name in what],
        path=[path] if isinstance(path, str) else list(path or ()),
        types=types,
        imatrix=imatrix,
        depth=depth,
        text=Path(text) if text else None,
        chunks=chunks,
        repo=repo,
        private=private,
    )
    options = RunOptions(device, threads, memory, overwrite, hf_token)
    found = prepare(job, options)
    if found.problems:
        first, *others = found.problems
        for other in others:
            first.add_note(str(other))
        raise first
    silent = Silent()
    return found.carry_out(progress or silent, progress or silent, tell or (lambda _: None))


@dataclass(frozen=True)
class PreparedRun:
    """A run that was looked at.

    Args:
        job: what for.
        options: how.
        source: the model; None if the job itself is wrong.
        artifacts: what is to be made.
        problems: everything that is wrong with it.
        threads: how many to use.
    """

    job: RunRequest
    options: RunOptions
    source: Checkpoint | None = None
    artifacts: tuple[PlannedArtifact, ...] = ()
    problems: tuple[Qwen35Error, ...] = ()
    threads: int = 1

    def forecast(self) -> Forecast:
        """Say what would be done."""
        from qwen35.pipeline.freshness import up_to_date
        from qwen35.pipeline.graph import make_graph
        from qwen35.pipeline.pipeline_display import Forecast

        assert self.source is not None  # there are no problems
        kept = up_to_date(self.job, self.source, self.artifacts)
        graph = make_graph(self.job, self.artifacts)
        return Forecast(self.job, self.source, graph, self.threads, kept)

    def carry_out(
        self, progress: Progress, chunks: Progress, tell: Callable[[str], None]
    ) -> RunResult:
        """Do it: `progress` is told of bytes, `chunks` of what is measured, `tell` of each step.

        Raises:
            OutputError: another run is at work, or an output is not this run's to replace.
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
        )
        return RunResult(self.job, runner.run())


def prepare(job: RunRequest, options: RunOptions, *, dry: bool = False) -> PreparedRun:
    """Look at everything that a run needs; with `dry`, nothing is downloaded but headers.

    Raises:
        InputError: the model cannot be read.
        HubError: the Hub refused, or was not reached.
        UsageError: it does not fit into the memory given.
    """
    from qwen35.checkpoint.open import describe, fetch
    from qwen35.pipeline.planned_artifacts import plan_artifacts, threads_within

    problems: Sequence[Qwen35Error] = job.problems
    if problems:
        return PreparedRun(job, options, problems=tuple(problems))
    source = describe(job.model, token=options.token)
    artifacts, problems = plan_artifacts(source, job, options.token)
    problems = [*problems, *_device_problems(options.device)]
    if not dry:
        problems += _token_problems(artifacts, options.token)
    if problems:
        return PreparedRun(job, options, source, problems=tuple(problems))
    threads = threads_within(artifacts, options.threads or default_threads(), options.memory)
    if not dry:
        source = fetch(job.model, token=options.token, extra=("README.md",))
        artifacts, problems = plan_artifacts(source, job, options.token)
    return PreparedRun(job, options, source, tuple(artifacts), tuple(problems), threads)


def job_for(
    what: Sequence[str],
    *,
    path: Sequence[str],
    types: str | Sequence[str] | None,
    imatrix: str | None,
    depth: Depth | None,
    text: Path | None,
    chunks: int | None,
    repo: str | None,
    private: bool | None,
) -> RunRequest:
    """Return what a file or the arguments ask for; arguments as for `run`.

    Raises:
        UsageError: they contradict, or the file is malformed.
    """
    from qwen35.pipeline.run_file import read_run_file

    of_a_path = {
        "types": types, "imatrix": imatrix, "depth": depth, "text": text, "chunks": chunks,
        "repo": repo, "private": private,
    }  # fmt: skip
    if not path:
        given = [name for name, value in of_a_path.items() if value is not None]
        if given:
            raise UsageError(f"--{given[0]}", "is for --path", hint="say it in the file")
        if len(what) != 1 or not what[0].endswith(".toml"):
            expected = "one FILE.toml, or --path with MODEL and OUT"
            raise UsageError("run", " ".join(what), expected=expected)
        return read_run_file(Path(what[0]))
    if len(what) != 2:
        raise UsageError("--path", f"given with {' '.join(what)!r}", expected="MODEL and OUT")
    names = types.split(",") if isinstance(types, str) else types or ()
    names = [name.strip().upper() for name in names if name.strip()]
    wanted = path_artifacts(path, types=names, imatrix=imatrix or "")
    if chunks and text is None:
        raise UsageError("--chunks", "needs --text", hint="leave it out")
    measuring = MeasurementRequest(text, chunks or 0) if text else None
    job = RunRequest(what[0], Path(what[1]), wanted, depth or "behaviour", measuring)
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
    """Return what is wrong with the token, if something is to be published."""
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
