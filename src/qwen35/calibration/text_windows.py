"""Calibration text: files cut into windows of tokens."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen35.array_types import I32
from qwen35.checkpoint.locations import read_bounded
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import ConfigError, InputError, UsageError, extra_hint
from qwen35.planning.bounded_tokenizer import TOKENIZER_NAME, encode_bounded

__all__ = ["TextWindows", "read_text"]


@dataclass(frozen=True)
class TextWindows:
    """Windows of one length over the concatenated files.

    Args:
        windows: [windows, context] token ids.
        files: name and SHA-256 of each file.
        left_over: unused tokens: a partial window, or beyond the requested number of windows.
    """

    windows: I32
    files: tuple[tuple[str, str], ...]
    left_over: int

    @property
    def context(self) -> int:
        """Tokens per window."""
        return int(self.windows.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return int(self.windows.size)


def read_text(
    checkpoint: Checkpoint, paths: Sequence[Path], *, context: int = 512, windows: int | None = None
) -> TextWindows:
    """Tokenize text files with a checkpoint's tokenizer and cut them into windows.

    Tokens after the last whole window are dropped, as in llama-imatrix. Special tokens spelled out
    in the text (``<|im_start|>``) are encoded as special tokens.

    Args:
        checkpoint: provides tokenizer.json.
        paths: UTF-8 text files.
        context: tokens per window.
        windows: most windows; None for all.

    Raises:
        InputError: a file cannot be read or is not UTF-8, or the tokenizer does not fit the model.
        UsageError: the text is shorter than one chunk.
    """
    if context < 2:
        raise UsageError("--context", str(context), expected="2 tokens at least")
    tokenizer = _tokenizer(checkpoint)
    texts, files = [], []
    for path in paths:
        data = read_bounded(path)
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise InputError(str(path), "not UTF-8 text", expected="plain text") from error
        texts.append(data)
        files.append((path.name, hashlib.sha256(data).hexdigest()))
    ids = encode_bounded(tokenizer, texts)
    flat = np.concatenate(ids) if ids else np.empty(0, np.int32)
    whole = len(flat) // context
    if whole == 0:
        raise UsageError(
            "--text",
            f"{len(flat)} tokens",
            expected=f"a chunk of {context}",
            hint="give more text",
        )
    # A tokenizer of another model would otherwise index past the embedding.
    vocabulary = checkpoint.config.dims["vocab"]
    if int(flat.max()) >= vocabulary:
        raise ConfigError(TOKENIZER_NAME, f"token {flat.max()}", expected=f"less than {vocabulary}")
    count = min(whole, windows) if windows else whole
    used = count * context
    return TextWindows(flat[:used].reshape(count, context), tuple(files), len(flat) - used)


def _tokenizer(checkpoint: Checkpoint) -> bytes:
    if importlib.util.find_spec("tokenizers") is None:
        raise UsageError("calibrate", "tokenizers is not installed", hint=extra_hint("nf4"))
    size = checkpoint.sidecars.get(TOKENIZER_NAME)
    if size is None or checkpoint.place is None:
        raise ConfigError(checkpoint.name, f"no {TOKENIZER_NAME} in it", hint="download it as well")
    return checkpoint.place.read(TOKENIZER_NAME, 0, size)
