"""Text cut into chunks of token ids, as in llama-perplexity."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import I32, I64
from qwen35.checkpoint.locations import read_bounded
from qwen35.engines.llama import Llama
from qwen35.engines.torch_model import NO_CODE, torch_and_transformers
from qwen35.errors import InputError, UsageError
from qwen35.evaluation.models import EvaluatedModel
from qwen35.planning.bounded_tokenizer import TOKENIZER_NAME, check_tokenizer

__all__ = ["CONTEXT", "Decode", "TokenChunks", "cut", "read_text", "tokenize", "tokenizer_of"]

Decode = Callable[[Sequence[int]], str]

CONTEXT = 512
"""Tokens per chunk; llama-perplexity's default."""


@dataclass(frozen=True)
class EvaluationText:
    """The evaluation text.

    Args:
        name: of its file.
        content: without one trailing newline, which llama-perplexity drops too.
        nbytes: of the file.
        sha256: of the file.
    """

    name: str
    content: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class TokenChunks:
    """Token ids in chunks; a partial chunk at the end is dropped.

    Args:
        ids: [chunks, context] int32.
    """

    ids: I32

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.ids)

    @property
    def context(self) -> int:
        """Tokens per chunk."""
        return int(self.ids.shape[1])

    @property
    def first(self) -> int:
        """First position whose logits are scored: every prediction sees half a chunk."""
        return self.context // 2

    @property
    def scored(self) -> int:
        """Scored tokens per chunk: those after positions `first` to the last but one."""
        return self.context - 1 - self.first

    def inputs(self, chunk: int) -> list[int]:
        """Return a model's input: all but the last token, which is only a target."""
        return [int(i) for i in self.ids[chunk, :-1]]

    def targets(self, chunk: int) -> I64:
        """Return the scored tokens, [scored]."""
        return self.ids[chunk, self.first + 1 :].astype(np.int64)

    @property
    def sha256(self) -> str:
        """Hash of the ids as little-endian int32."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, "<i4").tobytes()).hexdigest()


def read_text(path: Path) -> EvaluationText:
    """Read a text file.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    data = read_bounded(path)
    try:
        content = data.decode()
    except UnicodeDecodeError as error:
        found = f"not UTF-8 text (byte {error.start})"
        raise InputError(path.name, found, expected="a plain text file") from error
    return EvaluationText(
        path.name, content.removesuffix("\n"), len(data), hashlib.sha256(data).hexdigest()
    )


def tokenizer_of(model: EvaluatedModel) -> tuple[Callable[[str], Sequence[int]], Decode]:
    """Return a model's encode and decode; special tokens spelled out in a text stay plain text.

    Raises:
        UsageError: the engine is not installed.
    """
    if model.engine != "llama.cpp":
        return _tokenizer_in(model.tokenizer_folder, model.name)
    if importlib.util.find_spec("llama_cpp") is None:
        return _own_tokenizer(model)
    llama = Llama(model.path, vocabulary_only=True)
    return (lambda text: llama.encode(text, special=False)), llama.decode


def _own_tokenizer(model: EvaluatedModel) -> tuple[Callable[[str], Sequence[int]], Decode]:
    """Return the tokenizer of a GGUF file, made of its keys; it gives the ids of llama.cpp."""
    checkpoint = model.checkpoint()
    assert checkpoint.place is not None
    changed = {
        TOKENIZER_NAME: {"normalizer": None},  # llama.cpp has none
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},  # as the file says
    }
    files = {
        name: json.loads(checkpoint.place.read(name, 0, checkpoint.sidecars[name])) | own
        for name, own in changed.items()
    }
    folder = Path(tempfile.mkdtemp(prefix="qwen35-"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    encode, decode = _tokenizer_in(folder, model.name)
    weakref.finalize(encode, shutil.rmtree, folder)  # each text is tried in a child process first
    return encode, decode


def _tokenizer_in(folder: Path, name: str) -> tuple[Callable[[str], Sequence[int]], Decode]:
    _, transformers = torch_and_transformers(f"the tokenizer of {name}")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)

    def encode(text: str) -> Sequence[int]:
        check_tokenizer(folder, [text])
        ids: list[int] = tokenizer(text, split_special_tokens=True, add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    return encode, lambda ids: str(tokenizer.decode(list(ids)))


def tokenize(
    encode: Callable[[str], Sequence[int]], text: EvaluationText, context: int
) -> TokenChunks:
    """Cut a text into chunks.

    Raises:
        InputError: the text is shorter than two chunks.
    """
    return cut(encode(text.content), context, text.name)


def cut(ids: Sequence[int], context: int, name: str) -> TokenChunks:
    """Cut token ids into chunks, at least two, as in llama-perplexity.

    Raises:
        InputError: there are too few tokens.
        UsageError: a chunk would have none to predict.
    """
    if context < 3:
        raise UsageError("--context", str(context), expected="3 tokens at least")
    count = len(ids) // context
    if count < 2:
        raise InputError(
            name,
            f"{len(ids)} tokens",
            expected=f"at least {2 * context}, two chunks",
            hint="give a longer text",
        )
    return TokenChunks(np.array(ids[: count * context], np.int32).reshape(count, context))
