"""Evaluate: prepare, sweep over the chunks, compute the statistics."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen35.errors import InputError, UsageError
from qwen35.evaluation.along_text import Passage, along, passage_klds, typical_passage
from qwen35.evaluation.chunk_sweep import sweep
from qwen35.evaluation.divergence import Series, compare_series, perplexity
from qwen35.evaluation.evaluation_job import EvaluationJob, EvaluationRequest, prepare
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.evaluation.measured import ModelMeasurement, distribution, front, worst
from qwen35.evaluation.models import EvaluatedModel, open_base
from qwen35.evaluation.served_candidate import at_asked
from qwen35.evaluation.served_speed import ServedSpeed, measure_served
from qwen35.evaluation.speed import Speed, measure_speed
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.progress import Progress
from qwen35.serving.server_client import ServerClient
from qwen35.version import __version__
from qwen35.writing.write import write

__all__ = ["evaluate", "run"]

_LIBRARIES = ("bitsandbytes", "llama_cpp_python", "numba", "numpy", "torch", "transformers")

_MOST_LOSS = 300
"""Bound on a mean loss, in nats: guessing costs ln(vocabulary), and e^300 still has a square."""


def evaluate(
    base: str | Path,
    candidates: Sequence[str | Path] = (),
    text: Path | None = None,
    *,
    speed: bool = False,
    state: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EvaluationReport:
    """Measure how far candidates diverge from the unquantized model.

    Args:
        base: folder, Hub id or GGUF file of the unquantized model.
        candidates: folders, Hub ids, GGUF files, folders of them, ``hf:owner/name/path`` of one.
        text: the evaluation text.
        speed: also measure tokens per second of GGUF candidates.
        state: file that keeps results until the end, so that an interrupted run can resume.
        progress: receives chunks.
        **options: further fields of `EvaluationRequest`.

    Raises:
        InputError: a model or file cannot be read, compared or run.
        UsageError: an option is missing, or options contradict each other.
    """
    job = prepare(EvaluationRequest(str(base), tuple(map(str, candidates)), text, **options))
    return run(job, speed=speed, state=state, progress=progress)


def run(
    job: EvaluationJob,
    *,
    speed: bool = False,
    state: Path | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Run a prepared evaluation; arguments and errors as for `evaluate`."""
    if speed and job.stream is not None:
        found = "measures llama.cpp, but models run layer by layer"
        raise UsageError("--speed", found, hint="leave it out, or give more --memory")
    device = _device(job)
    with _floor(job) as written:
        floors = (*job.floors, *written)
        models = (*job.candidates, *job.simulations, *floors)
        base, series = sweep(job, models, device=device, state=state, progress=progress)
        speeds = _speeds(job, floors) if speed else {}
        served_speeds = _served_speeds(job) if speed else {}
    _check_loss(job.base.name, base)
    passage = typical_passage(base, job.chunks, job.decode)
    rows = [
        _measured(job, *pair, base, passage, speeds) for pair in zip(models, series, strict=True)
    ]
    rows = [replace(row, served_speed=served_speeds.get(row.model.name, ())) for row in rows]
    count = len(job.candidates)
    candidates, rest = rows[:count], rows[count:]
    sized = [row for row in candidates if row.model.nbytes]
    klds = [row.comparison.kld.value for row in sized]
    on_front = iter(front([row.model.nbytes for row in sized], klds))
    return EvaluationReport(
        base=job.base,
        base_perplexity=perplexity(base.nll),
        candidates=[replace(r, front=bool(r.model.nbytes) and next(on_front)) for r in candidates],
        simulations=rest[: len(job.simulations)],
        floors=rest[len(job.simulations) :],
        chunks=job.chunks,
        text=job.text,
        passage=passage,
        reference=_reference(job),
        device=device,
        versions=_versions(),
        served={target.model.name: target.to_json() for target in job.served},
        stream=job.stream,
    )


def _measured(
    job: EvaluationJob,
    model: EvaluatedModel,
    series: Series,
    base: Series,
    passage: Passage,
    speeds: Mapping[str, Speed],
) -> ModelMeasurement:
    mine = at_asked(base, series) if model.engine == "server" else (base, series)
    for name, one in zip((job.base.name, model.name), mine, strict=True):
        _check_loss(name, one)
    return ModelMeasurement(
        model=model,
        comparison=compare_series(*mine),
        scored=mine[1].nll.size,
        distribution=distribution(mine[1]),
        worst=worst(base, series, job.chunks, job.decode),
        speed=speeds.get(model.name),
        along=along(series),
        passage=passage_klds(series, passage),
    )


def _check_loss(name: str, series: Series) -> None:
    loss = float(series.nll.mean())
    if loss > _MOST_LOSS:
        raise InputError(
            name,
            f"a mean loss of {loss:.3g} nats a token",
            expected=f"at most {_MOST_LOSS}",
            hint="its weights are damaged: qwen35 verify --depth numbers it",
        )


def _reference(job: EvaluationJob) -> str:
    if job.reference_file is None:
        return "run"
    return "16-bit file" if job.reference_file == job.request.kld_file else "compact file"


def _device(job: EvaluationJob) -> str:
    """Return the device for transformers; empty if it does not run."""
    running = [*job.candidates, *job.floors, *([] if job.reference_file else [job.base])]
    if all(model.engine == "llama.cpp" for model in running):
        return ""
    import torch  # late: llama.cpp alone does without

    device = job.request.device
    torch.set_num_threads(job.threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}", "torch sees no such device", hint="leave it out")
    return device


@contextmanager
def _floor(job: EvaluationJob) -> Iterator[tuple[EvaluatedModel, ...]]:
    """Yield the base as a temporary F16 GGUF file if the noise floor needs one.

    F16 is what people call the unquantized GGUF file, at half the size of F32.
    """
    if not job.floor_to_make:
        yield ()
        return
    with tempfile.TemporaryDirectory(prefix="qwen35-") as folder:
        plan = make_plan(
            job.base.checkpoint(), load_recipe("mix", "gguf"), types=("F16",), drop_mtp=True
        )
        out = write(plan, Path(folder) / "floor", keep=False, threads=job.threads).out
        model = open_base(str(out / plan.files[0].name))
        yield (replace(model, name=f"{job.base.name} in llama.cpp", plan=None, sha256=None),)


def _speeds(job: EvaluationJob, floors: Sequence[EvaluatedModel]) -> Mapping[str, Speed]:
    ggufs = [model for model in job.candidates if model.engine == "llama.cpp"]
    exact = [model for model in (job.base, *floors) if model.engine == "llama.cpp"]
    if not ggufs and job.served:
        return {}
    if not ggufs:
        hint = "give GGUF files or an --endpoint, or leave it out"
        raise UsageError("--speed", "no candidate is a GGUF file", hint=hint)
    return measure_speed(ggufs, exact[0], job.threads)


def _served_speeds(job: EvaluationJob) -> Mapping[str, Sequence[ServedSpeed]]:
    speeds = {}
    for target in job.served:
        with ServerClient(target.endpoint) as client:
            speeds[target.model.name] = measure_served(client, target.served)
    return speeds


def _versions() -> dict[str, str]:
    versions = {"qwen35": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # engines are optional extras
            continue
    return versions
