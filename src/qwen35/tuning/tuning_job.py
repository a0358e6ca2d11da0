"""A tuning job: check the request and open its inputs before measuring, then run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.display import bytes_of
from qwen35.errors import UsageError, unknown_name
from qwen35.evaluation.text_chunks import EvaluationText, read_text
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import replace_file
from qwen35.sinks.staging import os_errors, scratch
from qwen35.sinks.work_folder import check_is_file
from qwen35.threads import default_threads
from qwen35.tuning.formats import FORMATS
from qwen35.tuning.measurements import MeasurementKey, Measurements, load_measurements, model_digest
from qwen35.tuning.probing import ProbeSetting
from qwen35.tuning.recipe_search import TunedRecipe, TuningBudget, tune
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.tunable import tunable_of
from qwen35.tuning.tuning_display import tuned_json

__all__ = ["Format", "TuningJob", "TuningRequest", "TuningResult", "prepare", "run"]

Format = str
"""A tunable recipe format: one of `qwen35.tuning.formats.FORMATS`."""


@dataclass(frozen=True)
class TuningRequest:
    """User options of tuning.

    Args:
        model: folder, GGUF file or Hub id.
        format: of the artifact.
        text: the tuning text.
        size: most bytes of the weight files: bytes, or ``4.5bpw``, ``3.2GB``, ``800MiB``.
        max_kld: largest mean divergence on the text, in nats; instead of a size.
        output: recipe to write; None for a dry run.
        adapter: adapters merged into the model, as ``DIR`` or ``DIR=WEIGHT``.
        onto: the format into whose values they are merged; None for the model's own.
        types: GGUF types to choose from; the defaults if empty.
        imatrix: for GGUF files: importance matrix, or ``hf:owner/name/path``.
        measurements: file that keeps measurements; by default the recipe's name with .json.
        start_from: measurements of the model that this one was fine-tuned from.
        probes: most groups to probe; 0 for squared errors alone.
        chunks: most chunks of the text to measure on.
        context: tokens per chunk.
        explicit: write a rule for every role in every layer.
        device: for transformers.
        threads: most threads; None for all processors.
        overwrite: replace the recipe.
        token: for the Hub.
    """

    model: str
    format: Format
    text: Path
    size: str | int | None = None
    max_kld: float | None = None
    output: Path | None = None
    adapter: Sequence[str] = ()
    onto: str | None = None
    types: tuple[str, ...] = ()
    imatrix: str | None = None
    measurements: Path | None = None
    start_from: Path | None = None
    probes: int = 120
    chunks: int = 8
    context: int = 512
    explicit: bool = False
    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TuningJob:
    """A prepared tuning.

    Args:
        request: the user's options.
        checkpoint: the model.
        space: the choices.
        budget: the limit.
        text: the tuning text.
    """

    request: TuningRequest
    checkpoint: Checkpoint
    space: ChoiceSpace
    budget: TuningBudget
    text: EvaluationText


@dataclass(frozen=True)
class TuningResult:
    """The result of tuning.

    Args:
        recipe: the file written.
        space: the choices.
        tuned: the allocation and its cost.
        measured: all measurements.
    """

    recipe: Path
    space: ChoiceSpace
    tuned: TunedRecipe
    measured: Measurements

    def __repr__(self) -> str:
        return f"<TuningResult {self.recipe}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**tuned_json(self.space, self.tuned), "recipe": str(self.recipe)}


def prepare(request: TuningRequest) -> TuningJob:
    """Check the request and open the model; without an output, read only headers.

    Raises:
        UsageError: an option is missing, contradicts another, or its file exists already.
        InputError: the model, the text or the matrix cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    _check(request)
    text = read_text(request.text)
    checkpoint = opened_source(
        request.model,
        opened_adapters(request.adapter, request.onto),
        headers=request.output is None,
        token=request.token,
    )
    space = _space(checkpoint, request)
    return TuningJob(request, checkpoint, space, _budget(request, space), text)


def run(job: TuningJob, progress: Callable[[str], Progress] = lambda _: Silent()) -> TuningResult:
    """Measure, choose, and write the recipe.

    Args:
        job: with an output.
        progress: returns a progress that counts the named unit.

    Raises:
        UsageError: the budget cannot be met, or the measurements have another key.
    """
    request = job.request
    assert request.output is not None  # the caller runs no job without an output
    path = request.measurements or request.output.with_suffix(".json")
    threads = request.threads or default_threads()
    setting = ProbeSetting(request.text, request.context, request.chunks, threads, request.device)
    measured = _measurements(job, path)
    with scratch(request.output) as work:
        tuned = tune(
            job.space,
            job.budget,
            setting,
            measured,
            probes=request.probes,
            save=lambda measurements: measurements.save(path),
            work=work,
            progress=progress,
        )
    text = job.space.recipe(tuned.chosen, _describe(tuned), explicit=request.explicit)
    with os_errors(request.output):
        replace_file(request.output, text.encode())
    return TuningResult(request.output, job.space, tuned, measured)


def _check(request: TuningRequest) -> None:
    """Check the options before anything is read."""
    if (request.size is None) == (request.max_kld is None):
        raise UsageError("--size, --max-kld", "none or both", expected="one of them")
    if request.max_kld is not None and not 0 < request.max_kld < 100:
        raise UsageError("--max-kld", str(request.max_kld), expected="nats, such as 0.02")
    if request.probes < 0:
        raise UsageError("--probes", str(request.probes), expected="a number of groups, or 0")
    _check_format(request)
    if request.output is None:
        return
    if request.output.suffix != ".toml":
        expected = "a file to write, ending with .toml"
        raise UsageError("--output", str(request.output), expected=expected)
    if not request.output.absolute().parent.is_dir():
        found = f"{request.output.parent} is not a folder"
        raise UsageError("--output", found, hint="make it first")
    if request.output.exists() and not request.overwrite:
        raise UsageError("--output", f"{request.output} exists", hint="give --overwrite")
    check_is_file(request.output)


def _check_format(request: TuningRequest) -> None:
    if request.format not in FORMATS:
        raise unknown_name("--format", request.format, FORMATS, request.format)
    if (request.types or request.imatrix) and not tunable_of(request.format).typed:
        option = "--types" if request.types else "--imatrix"
        typed = (kind for kind in FORMATS if tunable_of(kind).typed)
        expected = f"--format {' or '.join(typed)}"
        raise UsageError(option, f"given with --format {request.format}", expected=expected)


def _space(checkpoint: Checkpoint, request: TuningRequest) -> ChoiceSpace:
    from qwen35.planning.gguf_files.imatrix import open_imatrix  # late: only GGUF needs it

    choices = tunable_of(request.format).choices(request.format, request.types)
    imatrix = open_imatrix(request.imatrix, request.token) if request.imatrix else None
    return ChoiceSpace(checkpoint, request.format, choices, imatrix)


def _budget(request: TuningRequest, space: ChoiceSpace) -> TuningBudget:
    if request.size is None:
        return TuningBudget(kld=request.max_kld)
    budget, least = _bytes(request.size, space), space.size(space.smallest)
    if budget < least:
        hint = "or smaller --types" if tunable_of(request.format).typed else ""
        expected = f"at least {least:,}, the smallest that {request.format} can be"
        found = f"{least - budget:,} bytes too small"
        raise UsageError("--size", found, expected=expected, hint=hint)
    return TuningBudget(nbytes=budget)


def _bytes(asked: str | int, space: ChoiceSpace) -> int:
    """Return a size in bytes or bits per weight as bytes."""
    if isinstance(asked, int):
        return asked
    try:
        if asked.lower().endswith("bpw"):
            return int(float(asked[:-3]) * space.weights / 8)
        return bytes_of(asked)
    except ValueError as error:
        expected = "bits per weight or bytes: 4.5bpw, 3.2GB"
        raise UsageError("--size", repr(asked), expected=expected) from error


def _measurements(job: TuningJob, path: Path) -> Measurements:
    """Load the measurements with this job's key, or start new ones.

    Raises:
        UsageError: the file has another key, or there is nothing to start from.
    """
    request, imatrix = job.request, job.space.imatrix
    key = MeasurementKey(
        request.format,
        model_digest(job.checkpoint),
        job.text.sha256,
        request.context,
        request.chunks,
        imatrix.digest if imatrix else "",
    )
    if path.exists():
        stored = load_measurements(path)
        if stored.key != key:
            differing = [n for n in vars(key) if getattr(key, n) != getattr(stored.key, n)]
            raise UsageError(
                str(path),
                f"measured with another {', '.join(differing)}",
                hint="give another --measurements, or this file as --start-from",
            )
        return stored
    fresh = Measurements(key, job.checkpoint.title)
    if request.start_from is not None:
        earlier = load_measurements(request.start_from)
        if earlier.key.format != request.format or not earlier.probes:
            found = f"measurements of {earlier.key.format}" if earlier.probes else "no probes"
            expected = f"probes of {request.format}"
            raise UsageError(str(request.start_from), found, expected=expected)
        # Slopes and groups carry over to a fine-tune; squared errors are measured anew.
        fresh.groups, fresh.probes = earlier.groups, earlier.probes
    return fresh


def _describe(tuned: TunedRecipe) -> str:
    measured = f"{tuned.kld:.3g} nats measured" if tuned.kld is not None else "not measured"
    return f"tuned: {tuned.nbytes} bytes, {measured}"
