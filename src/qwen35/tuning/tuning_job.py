"""What a tuning is asked for, checked and opened before anything is measured, and carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import bytes_of
from qwen35.errors import UsageError
from qwen35.evaluation.text_chunks import EvaluationText, read_text
from qwen35.progress import Progress, Silent
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
"""A format of recipes that can be tuned: one of `qwen35.tuning.formats.FORMATS`."""


@dataclass(frozen=True)
class TuningRequest:
    """What the user asks for.

    Args:
        model: folder or Hub id.
        format: of the artifact.
        text: to measure on.
        size: of the weight files, at most: bytes, or ``4.5bpw``, ``3.2GB``, ``800MiB``.
        max_kld: mean divergence on the text, at most, in nats; instead of a size.
        output: recipe to write; None to only look.
        types: to choose from, in GGUF files; the usual ones if empty.
        imatrix: for GGUF files: importance matrix, or ``hf:owner/name/path``.
        measurements: file that keeps what is measured; by default the recipe's name with .json.
        start_from: measurements of the model that this one was tuned from.
        probes: groups to measure at most; 0 for squared errors alone.
        chunks: of the text, to measure on.
        context: tokens a chunk.
        explicit: a rule for every role in every layer.
        device: for transformers.
        threads: at most so many; all processors if None.
        overwrite: replace the recipe.
        token: for the Hub.
    """

    model: str
    format: Format
    text: Path
    size: str | int | None = None
    max_kld: float | None = None
    output: Path | None = None
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
        asked: what was asked for.
        checkpoint: the model.
        space: the choices.
        budget: what must be kept to.
        text: what is measured on.
    """

    asked: TuningRequest
    checkpoint: Checkpoint
    space: ChoiceSpace
    budget: TuningBudget
    text: EvaluationText


@dataclass(frozen=True)
class TuningResult:
    """What came of it.

    Args:
        recipe: the file that was written.
        space: the choices that there were.
        tuned: what was chosen, and what it costs.
        measured: everything that was measured.
    """

    recipe: Path
    space: ChoiceSpace
    tuned: TunedRecipe
    measured: Measurements

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**tuned_json(self.space, self.tuned), "recipe": str(self.recipe)}


def prepare(asked: TuningRequest) -> TuningJob:
    """Check what was asked for and open the model; without an output, from headers alone.

    Raises:
        UsageError: something is missing, contradicts or exists already.
        InputError: the model, the text or the matrix cannot be read.
        HubError: the Hub refused, or was not reached.
    """
    _check(asked)
    text = read_text(asked.text)
    checkpoint = (fetch if asked.output else describe)(asked.model, token=asked.token)
    space = _space(checkpoint, asked)
    return TuningJob(asked, checkpoint, space, _budget(asked, space), text)


def run(job: TuningJob, progress: Callable[[str], Progress] = lambda _: Silent()) -> TuningResult:
    """Measure, choose, and write the recipe.

    Args:
        job: with an output.
        progress: makes progress that counts a unit.

    Raises:
        UsageError: the budget cannot be kept to, or the measurements are of another case.
    """
    asked = job.asked
    assert asked.output is not None  # or there would be nothing to write
    path = asked.measurements or asked.output.with_suffix(".json")
    threads = asked.threads or default_threads()
    setting = ProbeSetting(asked.text, asked.context, asked.chunks, threads, asked.device)
    measured = _measurements(job, path)
    tuned = tune(
        job.space,
        job.budget,
        setting,
        measured,
        probes=asked.probes,
        save=lambda found: found.save(path),
        work=asked.output.parent,
        progress=progress,
    )
    text = job.space.recipe(tuned.chosen, _describe(tuned), explicit=asked.explicit)
    part = asked.output.with_name(f".{asked.output.name}.part")
    part.write_text(text, "utf-8")
    part.replace(asked.output)
    return TuningResult(asked.output, job.space, tuned, measured)


def _check(asked: TuningRequest) -> None:
    """Check what can be checked before anything is read."""
    if (asked.size is None) == (asked.max_kld is None):
        raise UsageError("--size, --max-kld", "none or both", expected="one of them")
    if asked.max_kld is not None and not 0 < asked.max_kld < 100:
        raise UsageError("--max-kld", str(asked.max_kld), expected="nats, such as 0.02")
    if asked.probes < 0:
        raise UsageError("--probes", str(asked.probes), expected="a number of groups, or 0")
    _check_format(asked)
    if asked.output is None:
        return
    if asked.output.suffix != ".toml":
        expected = "a file to write, ending with .toml"
        raise UsageError("--output", str(asked.output), expected=expected)
    if not asked.output.absolute().parent.is_dir():
        found = f"{asked.output.parent} is not a folder"
        raise UsageError("--output", found, hint="make it first")
    if asked.output.exists() and not asked.overwrite:
        raise UsageError("--output", f"{asked.output} exists", hint="give --overwrite")


def _check_format(asked: TuningRequest) -> None:
    if asked.format not in FORMATS:
        raise UsageError("--format", asked.format, expected=", ".join(FORMATS))
    if (asked.types or asked.imatrix) and not tunable_of(asked.format).typed:
        option = "--types" if asked.types else "--imatrix"
        typed = (kind for kind in FORMATS if tunable_of(kind).typed)
        expected = f"--format {' or '.join(typed)}"
        raise UsageError(option, f"given with --format {asked.format}", expected=expected)


def _space(checkpoint: Checkpoint, asked: TuningRequest) -> ChoiceSpace:
    from qwen35.planning.gguf_files.imatrix import open_imatrix

    choices = tunable_of(asked.format).choices(asked.format, asked.types)
    imatrix = open_imatrix(asked.imatrix, asked.token) if asked.imatrix else None
    return ChoiceSpace(checkpoint, asked.format, choices, imatrix)


def _budget(asked: TuningRequest, space: ChoiceSpace) -> TuningBudget:
    if asked.size is None:
        return TuningBudget(kld=asked.max_kld)
    if isinstance(asked.size, int):
        return TuningBudget(nbytes=asked.size)
    try:
        if asked.size.lower().endswith("bpw"):
            return TuningBudget(nbytes=int(float(asked.size[:-3]) * space.weights / 8))
        return TuningBudget(nbytes=bytes_of(asked.size))
    except ValueError as error:
        expected = "bits per weight or bytes: 4.5bpw, 3.2GB"
        raise UsageError("--size", repr(asked.size), expected=expected) from error


def _measurements(job: TuningJob, path: Path) -> Measurements:
    """Return what is in the file, if it is of this very case, or nothing measured yet.

    Raises:
        UsageError: the file is of another case, or there is nothing to start from.
    """
    asked, imatrix = job.asked, job.space.imatrix
    key = MeasurementKey(
        asked.format,
        model_digest(job.checkpoint),
        job.text.sha256,
        asked.context,
        asked.chunks,
        imatrix.digest if imatrix else "",
    )
    if path.exists():
        found = load_measurements(path)
        if found.key != key:
            differing = [n for n in vars(key) if getattr(key, n) != getattr(found.key, n)]
            raise UsageError(
                str(path),
                f"measured with another {', '.join(differing)}",
                hint="give another --measurements, or it as --start-from",
            )
        return found
    fresh = Measurements(key, Path(job.checkpoint.name).name)
    if asked.start_from is not None:
        earlier = load_measurements(asked.start_from)
        if earlier.key.format != asked.format or not earlier.probes:
            there = f"measurements of {earlier.key.format}" if earlier.probes else "no probes"
            expected = f"probes of {asked.format}"
            raise UsageError(str(asked.start_from), there, expected=expected)
        fresh.groups, fresh.probes = earlier.groups, earlier.probes
    return fresh


def _describe(tuned: TunedRecipe) -> str:
    measured = f"{tuned.kld:.3g} nats measured" if tuned.kld is not None else "not measured"
    return f"tuned: {tuned.nbytes} bytes, {measured}"
