"""What an evaluation will do, known before anything runs: models, tokens, noise floor, memory."""

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
    """What the user asks for.

    Args:
        base: folder, Hub id or GGUF file of the unquantized model.
        candidates: folders, Hub ids, GGUF files, folders of them, ``hf:owner/name/path`` of one.
        text: what to measure on; may be left out where `kld_file` is read.
        context: tokens a chunk; that of `kld_file` where it is read.
        chunks: at most so many; 0 for the whole text.
        threads: of engines and statistics; 0 for all processors.
        device: for transformers: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        unquantized: the base in the other engine's format, for the noise floor; made from the
            base where that is possible.
        kld_file: a file of llama-perplexity's, read in place of the base if it exists, or else
            written.
        cache: the same in compact form.
        memory: refuse to take more bytes; 0 for no limit.
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
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EvaluationJob:
    """A prepared evaluation.

    Args:
        asked: what was asked for.
        base: the unquantized model.
        candidates: what is compared with it.
        floors: the unquantized model in engines that the base does not run in.
        floor_to_make: whether a GGUF file of the base must be written for the noise floor.
        text: what is measured on, where it was given.
        chunks: its tokens.
        decode: the base's tokenizer, backwards.
        threads: of engines and statistics.
        reads_base: the file that is read in place of running the base, if it was there.
    """

    asked: EvaluationRequest
    base: EvaluatedModel
    candidates: tuple[EvaluatedModel, ...]
    floors: tuple[EvaluatedModel, ...]
    floor_to_make: bool
    text: EvaluationText | None
    chunks: TokenChunks
    decode: Decode
    threads: int
    reads_base: Path | None

    @property
    def memory(self) -> int:
        """Upper estimate of peak memory in bytes."""
        running = [*self.candidates, *self.floors]
        if self.reads_base is None:
            running.append(self.base)
        if self.floor_to_make:
            running.append(replace(self.base, engine="llama.cpp", loaded=self.base.nbytes))
        return _INTERPRETER + running_memory(running, self.chunks.scored) + self.results

    @property
    def temporary(self) -> int:
        """About how many bytes the GGUF file takes that is made for the noise floor."""
        return self.base.nbytes if self.floor_to_make else 0

    @property
    def writes(self) -> dict[Path, int]:
        """Files that are written of the base's log probabilities, and how large at most."""
        if self.reads_base is not None:
            return {}
        sizes = {}
        if self.asked.kld_file is not None:
            sizes[self.asked.kld_file] = kld_file_size(self.chunks, self.base.width)
        if self.asked.cache is not None:
            sizes[self.asked.cache] = cache_size(self.chunks, self.base.width)
        return sizes

    @property
    def results(self) -> int:
        """Bytes of what is kept of every scored token."""
        rows = 2 + 4 * (len(self.candidates) + len(self.floors) + self.floor_to_make)
        return self.chunks.count * self.chunks.scored * rows * 8


_INTERPRETER = 300_000_000
"""The interpreter with NumPy, Numba and its compiler, and the tokenizer."""


def prepare(asked: EvaluationRequest) -> EvaluationJob:
    """Open everything by its headers, check that it fits together, make the tokens.

    Raises:
        InputError: something is not a model, is quantized but given as BASE, or has other tokens.
        UsageError: something is missing or contradicts.
    """
    if asked.kld_file is not None and asked.cache is not None:
        raise UsageError("--cache", "given with --kl-divergence-base", hint="one of them is enough")
    base = open_base(asked.base, token=asked.token)
    candidates = open_candidates(asked.candidates, token=asked.token)
    floors, to_make = _floors(asked, base, candidates)
    for model in (*candidates, *floors):
        check_same_tokens(model, base)
    text = None if asked.text is None else read_text(asked.text)
    encode, decode = tokenizer_of(base)
    reads = next((p for p in (asked.kld_file, asked.cache) if p is not None and p.exists()), None)
    if reads is not None and reads == asked.kld_file:
        chunks = _kept_chunks(reads, asked, base)
        if text is not None:
            _check_same_text(reads, chunks, tokenize(encode, text, chunks.context))
    elif text is None:
        raise UsageError("--text", "missing", hint="give the text to measure on")
    else:
        chunks = tokenize(encode, text, asked.context or CONTEXT)
    if asked.chunks:
        chunks = TokenChunks(chunks.ids[: asked.chunks])
    threads = asked.threads or default_threads()
    job = EvaluationJob(
        asked, base, tuple(candidates), floors, to_make, text, chunks, decode, threads, reads
    )
    if reads is not None and reads == asked.cache:
        CacheFile(reads, chunks, base.width).close()
    if asked.memory and job.memory > asked.memory:
        raise UsageError(
            "--memory",
            f"{asked.memory / 1e9:.2f} GB",
            expected=f"{job.memory / 1e9:.2f} GB",
            hint="give fewer candidates at a time, with --cache",
        )
    return job


def _floors(
    asked: EvaluationRequest, base: EvaluatedModel, candidates: Sequence[EvaluatedModel]
) -> tuple[tuple[EvaluatedModel, ...], bool]:
    """Return the models of the noise floor, and whether one must be made from the base."""
    others: set[Engine] = {c.engine for c in candidates} - {base.engine}
    if asked.unquantized is not None:
        model = open_base(asked.unquantized, token=asked.token)
        if model.engine not in others:
            found = f"{model.name} runs in {model.engine}, as the base or no candidate does"
            raise UsageError("--unquantized", found, hint="leave it out")
        return (model,), False
    if not others:
        return (), False
    if base.engine == "llama.cpp":
        raise UsageError(
            base.name,
            "is a GGUF file and a candidate runs in transformers",
            hint="give --unquantized CHECKPOINT, so that the engines' own disagreement is measured",
        )
    return (), True


def _kept_chunks(path: Path, asked: EvaluationRequest, base: EvaluatedModel) -> TokenChunks:
    file = KldFile(path)
    file.close()
    if file.vocabulary != base.width:
        found = f"a vocabulary of {file.vocabulary}"
        raise InputError(path.name, found, expected=f"{base.width} as in {base.name}")
    if asked.context and asked.context != file.chunks.context:
        found = f"a context of {file.chunks.context}"
        raise InputError(path.name, found, expected=f"{asked.context} (--context)")
    return file.chunks


def _check_same_text(path: Path, kept: TokenChunks, made: TokenChunks) -> None:
    if made.count < kept.count or (made.ids[: kept.count] != kept.ids).any():
        raise InputError(
            path.name,
            "its tokens are not those of the text",
            expected="a file made over the same text, or none yet",
        )
