"""A tuning job: check the request and open its inputs before measuring, then run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35.calibration.calibration_run import device_for
from qwen35.calibration.text_windows import TextWindows, read_text
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import bytes_of, size, units_for
from qwen35.errors import UsageError
from qwen35.execution.dispatch import WorkerPool
from qwen35.planning.hessians import Hessians, open_hessians
from qwen35.planning.manifest import source_json
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.planning.refinement import foreign_hessians
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import replace_file
from qwen35.sinks.staging import os_errors, scratch
from qwen35.threads import default_threads
from qwen35.tuning.formats import Engine
from qwen35.tuning.measurements import MeasurementKey, Measurements, load_measurements, model_digest
from qwen35.tuning.prices import Prices
from qwen35.tuning.pricing_passes import PricingSetting
from qwen35.tuning.pricing_plan import PricingPlan, plan_pricing
from qwen35.tuning.pricing_run import discard_work, measure_prices
from qwen35.tuning.probing import ProbeSetting
from qwen35.tuning.recipe_search import TunedRecipe, TuningBudget, tune, whole_model
from qwen35.tuning.refined_shares import comparing_memory, measure_shares
from qwen35.tuning.space import ChoiceSpace
from qwen35.tuning.tunable import tunable_of
from qwen35.tuning.tuning_display import tuned_json
from qwen35.tuning.tuning_request import TuningRequest, check_request

__all__ = ["TuningJob", "TuningResult", "prepare", "run"]

_CHUNKS, _MOE_CHUNKS = 16, 32
"""Of 512 tokens: enough for prices within a tenth; each expert sees but a part of them."""


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
        hessians: by which codes will be refined; None for plain codes.
    """

    request: TuningRequest
    checkpoint: Checkpoint
    space: ChoiceSpace
    budget: TuningBudget
    plan: PricingPlan
    text: TextWindows | None
    hessians: Hessians | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, on the model and the Hessians."""
        if self.hessians is None:
            return self.space.notes
        foreign = foreign_hessians(self.hessians, source_json(self.checkpoint))
        return (*self.space.notes, *foreign)

    @property
    def threads(self) -> int:
        """The most threads."""
        return self.request.threads or default_threads()

    @property
    def hessians_memory(self) -> int:
        """Bytes that Hessians take while codes are compared; 0 without any."""
        if self.hessians is None:
            return 0
        return comparing_memory(self.space, self.threads, self.request.memory)[1]

    @property
    def engine(self) -> Engine:
        """Whose rounding of inputs counts."""
        rounds = tunable_of(self.request.format).rounds_inputs
        return self.request.engine or ("llama.cpp" if rounds else "weights")

    @property
    def chunks(self) -> int:
        """The most chunks of the text to measure on."""
        return _chunks(self.request, self.checkpoint)


@dataclass(frozen=True)
class TuningResult:
    """The result of tuning.

    Args:
        recipe: the file written.
        notes: for the user, on the model and the Hessians.
        space: the choices.
        engine: whose rounding of inputs counted.
        tuned: the allocation and its cost.
        measured: all measurements.
    """

    recipe: Path
    notes: tuple[str, ...]
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
        InputError: the model, the text, the matrix or the Hessians cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    check_request(request)
    dry = request.output is None
    checkpoint = opened_source(
        request.model,
        opened_adapters(request.adapter, request.onto),
        headers=dry,
        token=request.token,
    )
    text, chunks = None, _chunks(request, checkpoint)
    if not dry:
        text = read_text(checkpoint, [request.text], context=request.context, windows=chunks)
    space = _space(checkpoint, request)
    _check_probes(space, request)
    plan = plan_pricing(
        checkpoint,
        context=request.context,
        windows=chunks if text is None else len(text.windows),
        memory=request.memory,
        shares=request.workers or 1,
        threads=request.threads or default_threads(),
    )
    hessians = None if request.hessian is None else open_hessians(request.hessian)
    job = TuningJob(request, checkpoint, space, _budget(request, space), plan, text, hessians)
    if hessians is not None:
        hessians.check(checkpoint.config.geometry, plan.items)
        comparing_memory(space, job.threads, request.memory)
    return job


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
    _compare(job, measured, path, progress("matrices"))
    setting = ProbeSetting(request.text, request.context, job.chunks, job.threads, request.device)
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
    return TuningResult(request.output, job.notes, job.space, job.engine, tuned, measured)


def _costs(job: TuningJob, measured: Measurements) -> dict[str, dict[str, float]]:
    """Return the prices that count, in the order of the units, whatever was read from a file."""
    found = measured.prices.table(inputs=job.engine != "weights", refined=measured.refined)
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
            job.threads,
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


def _compare(job: TuningJob, measured: Measurements, path: Path, progress: Progress) -> None:
    """Compare refined codes with nearest ones, unless they were; forget them for plain codes."""
    if job.hessians is None:
        measured.refined = None
        return
    known = measured.refined
    if (
        known is not None
        and known.hessians == job.hessians.sha256
        and all(set(unit.sizes) <= set(known.shares.get(unit.name, {})) for unit in job.space.units)
    ):
        return
    threads, _ = comparing_memory(job.space, job.threads, job.request.memory)
    measured.refined = measure_shares(job.space, job.hessians, threads, progress)
    measured.save(path)


def _chunks(request: TuningRequest, checkpoint: Checkpoint) -> int:
    return request.chunks or (_MOE_CHUNKS if checkpoint.config.moe else _CHUNKS)


def _space(checkpoint: Checkpoint, request: TuningRequest) -> ChoiceSpace:
    from qwen35.planning.gguf_files.imatrix import open_imatrix  # late: only GGUF needs it

    choices = tunable_of(request.format).choices(request.format, request.types)
    imatrix = open_imatrix(request.imatrix, request.token) if request.imatrix else None
    return ChoiceSpace(checkpoint, request.format, choices, imatrix)


def _check_probes(space: ChoiceSpace, request: TuningRequest) -> None:
    """Refuse probes, which load models whole, where memory does not hold two.

    Raises:
        UsageError: it does not.
    """
    if not request.probes or request.memory is None:
        return
    needed = space.loaded
    if needed > request.memory:
        found = f"a model and its original take at least {size(needed)} in memory"
        hint = f"leave them out, or give more than {size(request.memory)} as --memory"
        raise UsageError("--probes", found, hint=hint)


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
        examples = units_for(asked, "4.5bpw or 3.2GB", ("bpw", "GB"))
        expected = f"bits per weight or bytes, such as {examples}"
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
        job.chunks,
        imatrix.digest if imatrix else "",
        request.sample,
        weights=_numel(job.space),
    )
    taken = None
    if request.start_from is not None:
        taken = _of_base(request.start_from, key, job.space)
    if not path.exists():
        return Measurements(key, job.checkpoint.title, *(taken or ()))
    stored = load_measurements(path)
    if stored.key != key:
        differing = [n for n in vars(key) if getattr(key, n) != getattr(stored.key, n)]
        raise UsageError(
            str(path),
            f"measured with another {', '.join(differing)}",
            hint="give another --measurements, or this file as --start-from",
        )
    if taken is not None and taken != (stored.prices, stored.origin):
        whose = f"those of {stored.origin}" if stored.origin else "this model's own"
        raise UsageError(
            "--start-from",
            f"{path} has prices already, {whose}",
            hint="leave --start-from out to use them, or give another --measurements",
        )
    return stored


def _of_base(path: Path, key: MeasurementKey, space: ChoiceSpace) -> tuple[Prices, str]:
    """Return the prices of the model that this one was tuned from, and its name.

    Raises:
        UsageError: they are of another format, of other units or types.
    """
    base = load_measurements(path)
    if base.key.format != key.format:
        found = f"measurements of {base.key.format}"
        raise UsageError(str(path), found, expected=f"prices of {key.format}")
    if base.key.sample != key.sample:  # which the output says of the prices
        found = f"types compared on one row in {base.key.sample}"
        raise UsageError(str(path), found, hint=f"give --sample {base.key.sample}, as it has")
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
