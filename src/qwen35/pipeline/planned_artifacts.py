"""The artifacts of a run with their plans, and all problems that can be found before it starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import CODECS, is_lossy
from qwen35.errors import Qwen35Error, UsageError, extra_hint, unknown_name
from qwen35.pipeline.run_request import REPORT_FOLDER, ArtifactRequest, RunRequest
from qwen35.planning.activations import load_activations
from qwen35.planning.artifact_names import artifact_name
from qwen35.planning.gguf_files.gguf_options import mtp_type_of, projector_type
from qwen35.planning.gguf_files.imatrix import open_imatrix
from qwen35.planning.gguf_files.metadata import model_name
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.memory import peak_memory
from qwen35.planning.memory import threads_within as threads_fitting
from qwen35.planning.mtp_choice import drops_mtp, mtp_choice
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import adjusted_recipe, load_recipe
from qwen35.planning.refinement import opened_refinement
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
        request: the request for it.
        name: name of its folder and its repository.
        out: its folder.
        repo: the repository to publish to, if any.
        plan: its plan.
    """

    request: ArtifactRequest
    name: str
    out: Path
    repo: str | None
    plan: Plan

    @property
    def kind(self) -> str:
        """The codec that packs its weights, or the container's name."""
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
        """The source weights read to make it."""
        return [slab.item.weight for step in self.plan.written for slab in step.rows.slabs]

    def peak_memory(self, threads: int) -> int:
        """Return an upper estimate, in bytes, of the memory needed to make it."""
        return peak_memory(self.plan, threads)


def plan_artifacts(
    checkpoint: Checkpoint, request: RunRequest, token: str | None = None
) -> tuple[tuple[PlannedArtifact, ...], tuple[Qwen35Error, ...]]:
    """Plan all artifacts of a run.

    Returns:
        The artifacts that could be planned, and all problems: recipes that do not fit, artifacts
        with the same name, missing libraries.
    """
    artifacts: list[PlannedArtifact] = []
    problems: list[Qwen35Error] = []
    for artifact_request in request.artifacts:
        try:
            artifact = _artifact(checkpoint, request, artifact_request, token)
        except Qwen35Error as error:  # collected, so that the user sees all problems at once
            problems.append(_labelled(artifact_request, error))
            continue
        artifacts.append(artifact)
    problems += _clashes(artifacts)
    problems += _missing_libraries(artifacts, request)
    if request.measurement is not None:
        problems += _measuring_problems(checkpoint, request.measurement.text, request.out)
    return tuple(artifacts), tuple(problems)


def _labelled(artifact_request: ArtifactRequest, error: Qwen35Error) -> Qwen35Error:
    """Return the error with its artifact named in the subject."""
    return UsageError(
        f"{artifact_request.label}: {error.subject}",
        error.found,
        expected=error.expected,
        hint=error.hint,
    )


def _artifact(
    checkpoint: Checkpoint,
    request: RunRequest,
    artifact_request: ArtifactRequest,
    token: str | None,
) -> PlannedArtifact:
    plan = (
        _gguf(checkpoint, artifact_request, token)
        if artifact_request.types
        else _safetensors(checkpoint, artifact_request)
    )
    name = artifact_request.name or artifact_name(
        model_name(checkpoint), checkpoint.config, plan.container.suffix(plan), text=_is_text(plan)
    )
    repo = artifact_request.repo or (f"{request.owner}/{name}" if request.owner else None)
    return PlannedArtifact(artifact_request, name, request.out / name, repo, plan)


def _is_text(plan: Plan) -> bool:
    return not plan.container.has_vision(plan)


def _safetensors(checkpoint: Checkpoint, artifact_request: ArtifactRequest) -> Plan:
    recipe = adjusted_recipe(
        artifact_request.recipe,
        keep=artifact_request.keep,
        layout=artifact_request.layout,
        quantized_inputs=artifact_request.activations,
        drop_mtp=drops_mtp(artifact_request.mtp, drop=artifact_request.drop_mtp),
    )
    statistics = artifact_request.activation_stats
    return make_plan(
        checkpoint,
        recipe,
        keep_prefix=artifact_request.keep_prefix,
        scale_choice=artifact_request.scale_choice,
        activations=load_activations(statistics) if statistics else None,
        kv_cache=artifact_request.kv_cache,
        refinement=opened_refinement(artifact_request.codes, artifact_request.hessian),
    )


def _gguf(checkpoint: Checkpoint, artifact_request: ArtifactRequest, token: str | None) -> Plan:
    unknown = [name for name in artifact_request.types if name not in FILE_TYPES]
    if unknown:
        raise unknown_name("types", unknown[0], FILE_TYPES)
    choice = mtp_choice(artifact_request.mtp, drop=artifact_request.drop_mtp)
    return make_plan(
        checkpoint,
        load_recipe(artifact_request.recipe, "gguf"),
        types=artifact_request.types,
        imatrix=open_imatrix(artifact_request.imatrix, token) if artifact_request.imatrix else None,
        projector=projector_type(artifact_request.mmproj, "mmproj"),
        split_max_size=artifact_request.split_max_size,
        drop_mtp=choice == "drop",
        mtp_file=mtp_type_of(choice, artifact_request.mtp_type),
        refinement=opened_refinement(artifact_request.codes, artifact_request.hessian),
    )


def _clashes(artifacts: Sequence[PlannedArtifact]) -> Iterator[UsageError]:
    for i, artifact in enumerate(artifacts):
        before = artifacts[:i]
        if any(other.name == artifact.name for other in before):
            hint = "leave one out, or give them names in a run file"
            yield UsageError(artifact.name, "two artifacts with this name", hint=hint)
        elif artifact.repo and any(other.repo == artifact.repo for other in before):
            yield UsageError(
                artifact.repo, "two artifacts for this repository", hint="give each its own"
            )


def _missing_libraries(
    artifacts: Sequence[PlannedArtifact], request: RunRequest
) -> Iterator[UsageError]:
    """Yield a problem for each missing library that an artifact will need."""
    problems = [problem for a in artifacts if (problem := _unprepared(a.plan)) is not None]
    yield from {str(problem): problem for problem in problems}.values()
    subject = "depth behaviour" if request.depth == "behaviour" else "evaluate"
    other = ", or choose depth numbers" if request.depth == "behaviour" else ""
    measurement, needed = request.measurement, dict[str, str]()
    if measurement is not None and measurement.streamed:
        needed |= dict.fromkeys(("torch", "transformers"), "nf4")
    if request.depth == "behaviour" or (measurement is not None and not measurement.streamed):
        needed |= dict(pair for artifact in artifacts for pair in _engine_modules(artifact))
    for name, extra in needed.items():
        if importlib.util.find_spec(name) is None:
            yield UsageError(subject, f"{name} is not installed", hint=extra_hint(extra) + other)


def _unprepared(plan: Plan) -> UsageError | None:
    """Return the error if a library for writing is missing."""
    try:
        plan.container.prepare(plan)
    except UsageError as error:
        return error
    return None


def _engine_modules(artifact: PlannedArtifact) -> Iterator[tuple[str, str]]:
    """Yield the modules that running an artifact needs, each with its pip extra."""
    container = artifact.plan.container
    modules, extra = container.engine
    if not container.separate:
        codec = CODECS[artifact.kind]
        modules = (*modules, *codec.libraries, *(("PIL",) if artifact.vision else ()))
    for name in modules:
        yield name, extra


def _measuring_problems(checkpoint: Checkpoint, text: Path, out: Path) -> Iterator[Qwen35Error]:
    from qwen35.evaluation.text_chunks import read_text
    from qwen35.reporting.report_files import check_report

    if any(map(is_lossy, checkpoint.weights)):
        found = "quantized, so there is no exact reference to measure against"
        yield UsageError(f"evaluate: {checkpoint.name}", found, hint="leave the text out")
    elif checkpoint.within:
        found = "a GGUF file, which not every engine can run as the reference"
        hint = "leave the text out, and use qwen35 evaluate"
        yield UsageError(f"evaluate: {checkpoint.name}", found, hint=hint)
    try:
        check_report(out / REPORT_FOLDER, overwrite=True)
    except Qwen35Error as error:
        yield error
    try:
        if not read_text(text).content.strip():
            yield UsageError(str(text), "is empty", expected="text to measure on")
    except Qwen35Error as error:
        yield error


def source_bytes(artifacts: Sequence[PlannedArtifact]) -> int:
    """Return the source bytes that one sweep for `artifacts` reads: the union of their ranges."""
    ranges: dict[str, set[tuple[int, int]]] = {}
    for weight in (weight for artifact in artifacts for weight in artifact.weights):
        for part in weight.parts:
            ranges.setdefault(part.file, set()).add((part.begin, part.begin + part.spec.nbytes))
    total = 0
    for file_ranges in ranges.values():
        reached = 0  # ranges overlap: artifacts share weights, and expert parts share a stack
        for begin, end in sorted(file_ranges):
            total += max(0, end - max(begin, reached))
            reached = max(reached, end)
    return total


def sweep_memory(artifacts: Sequence[PlannedArtifact], threads: int) -> int:
    """Return an upper estimate, in bytes, of the memory that one sweep needs."""
    peaks = [artifact.peak_memory(threads) for artifact in artifacts]
    return sum(peaks) - _SHARED_MEMORY * max(0, len(peaks) - 1)


_SHARED_MEMORY = 120_000_000
"""The interpreter with its libraries: in every artifact's estimate, but only once in a sweep."""

_CHECK_MEMORY = 450_000_000
"""Reading and comparing all numbers, as measured by benchmarks/verify.py."""

_ENGINE_MEMORY = 1_000_000_000
"""PyTorch with transformers, or llama.cpp, without the loaded weights."""


def memory_of(kind: str, artifacts: Sequence[PlannedArtifact], depth: Depth, threads: int) -> int:
    """Return an upper estimate, in bytes, of the memory that a step needs.

    Making does not grow with the model; behaviour checks and evaluation load the largest artifact.
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
    """Return the number of threads with which a sweep stays below `memory`.

    Raises:
        UsageError: a single thread exceeds the limit.
    """
    return threads_fitting(lambda n: sweep_memory(artifacts, n), threads, memory)
