"""What a user asks of tuning, and what is wrong with it before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen35.errors import UsageError, unknown_name
from qwen35.sinks.work_folder import check_is_file
from qwen35.tuning.formats import ENGINES, FORMATS, Engine
from qwen35.tuning.tunable import tunable_of

__all__ = ["Format", "TuningRequest", "check_request"]

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
        hessian: folder of Hessians by which codes will be refined; None for plain codes.
        measurements: file that keeps measurements; by default the recipe's name with .json.
        start_from: measurements of the model that this one was fine-tuned from.
        probes: most models to write and measure, as a check.
        sample: compare every so many rows of candidates.
        memory: most bytes that measuring prices may take; None for no limit.
        chunks: most chunks of the text to measure on; None for 16, or 32 of a mixture of experts,
            each of which sees but a part of them.
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
    hessian: Path | None = None
    measurements: Path | None = None
    start_from: Path | None = None
    probes: int = 0
    sample: int = 1
    memory: int | None = None
    chunks: int | None = None
    context: int = 512
    explicit: bool = False
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    ray_address: str | None = None
    overwrite: bool = False
    token: str | None = field(default=None, repr=False)


_SPARSEST = 64
"""Largest of the numbers that `--sample` takes: of fewer rows, a price would be that of a few."""


def check_request(request: TuningRequest) -> None:
    """Check the options before anything is read.

    Raises:
        UsageError: one has no meaning here, or contradicts another.
        OutputError: the recipe's path is no file.
    """
    if (request.size is None) == (request.max_kld is None):
        raise UsageError("--size, --max-kld", "none or both", expected="one of them")
    if request.max_kld is not None and not 0 < request.max_kld < 100:
        raise UsageError("--max-kld", str(request.max_kld), expected="nats, such as 0.02")
    _check_numbers(request)
    _check_format(request)
    _check_measuring(request)
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


def _check_measuring(request: TuningRequest) -> None:
    """Check what is said of measurements, and of those of another model."""
    path = request.measurements
    if path is not None and not path.absolute().parent.is_dir():
        found = f"{path.parent} is not a folder"
        raise UsageError("--measurements", found, hint="make it first")
    others = {"--output": request.output, "--text": request.text}
    for option, other in others.items():
        if path is not None and other is not None and path.absolute() == other.absolute():
            found = f"{path} is the file of {option} too"
            raise UsageError("--measurements", found, hint="give another file")
    if request.hessian is not None and request.probes:
        found, hint = "given with --hessian", "probes have plain codes: leave one of the two out"
        raise UsageError("--probes", found, hint=hint)
    shared = {"--workers": request.workers, "--ray-address": request.ray_address}
    for option, value in shared.items():
        if request.start_from is not None and value is not None:
            hint = "leave it out: prices are taken from that file, and nothing is measured"
            raise UsageError(option, "given with --start-from", hint=hint)


def _check_numbers(request: TuningRequest) -> None:
    if request.probes < 0:
        raise UsageError("--probes", str(request.probes), expected="a number of models, or 0")
    if request.context < 3:  # of two tokens, the second half has nothing to predict
        raise UsageError("--context", str(request.context), expected="3 tokens at least")
    if not 1 <= request.sample <= _SPARSEST:
        raise UsageError(
            "--sample", str(request.sample), expected=f"a number from 1 to {_SPARSEST}"
        )
    if request.chunks is not None and request.chunks < 1:
        raise UsageError("--chunks", str(request.chunks), expected="a positive number")
    if request.memory is not None and request.memory < 1:
        raise UsageError("--memory", str(request.memory), expected="a positive size")


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
    if request.probes and request.engine == "weights" and tunable_of(request.format).rounds_inputs:
        found = "given with --for weights"
        hint = "llama.cpp measures them, and rounds inputs: leave one of the two out"
        raise UsageError("--probes", found, hint=hint)
