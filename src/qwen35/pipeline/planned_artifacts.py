"""The artifacts of a run with their plans, and everything that can be wrong before it starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import CODECS, is_packed
from qwen35.errors import Qwen35Error, UsageError
from qwen35.pipeline.run_request import REPORT_FOLDER, ArtifactRequest, RunRequest
from qwen35.planning.activations import load_activations
from qwen35.planning.artifact_names import artifact_name
from qwen35.planning.gguf_files.imatrix import open_imatrix
from qwen35.planning.gguf_files.metadata import model_name
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.memory import peak_memory
from qwen35.planning.memory import threads_within as threads_fitting
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.tensors import Weight
from qwen35.verification.verdict import Depth

__all__ = [
    "PlannedArtifact",
    "memory_of",
    "plan_artifacts",
    "source_bytes",
    "sweep_memory",
    "threads_within",
]


@dataclass(frozen=True)
class PlannedArtifact:
    """One artifact of a run.

    Args:
        wanted: what was asked for.
        name: of its folder, and of its repository.
        out: its folder.
        repo: where it is published, if it is.
        plan: the whole of it.
    """

    wanted: ArtifactRequest
    name: str
    out: Path
    repo: str | None
    plan: Plan

    @property
    def kind(self) -> str:
        """How it holds its weights: a codec, or the container of many."""
        return self.plan.kind

    @property
    def vision(self) -> bool:
        """Whether it has a vision tower."""
        return self.plan.container.has_vision(self.plan)

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return self.plan.total_bytes

    @property
    def weights(self) -> list[Weight]:
        """The weights of the source that making it reads."""
        return [slab.item.weight for step in self.plan.written for slab in step.rows.slabs]

    def peak_memory(self, threads: int) -> int:
        """Return an upper estimate in bytes of the memory that making it needs."""
        return peak_memory(self.plan, threads)


def plan_artifacts(
    checkpoint: Checkpoint, job: RunRequest, token: str | None = None
) -> tuple[tuple[PlannedArtifact, ...], tuple[Qwen35Error, ...]]:
    """Plan everything that a job asks for.

    Returns:
        The artifacts that can be planned, and a problem for each thing that is wrong: a recipe
        that does not fit, two artifacts of one name, a library that is not installed.
    """
    artifacts: list[PlannedArtifact] = []
    problems: list[Qwen35Error] = []
    for wanted in job.artifacts:
        try:
            artifact = _artifact(checkpoint, job, wanted, token)
        except Qwen35Error as error:
            problems.append(_of(wanted, error))
            continue
        artifacts.append(artifact)
    problems += _clashes(artifacts)
    problems += _missing_libraries(artifacts, job)
    if job.measuring is not None:
        problems += _measuring_problems(checkpoint, job.measuring.text, job.out)
    return tuple(artifacts), tuple(problems)


def _of(wanted: ArtifactRequest, error: Qwen35Error) -> Qwen35Error:
    """Say which artifact a problem is of."""
    return UsageError(
        f"{wanted.label}: {error.subject}", error.found, expected=error.expected, hint=error.hint
    )


def _artifact(
    checkpoint: Checkpoint, job: RunRequest, wanted: ArtifactRequest, token: str | None
) -> PlannedArtifact:
    plan = _gguf(checkpoint, wanted, token) if wanted.types else _safetensors(checkpoint, wanted)
    name = wanted.name or artifact_name(
        model_name(checkpoint), checkpoint.config, plan.container.suffix(plan), text=_is_text(plan)
    )
    repo = wanted.repo or (f"{job.owner}/{name}" if job.owner else None)
    return PlannedArtifact(wanted, name, job.out / name, repo, plan)


def _is_text(plan: Plan) -> bool:
    return not plan.container.has_vision(plan)


def _safetensors(checkpoint: Checkpoint, wanted: ArtifactRequest) -> Plan:
    recipe = load_recipe(wanted.recipe).keeping(wanted.keep)
    statistics = wanted.activation_stats
    return make_plan(
        checkpoint,
        recipe.dropping_mtp() if wanted.drop_mtp else recipe,
        keep_prefix=wanted.keep_prefix,
        scale_choice=wanted.scale_choice,
        activations=load_activations(statistics) if statistics else None,
    )


def _gguf(checkpoint: Checkpoint, wanted: ArtifactRequest, token: str | None) -> Plan:
    unknown = [name for name in wanted.types if name not in FILE_TYPES]
    if unknown:
        raise UsageError("types", f"{unknown[0]!r} is unknown", expected=", ".join(FILE_TYPES))
    return make_plan(
        checkpoint,
        load_recipe(wanted.recipe, "gguf"),
        types=wanted.types,
        imatrix=open_imatrix(wanted.imatrix, token) if wanted.imatrix else None,
        projector="F16" if wanted.mmproj else None,
        drop_mtp=wanted.drop_mtp,
    )


def _clashes(artifacts: Sequence[PlannedArtifact]) -> Iterator[UsageError]:
    for i, artifact in enumerate(artifacts):
        before = artifacts[:i]
        if any(other.name == artifact.name for other in before):
            yield UsageError(
                artifact.name, "two artifacts of this name", hint="give one a name of its own"
            )
        elif artifact.repo and any(other.repo == artifact.repo for other in before):
            yield UsageError(
                artifact.repo, "two artifacts for this repository", hint="one repository for each"
            )


def _missing_libraries(
    artifacts: Sequence[PlannedArtifact], job: RunRequest
) -> Iterator[UsageError]:
    """Yield a problem for each library that an artifact will need and that is not installed."""
    problems = [problem for a in artifacts if (problem := _unprepared(a.plan)) is not None]
    yield from {str(problem): problem for problem in problems}.values()
    if job.depth != "behaviour" and job.measuring is None:
        return
    what = "depth behaviour" if job.depth == "behaviour" else "evaluate"
    needed = {name: extra for artifact in artifacts for name, extra in _asked_in(artifact)}
    for name, extra in needed.items():
        if importlib.util.find_spec(name) is None:
            yield UsageError(
                what, f"{name} is not installed", hint=f"pip install 'qwen35[{extra}]'"
            )


def _unprepared(plan: Plan) -> UsageError | None:
    """Return what writing lacks, if anything."""
    try:
        plan.container.prepare(plan)
    except UsageError as error:
        return error
    return None


def _asked_in(artifact: PlannedArtifact) -> Iterator[tuple[str, str]]:
    """Yield what an artifact is asked and measured in: a module, and the extra that brings it."""
    container = artifact.plan.container
    modules, extra = container.engine
    if not container.separate:
        codec = CODECS[artifact.kind]
        modules = (*modules, *codec.libraries, *(("PIL",) if artifact.vision else ()))
    for name in modules:
        yield name, extra


def _measuring_problems(checkpoint: Checkpoint, text: Path, out: Path) -> Iterator[Qwen35Error]:
    from qwen35.reporting.report_files import check_report

    if any(map(is_packed, checkpoint.weights)):
        found = "quantized itself: there is nothing exact to measure against"
        yield UsageError(f"evaluate: {checkpoint.name}", found, hint="leave the text out")
    try:
        check_report(out / REPORT_FOLDER, overwrite=True)
    except Qwen35Error as error:
        yield error
    try:
        if not text.read_text("utf-8").strip():
            yield UsageError(str(text), "is empty", expected="text to measure on")
    except (OSError, UnicodeDecodeError) as error:
        yield UsageError(str(text), f"cannot be read ({error})", expected="text in UTF-8")


def source_bytes(artifacts: Sequence[PlannedArtifact]) -> int:
    """Return the bytes of the source that one sweep for `artifacts` reads."""
    stretches: dict[str, set[tuple[int, int]]] = {}
    for weight in (weight for artifact in artifacts for weight in artifact.weights):
        for part in weight.parts:
            stretch = part.begin, part.begin + part.spec.nbytes
            stretches.setdefault(part.file, set()).add(stretch)
    total = 0
    for found in stretches.values():
        reached = 0
        for begin, end in sorted(found):
            total += max(0, end - max(begin, reached))
            reached = max(reached, end)
    return total


def sweep_memory(artifacts: Sequence[PlannedArtifact], threads: int) -> int:
    """Return an upper estimate in bytes of the memory that one sweep for `artifacts` needs."""
    peaks = [artifact.peak_memory(threads) for artifact in artifacts]
    return sum(peaks) - _SHARED_MEMORY * max(0, len(peaks) - 1)


_SHARED_MEMORY = 120_000_000
"""What every estimate holds, and a sweep has once: the interpreter with its libraries."""

_CHECK_MEMORY = 450_000_000
"""Reading and comparing every number, measured by benchmarks/verify.py."""

_ENGINE_MEMORY = 1_000_000_000
"""PyTorch with transformers, or llama.cpp, beside the weights that they load."""


def memory_of(kind: str, artifacts: Sequence[PlannedArtifact], depth: Depth, threads: int) -> int:
    """Return an upper estimate in bytes of the memory that a step needs.

    Making does not grow with the model; asking and measuring load the largest file or folder.
    """
    if kind == "make":
        return artifacts[0].peak_memory(threads)
    if kind == "evaluate" or (kind == "verify" and depth == "behaviour"):
        return _ENGINE_MEMORY + max(_loaded(artifact) for artifact in artifacts)
    return _CHECK_MEMORY if kind == "verify" else 0


def _loaded(artifact: PlannedArtifact) -> int:
    if artifact.plan.container.separate:
        return max(nbytes for _, nbytes in artifact.plan.file_sizes())
    return artifact.nbytes


def threads_within(artifacts: Sequence[PlannedArtifact], threads: int, memory: int | None) -> int:
    """Return the number of threads with which a sweep for `artifacts` stays below `memory`.

    Raises:
        UsageError: one thread alone needs more.
    """
    return threads_fitting(lambda n: sweep_memory(artifacts, n), threads, memory)
