"""A tuning job: check the request and open its inputs before measuring, then run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.calibration.calibration_run import device_for
from qwen35.calibration.text_windows import TextWindows, read_text
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import bytes_of
from qwen35.errors import UsageError, unknown_name
from qwen35.execution.dispatch import WorkerPool
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import replace_file
from qwen35.sinks.staging import os_errors, scratch
from qwen35.sinks.work_folder import check_is_file
from qwen35.threads import default_threads
from qwen35.tuning.formats import ENGINES, FORMATS, Engine
from qwen35.tuning.measurements import MeasurementKey, Measurements, load_measurements, model_digest
from qwen35.tuning.prices import Prices
from qwen35.tuning.pricing_passes import PricingSetting
from qwen35.tuning.pricing_plan import PricingPlan, plan_pricing
from qwen35.tuning.pricing_run import discard_work, measure_prices
from qwen35.tuning.probing import ProbeSetting
from qwen35.tuning.recipe_search import TunedRecipe, TuningBudget, tune, whole_model
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
        active: sizes are those of what computing one token reads.
        engine: whose rounding of inputs counts; None for that of the format's engine.
        output: recipe to write; None for a dry run.
        adapter: adapters merged into the model, as ``DIR`` or ``DIR=WEIGHT``.
        onto: the format into whose values they are merged; None for the model's own.
        types: GGUF types to choose from; the defaults if empty.
        imatrix: for GGUF files: importance matrix, or ``hf:owner/name/path``.
        measurements: file that keeps measurements; by default the recipe's name with .json.
        start_from: measurements of the model that this one was fine-tuned from.
        probes: most models to write and measure, as a check.
        sample: compare every so many rows of candidates.
        memory: most bytes that measuring prices may take; None for no limit.
        chunks: most chunks of the text to measure on.
        context: tokens per chunk.
        explicit: write a rule for every role in every layer.
        device: for transformers.
        threads: most threads; None for all processors.
        workers: processes that windows and rows are shared out to, to measure prices.
        ray_address: share them out on this cluster.
        overwrite: replace the recipe.
        token: for the Hub.
    """

    model: str
    format: Format
    text: Path
    size: str | int | None = None
    max_kld: float | None = None
    active: bool = False
    engine: Engine | None = None
    output: Path | None = None
    adapter: Sequence[str] = ()
    onto: str | None = None
    types: tuple[str, ...] = ()
    imatrix: str | None = None
    measurements: Path | None = None
    start_from: Path | None = None
    probes: int = 0
    sample: int = 1
    memory: int | None = None
    chunks: int = 32
    context: int = 512
    explicit: bool = False
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    ray_address: str | None = None
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
        plan: of the passes that measure prices; None for a dry run of a published size.
        text: the tuning text; None for a dry run, which has no tokenizer.
    """

    request: TuningRequest
    checkpoint: Checkpoint
    space: ChoiceSpace
    budget: TuningBudget
    plan: PricingPlan
    text: TextWindows | None

    @property
    def engine(self) -> Engine:
        """Whose rounding of inputs counts."""
        rounds = tunable_of(self.request.format).rounds_inputs
        return self.request.engine or ("llama.cpp" if rounds else "weights")


@dataclass(frozen=True)
class TuningResult:
    """The result of tuning.

    Args:
        recipe: the file written.
        space: the choices.
        engine: whose rounding of inputs counted.
        tuned: the allocation and its cost.
        measured: all measurements.
    """

    recipe: Path
    space: ChoiceSpace
    engine: Engine
    tuned: TunedRecipe
    measured: Measurements

    def __repr__(self) -> str:
        return f"<TuningResult {self.recipe}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        told = tuned_json(self.space, self.tuned, self.measured, self.engine)
        return {**told, "recipe": str(self.recipe)}


def prepare(request: TuningRequest) -> TuningJob:
    """Check the request and open the model; without an output, read only headers.

    Raises:
        UsageError: an option is missing, contradicts another, or its file exists already.
        InputError: the model, the text or the matrix cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    _check(request)
    dry = request.output is None
    checkpoint = opened_source(
        request.model,
        opened_adapters(request.adapter, request.onto),
        headers=dry,
        token=request.token,
    )
    text = None
    if not dry:
        text = read_text(
            checkpoint, [request.text], context=request.context, windows=request.chunks
        )
    space = _space(checkpoint, request)
    plan = plan_pricing(
        checkpoint,
        context=request.context,
        windows=request.chunks if text is None else len(text.windows),
        memory=request.memory,
        shares=request.workers or 1,
    )
    return TuningJob(request, checkpoint, space, _budget(request, space), plan, text)


def run(
    job: TuningJob,
    progress: Callable[[str], Progress] = lambda _: Silent(),
    pool: WorkerPool | None = None,
) -> TuningResult:
    """Measure prices, choose, and write the recipe.

    Args:
        job: with an output.
        progress: returns a progress that counts the named unit.
        pool: workers that measure prices instead of this process.

    Raises:
        WorkerError: the workers of a job died at every attempt.
        UsageError: the budget cannot be met, or the measurements have another key.
    """
    request = job.request
    assert request.output is not None  # the caller runs no job without an output
    path = request.measurements or request.output.with_suffix(".json")
    measured = _measurements(job, path)
    _price(job, measured, path, progress(""), pool)
    threads = request.threads or default_threads()
    setting = ProbeSetting(request.text, request.context, request.chunks, threads, request.device)
    with scratch(request.output) as work:
        tuned = tune(
            job.space,
            job.budget,
            measured,
            _costs(job, measured),
            probes=request.probes,
            setting=setting,
            save=lambda measurements: measurements.save(path),
            work=work,
            progress=progress,
        )
    text = job.space.recipe(tuned.chosen, _describe(tuned), explicit=request.explicit)
    with os_errors(request.output):
        replace_file(request.output, text.encode())
    return TuningResult(request.output, job.space, job.engine, tuned, measured)


def _costs(job: TuningJob, measured: Measurements) -> dict[str, dict[str, float]]:
    """Return the prices that count, in the order of the units, whatever was read from a file."""
    found = measured.prices.table(inputs=job.engine != "weights")
    return {
        unit.name: {choice: found[unit.name][choice] for choice in unit.sizes}
        for unit in job.space.units
    }


def _price(
    job: TuningJob,
    measured: Measurements,
    path: Path,
    progress: Progress,
    pool: WorkerPool | None,
) -> None:
    """Measure the prices that are missing."""
    required = {unit.name: set(unit.sizes) for unit in job.space.units}
    if any(
        not choices <= set(measured.prices.weights.get(unit, {}))
        for unit, choices in required.items()
    ):
        request = job.request
        assert job.text is not None  # the caller runs no job without an output
        setting = PricingSetting(
            job.text.windows,
            # The devices of a cluster are not those of this machine.
            request.device if request.ray_address else device_for(request.device),
            request.threads or default_threads(),
            request.sample,
            request.memory,
            request.overwrite,
            request.workers or 1,
        )
        identity = repr(measured.key)
        measured.prices = measure_prices(job.space, setting, identity, path, progress, pool)
        measured.origin = ""
        measured.save(path)
    elif not path.exists():
        measured.save(path)
    discard_work(path)


def _check(request: TuningRequest) -> None:
    """Check the options before anything is read."""
    if (request.size is None) == (request.max_kld is None):
        raise UsageError("--size, --max-kld", "none or both", expected="one of them")
    if request.max_kld is not None and not 0 < request.max_kld < 100:
        raise UsageError("--max-kld", str(request.max_kld), expected="nats, such as 0.02")
    _check_numbers(request)
    _check_format(request)
    if request.output is not None:
        _check_output(request.output, overwrite=request.overwrite)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.suffix != ".toml":
        expected = "a file to write, ending with .toml"
        raise UsageError("--output", str(output), expected=expected)
    if not output.absolute().parent.is_dir():
        raise UsageError("--output", f"{output.parent} is not a folder", hint="make it first")
    if output.exists() and not overwrite:
        raise UsageError("--output", f"{output} exists", hint="give --overwrite")
    check_is_file(output)


def _check_numbers(request: TuningRequest) -> None:
    if request.probes < 0:
        raise UsageError("--probes", str(request.probes), expected="a number of models, or 0")
    if request.context < 3:  # of two tokens, the second half has nothing to predict
        raise UsageError("--context", str(request.context), expected="3 tokens at least")
    if request.sample < 1:
        raise UsageError("--sample", str(request.sample), expected="a number of rows")


def _check_format(request: TuningRequest) -> None:
    if request.format not in FORMATS:
        raise unknown_name("--format", request.format, FORMATS, request.format)
    if (request.types or request.imatrix) and not tunable_of(request.format).typed:
        option = "--types" if request.types else "--imatrix"
        typed = (kind for kind in FORMATS if tunable_of(kind).typed)
        expected = f"--format {' or '.join(typed)}"
        raise UsageError(option, f"given with --format {request.format}", expected=expected)
    if request.engine not in (None, *ENGINES):
        raise unknown_name("--for", str(request.engine), ENGINES, str(request.engine))
    if request.engine == "llama.cpp" and not tunable_of(request.format).rounds_inputs:
        found = f"{request.engine} given with --format {request.format}"
        raise UsageError("--for", found, hint="other engines run it: leave the flag out")


def _space(checkpoint: Checkpoint, request: TuningRequest) -> ChoiceSpace:
    from qwen35.planning.gguf_files.imatrix import open_imatrix  # late: only GGUF needs it

    choices = tunable_of(request.format).choices(request.format, request.types)
    imatrix = open_imatrix(request.imatrix, request.token) if request.imatrix else None
    return ChoiceSpace(checkpoint, request.format, choices, imatrix)


def _budget(request: TuningRequest, space: ChoiceSpace) -> TuningBudget:
    if request.size is None:
        return TuningBudget(kld=request.max_kld, active=request.active)
    smallest = space.smallest
    least = space.active(smallest) if request.active else space.size(smallest)
    budget = _bytes(request.size, space, active=request.active)
    if budget < least:
        hint = "or smaller --types" if tunable_of(request.format).typed else ""
        expected = f"at least {least:,}, the smallest that {request.format} can be"
        found = f"{least - budget:,} bytes too small"
        raise UsageError("--size", found, expected=expected, hint=hint)
    exact = {unit.name: space.exact for unit in space.units}
    if budget >= (space.active(exact) if request.active else space.size(exact)):
        raise whole_model(budget)  # before anything is measured
    return TuningBudget(nbytes=budget, active=request.active)


def _bytes(asked: str | int, space: ChoiceSpace, *, active: bool) -> int:
    """Return a size in bytes or bits per weight as bytes."""
    if isinstance(asked, int):
        return asked
    try:
        if asked.lower().endswith("bpw"):
            weights = space.active_weights if active else space.weights
            return int(float(asked[:-3]) * weights / 8)
        return bytes_of(asked)
    except (ValueError, OverflowError) as error:
        expected = "bits per weight or bytes: 4.5bpw, 3.2GB"
        raise UsageError("--size", repr(asked), expected=expected) from error


def _measurements(job: TuningJob, path: Path) -> Measurements:
    """Load the measurements with this job's key, or start new ones.

    Raises:
        UsageError: the file has another key, or there is nothing to start from.
    """
    request, imatrix = job.request, job.space.imatrix
    assert job.text is not None  # the caller runs no job without an output
    key = MeasurementKey(
        request.format,
        model_digest(job.checkpoint),
        job.text.files[0][1],
        request.context,
        request.chunks,
        imatrix.digest if imatrix else "",
        request.sample,
        weights=_numel(job.space),
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
        fresh.prices, fresh.origin = _of_base(request.start_from, key, job.space)
    return fresh


def _of_base(path: Path, key: MeasurementKey, space: ChoiceSpace) -> tuple[Prices, str]:
    """Return the prices of the model that this one was tuned from, and its name.

    Raises:
        UsageError: they are of another format, of other units or types.
    """
    base = load_measurements(path)
    if base.key.format != key.format:
        found = f"measurements of {base.key.format}"
        raise UsageError(str(path), found, expected=f"prices of {key.format}")
    hint = "is it of the base of this model, with these --types? Or leave --start-from out"
    if base.key.weights != key.weights:
        found = f"prices of {base.key.weights:,} weights"
        raise UsageError(str(path), found, expected=f"of {key.weights:,}", hint=hint)
    lacking = [
        f"{choice} of {unit.name}"
        for unit in space.units
        for choice in unit.sizes
        if choice not in base.prices.weights.get(unit.name, {})
    ]
    if lacking:
        found = f"no price of {lacking[0]} in it"
        raise UsageError(str(path), found, hint=hint)
    return base.prices, base.origin or base.name


def _numel(space: ChoiceSpace) -> int:
    return sum(unit.numel for unit in space.units)


def _describe(tuned: TunedRecipe) -> str:
    said = f"tuned: {tuned.nbytes} bytes, {tuned.predicted:.3g} nats predicted"
    return said if tuned.kld is None else f"{said}, {tuned.kld:.3g} measured"
