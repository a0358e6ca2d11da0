"""A prepared evaluation: models, tokens, noise floor and memory, fixed before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwen35.checkpoint.adapter_files import Adapter
from qwen35.display import size
from qwen35.errors import InputError, UsageError
from qwen35.evaluation.cache import CacheFile, cache_size
from qwen35.evaluation.kld_file import KldFile, kld_file_size
from qwen35.evaluation.models import (
    Engine,
    EvaluatedModel,
    check_same_tokens,
    open_base,
    open_candidates,
)
from qwen35.evaluation.runners import running_memory
from qwen35.evaluation.served_candidate import ServedTarget, open_served
from qwen35.evaluation.stream_plan import StreamPlan, plan_stream, simulations, streamed_model
from qwen35.evaluation.text_chunks import (
    CONTEXT,
    Decode,
    EvaluationText,
    TokenChunks,
    read_text,
    tokenize,
    tokenizer_of,
)
from qwen35.serving.endpoint import Endpoint
from qwen35.threads import default_threads

__all__ = ["EvaluationJob", "EvaluationRequest", "prepare"]


@dataclass(frozen=True)
class EvaluationRequest:
    """User options of an evaluation.

    Args:
        base: folder, Hub id or GGUF file of the unquantized model.
        candidates: folders, Hub ids, GGUF files, folders of them, ``hf:owner/name/path`` of one.
        adapters: merged into the base.
        text: the evaluation text; optional if `kld_file` exists.
        context: tokens per chunk; 0 for the default, or that of an existing `kld_file`.
        chunks: most chunks; 0 for the whole text.
        threads: for engines and statistics; 0 for all processors.
        device: for transformers: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        unquantized: the base in the other engine's format, for the noise floor; by default made
            from the base if possible.
        kld_file: llama-perplexity file, read instead of running the base if it exists, else
            written.
        cache: the same in compact form.
        memory: most bytes to use; 0 for no limit.
        simulate: whether candidates whose inputs servers quantize are measured with that too.
        endpoints: servers with more candidates, each with the model's name there, if given.
        llama_inputs: whether GGUF candidates are measured with the inputs that llama.cpp has too.
        streamed: whether models run layer by layer, whatever memory there is.
        token: for the Hub.
    """

    base: str
    candidates: tuple[str, ...] = ()
    text: Path | None = None
    context: int = 0
    chunks: int = 0
    threads: int = 0
    device: str = "auto"
    unquantized: str | None = None
    kld_file: Path | None = None
    cache: Path | None = None
    memory: int = 0
    simulate: bool = True
    adapters: Sequence[Adapter] = ()
    endpoints: tuple[tuple[Endpoint, str | None], ...] = ()
    llama_inputs: bool = False
    streamed: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EvaluationJob:
    """A prepared evaluation.

    Args:
        request: the user's options.
        base: the unquantized model.
        candidates: the models compared with it; those that servers run come last.
        floors: the unquantized model in engines that the base does not run in.
        floor_to_make: whether a GGUF file of the base must be written for the noise floor.
        text: the evaluation text, if given.
        chunks: its tokens.
        decode: decodes token ids with the base's tokenizer.
        threads: for engines and statistics.
        reference_file: the existing file read instead of running the base, if any.
        served: the candidates that servers run.
        stream: how models run layer by layer; None if they run in memory.
    """

    request: EvaluationRequest
    base: EvaluatedModel
    candidates: tuple[EvaluatedModel, ...]
    floors: tuple[EvaluatedModel, ...]
    floor_to_make: bool
    text: EvaluationText | None
    chunks: TokenChunks
    decode: Decode
    threads: int
    reference_file: Path | None
    served: tuple[ServedTarget, ...] = ()
    stream: StreamPlan | None = None

    @property
    def simulations(self) -> tuple[EvaluatedModel, ...]:
        """The candidates whose inputs servers quantize, run so; each runs in one model with its."""
        servers, llama = self.request.simulate, self.request.llama_inputs
        return simulations(self.candidates, servers=servers, llama=llama)

    @property
    def memory(self) -> int:
        """Upper estimate of peak memory in bytes."""
        if self.stream is not None:
            return _INTERPRETER + self.stream.memory + self.results
        running = [*self.candidates, *self.floors]
        if self.reference_file is None:
            running.append(self.base)
        if self.floor_to_make:
            # The F16 file is about as large as the base.
            running.append(replace(self.base, engine="llama.cpp", loaded=self.base.nbytes))
        return _INTERPRETER + running_memory(running, self.chunks.scored) + self.results

    @property
    def temporary(self) -> int:
        """Approximate bytes of temporary files: the merged base, and one for the noise floor."""
        return self.base.nbytes * (self.merged + self.floor_to_make)

    @property
    def merged(self) -> bool:
        """Whether the base is written with its adapters, to be loaded."""
        in_memory = self.stream is None and self.reference_file is None
        return bool(self.base.adapters) and in_memory

    @property
    def writes(self) -> dict[Path, int]:
        """Files of the base's log probabilities to write, with their maximum sizes."""
        if self.reference_file is not None:
            return {}
        sizes = {}
        if self.request.kld_file is not None:
            sizes[self.request.kld_file] = kld_file_size(self.chunks, self.base.width)
        if self.request.cache is not None:
            sizes[self.request.cache] = cache_size(self.chunks, self.base.width)
        return sizes

    @property
    def results(self) -> int:
        """Bytes of the results kept per scored token, over all tokens."""
        candidates = len(self.candidates) + len(self.simulations)
        rows = 2 + 4 * (candidates + len(self.floors) + self.floor_to_make)
        return self.chunks.count * self.chunks.scored * rows * 8


_INTERPRETER = 300_000_000
"""Bytes of the interpreter with NumPy, Numba and its compiler, and the tokenizer."""


def prepare(request: EvaluationRequest) -> EvaluationJob:
    """Open all inputs by their headers, check that they fit together, and tokenize the text.

    Raises:
        InputError: an input is not a model, the base is quantized, or tokenizers differ.
        UsageError: an option is missing, or options contradict each other.
    """
    if request.kld_file is not None and request.cache is not None:
        raise UsageError("--cache", "given with --kl-divergence-base", hint="one of them is enough")
    alone = not (request.candidates or request.kld_file or request.cache)
    base = open_base(request.base, adapters=request.adapters, token=request.token, alone=alone)
    candidates = open_candidates(request.candidates, token=request.token)
    floors, to_make = _floors(request, base, candidates)
    for model in (*candidates, *floors):
        check_same_tokens(model, base)
    served = open_served(request.endpoints, base)
    candidates = [*candidates, *(target.model for target in served)]
    text = None if request.text is None else read_text(request.text)
    encode, decode = tokenizer_of(base)
    reference = next(
        (p for p in (request.kld_file, request.cache) if p is not None and p.exists()), None
    )
    if reference is not None and reference == request.kld_file:
        chunks = _stored_chunks(reference, request, base)
        if text is not None:
            _check_same_text(reference, chunks, tokenize(encode, text, chunks.context))
    elif text is None:
        raise UsageError("--text", "missing", hint="give the text to measure on")
    else:
        chunks = tokenize(encode, text, request.context or CONTEXT)
    if request.chunks:
        chunks = TokenChunks(chunks.ids[: request.chunks])
    threads = request.threads or default_threads()
    job = EvaluationJob(
        request,
        base,
        tuple(candidates),
        floors,
        to_make,
        text,
        chunks,
        decode,
        threads,
        reference,
        tuple(served),
    )
    if reference is not None and reference == request.cache:
        # Check it before anything runs.
        CacheFile(reference, chunks, base.width, base.effects()).close()
    return _fitting(job)


def _fitting(job: EvaluationJob) -> EvaluationJob:
    """Return the job with models that run layer by layer, if that is asked or they do not fit."""
    request = job.request
    if request.streamed or (request.memory and job.memory > request.memory):
        return _streamed(job)
    if request.llama_inputs:
        found = "models run in memory, and GGUF files in llama.cpp itself"
        raise UsageError("--simulate llama.cpp", found, hint="give --streamed")
    return job


def _streamed(job: EvaluationJob) -> EvaluationJob:
    """Return the job with models that run layer by layer, which needs no noise floor.

    Raises:
        UsageError: options do not fit that, or even that takes too much memory.
    """
    request, base = job.request, job.base
    if request.unquantized is not None:
        found = "given, but all models run in one engine, layer by layer"
        hint = "leave it out" if request.streamed else "give --streamed instead"
        raise UsageError("--unquantized", found, hint=hint)
    why = ""
    if not request.streamed:
        why = f"in memory, models would take {size(job.memory)}, --memory is {size(request.memory)}"
    here = [model for model in job.candidates if model.engine != "server"]
    candidates = (*map(streamed_model, here), *(target.model for target in job.served))
    job = replace(
        job, base=streamed_model(base), candidates=candidates, floors=(), floor_to_make=False
    )
    if request.llama_inputs and not any(model.single for model in candidates):
        raise UsageError("--simulate llama.cpp", "no candidate is a GGUF file", hint="leave it out")
    running = len(here) + len(job.simulations) + (job.reference_file is None)
    stream = plan_stream(
        base,
        job.chunks,
        running,
        fixed=_INTERPRETER + job.results,
        memory=request.memory,
        threads=job.threads,
        why=why,
    )
    return replace(job, stream=stream)


def _floors(
    request: EvaluationRequest, base: EvaluatedModel, candidates: Sequence[EvaluatedModel]
) -> tuple[tuple[EvaluatedModel, ...], bool]:
    """Return the models of the noise floor, and whether one must be made from the base."""
    if request.streamed:
        return (), False
    others: set[Engine] = {c.engine for c in candidates} - {base.engine}
    if request.unquantized is not None:
        model = open_base(request.unquantized, token=request.token)
        if model.engine not in others:
            found = f"{model.name} runs in {model.engine}, which needs no noise floor here"
            raise UsageError("--unquantized", found, hint="leave it out")
        return (model,), False
    if not others:
        return (), False
    if base.engine == "llama.cpp":
        raise UsageError(
            base.name,
            "is a GGUF file and a candidate runs in transformers",
            hint="give --unquantized CHECKPOINT to measure the noise between the engines",
        )
    return (), True


def _stored_chunks(path: Path, request: EvaluationRequest, base: EvaluatedModel) -> TokenChunks:
    file = KldFile(path)
    file.close()
    if file.vocabulary != base.width:
        found = f"a vocabulary of {file.vocabulary}"
        raise InputError(path.name, found, expected=f"{base.width} as in {base.name}")
    if request.context and request.context != file.chunks.context:
        found = f"a context of {file.chunks.context}"
        raise InputError(path.name, found, expected=f"{request.context} (--context)")
    return file.chunks


def _check_same_text(path: Path, stored: TokenChunks, text: TokenChunks) -> None:
    if text.count < stored.count or (text.ids[: stored.count] != stored.ids).any():
        raise InputError(
            path.name,
            "its tokens differ from those of the text",
            expected="a file made from the same text, or a new one",
        )
