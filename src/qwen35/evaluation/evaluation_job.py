"""A prepared evaluation: models, tokens, noise floor and memory, fixed before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from qwen35.evaluation.text_chunks import (
    CONTEXT,
    Decode,
    EvaluationText,
    TokenChunks,
    read_text,
    tokenize,
    tokenizer_of,
)
from qwen35.threads import default_threads

__all__ = ["EvaluationJob", "EvaluationRequest", "prepare"]


@dataclass(frozen=True)
class EvaluationRequest:
    """User options of an evaluation.

    Args:
        base: folder, Hub id or GGUF file of the unquantized model.
        candidates: folders, Hub ids, GGUF files, folders of them, ``hf:owner/name/path`` of one.
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
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EvaluationJob:
    """A prepared evaluation.

    Args:
        request: the user's options.
        base: the unquantized model.
        candidates: the models compared with it.
        floors: the unquantized model in engines that the base does not run in.
        floor_to_make: whether a GGUF file of the base must be written for the noise floor.
        text: the evaluation text, if given.
        chunks: its tokens.
        decode: decodes token ids with the base's tokenizer.
        threads: for engines and statistics.
        reference_file: the existing file read instead of running the base, if any.
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

    @property
    def simulations(self) -> tuple[EvaluatedModel, ...]:
        """The candidates whose inputs servers quantize, run so; each runs in one model with its."""
        chosen = self.candidates if self.request.simulate else ()
        return tuple(model.simulation for model in chosen if model.simulable)

    @property
    def memory(self) -> int:
        """Upper estimate of peak memory in bytes."""
        running = [*self.candidates, *self.floors]
        if self.reference_file is None:
            running.append(self.base)
        if self.floor_to_make:
            # The F16 file is about as large as the base.
            running.append(replace(self.base, engine="llama.cpp", loaded=self.base.nbytes))
        return _INTERPRETER + running_memory(running, self.chunks.scored) + self.results

    @property
    def temporary(self) -> int:
        """Approximate bytes of the GGUF file written for the noise floor."""
        return self.base.nbytes if self.floor_to_make else 0

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
    base = open_base(request.base, token=request.token)
    candidates = open_candidates(request.candidates, token=request.token)
    floors, to_make = _floors(request, base, candidates)
    for model in (*candidates, *floors):
        check_same_tokens(model, base)
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
        request, base, tuple(candidates), floors, to_make, text, chunks, decode, threads, reference
    )
    if reference is not None and reference == request.cache:
        CacheFile(reference, chunks, base.width).close()  # check it before anything runs
    if request.memory and job.memory > request.memory:
        raise UsageError(
            "--memory",
            f"{request.memory / 1e9:.2f} GB",
            expected=f"{job.memory / 1e9:.2f} GB",
            hint="give fewer candidates at a time, with --cache",
        )
    return job


def _floors(
    request: EvaluationRequest, base: EvaluatedModel, candidates: Sequence[EvaluatedModel]
) -> tuple[tuple[EvaluatedModel, ...], bool]:
    """Return the models of the noise floor, and whether one must be made from the base."""
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
