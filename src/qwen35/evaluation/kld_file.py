"""Reader and writer of ``llama-perplexity --kl-divergence-base`` files.

Layout: ``_logits_``, context (uint32), vocabulary and chunks (int32), the tokens of all chunks
(int32), then a row per scored token: scale and smallest log probability (float32), one uint16 per
token of the vocabulary, padded to an even number. A log probability is ``scale * word + smallest``;
values more than 16 nats below the largest are clamped, so the step is at most 2.4e-4 nats.
Source: ``tools/perplexity/perplexity.cpp`` of ggml-org/llama.cpp at 0c1e570.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qwen35.array_types import F32, U16
from qwen35.checkpoint.locations import open_file
from qwen35.errors import InputError
from qwen35.evaluation.records import check_kind
from qwen35.evaluation.reference import ExactReference, Reference, SixteenBitReference
from qwen35.evaluation.text_chunks import TokenChunks
from qwen35.sinks.work_folder import open_ours

__all__ = ["KldFile", "KldWriter", "encode", "kld_file_size"]


_MAGIC = b"_logits_"
_HEAD = struct.Struct("<8sIii")
_RANGE = np.float32(16)
_STEPS = np.float32(65535)
_ROWS = 16
"""Rows encoded at a time, to bound temporary arrays."""


def _row_words(vocabulary: int) -> int:
    """Return the uint16 words of a row: an even vocabulary, and two float32."""
    return 2 * ((vocabulary + 1) // 2) + 4


def kld_file_size(chunks: TokenChunks, vocabulary: int) -> int:
    """Return the size in bytes of a file over all of `chunks`."""
    head = _HEAD.size + chunks.ids.size * 4
    return head + chunks.count * chunks.scored * _row_words(vocabulary) * 2


class KldFile:
    """A file read chunk by chunk.

    Raises:
        InputError: the file has another format, or is incomplete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = os.fdopen(open_file(path), "rb")
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            self.close()
            raise InputError(path.name, "not a file of llama-perplexity --kl-divergence-base")
        _, context, self.vocabulary, count = _HEAD.unpack(head)
        # Bounds before anything is read by them: the header may be damaged or hostile.
        if not 4 <= context <= 2**20 or self.vocabulary < 1 or count < 1:
            self.close()
            found = f"context {context}, vocabulary {self.vocabulary}, {count} chunks"
            raise InputError(path.name, found, hint="the file is damaged")
        words = _row_words(self.vocabulary)
        expected = _HEAD.size + 4 * context * count
        expected += (context - 1 - context // 2) * words * 2 * count
        if size != expected:
            self.close()
            raise InputError(
                path.name, f"{size} bytes", expected=str(expected), hint="the file is incomplete"
            )
        ids = np.frombuffer(self._file.read(4 * context * count), "<i4")
        self.chunks = TokenChunks(ids.reshape(count, context))
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            self.close()
            raise InputError(path.name, "token ids beyond its vocabulary")

    def chunk(self, index: int) -> Reference:
        """Read a chunk's log probabilities."""
        words, rows = _row_words(self.vocabulary), self.chunks.scored
        begin = _HEAD.size + 4 * self.chunks.ids.size + index * rows * words * 2
        self._file.seek(begin)
        data = self._file.read(rows * words * 2)
        if len(data) != rows * words * 2:
            raise InputError(self._path.name, "changed while it was read")
        table = np.frombuffer(data, "<u2").reshape(rows, words)
        parts = np.ascontiguousarray(table[:, :4]).view("<f4")
        if not np.isfinite(parts).all():
            raise InputError(self._path.name, f"values that are not finite in chunk {index + 1}")
        scale, least = (np.ascontiguousarray(parts[:, i]) for i in (0, 1))
        log_p = table[:, 4 : 4 + self.vocabulary]
        return SixteenBitReference(log_p, scale, least, self.chunks.targets(index))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class KldWriter:
    """Writes a file chunk by chunk, under a temporary name until it is complete.

    Args:
        path: the finished file.
        chunks: the evaluation tokens.
        vocabulary: values in a row.

    Raises:
        InputError: what lies under the temporary name is of another kind.
        OutputError: it is a link, a pipe or a folder.
    """

    def __init__(self, path: Path, chunks: TokenChunks, vocabulary: int) -> None:
        self._path, self._words = path, _row_words(vocabulary)
        self._partial = path.with_name(f".{path.name}.partial")
        head = _HEAD.pack(_MAGIC, chunks.context, vocabulary, chunks.count)
        self._head = head + np.ascontiguousarray(chunks.ids, "<i4").tobytes()
        self._chunk_bytes = chunks.scored * self._words * 2
        descriptor = open_ours(self._partial, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        self._file: BinaryIO = os.fdopen(descriptor, "ab+")
        check_kind(self._file, self._partial, _MAGIC)

    def resume(self, done: int) -> int:
        """Resume after at most `done` chunks; return the number of chunks kept."""
        self._file.seek(0)
        same_head = self._file.read(len(self._head)) == self._head
        size = os.fstat(self._file.fileno()).st_size - len(self._head)
        done = min(done, size // self._chunk_bytes) if same_head else 0
        self._file.truncate(len(self._head) + done * self._chunk_bytes if same_head else 0)
        if not same_head:
            self._file.write(self._head)
        return done

    def add(self, reference: ExactReference) -> None:
        """Append a chunk and flush it."""
        for start in range(0, len(reference.logits), _ROWS):
            self._file.write(encode(reference.logits[start : start + _ROWS]).tobytes())
        self._file.flush()

    def finish(self) -> None:
        """Sync the file and rename it to its final name."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self._path)

    def close(self) -> None:
        """Close the file; an unfinished one stays for a later run."""
        self._file.close()


def encode(logits: F32) -> U16:
    """Encode rows in llama-perplexity's float32 arithmetic, operation by operation.

    logits: [n, v] float32 -> [n, v + 4 or 5] uint16.
    """
    largest = logits.max(axis=1, keepdims=True)
    smallest = np.maximum(logits.min(axis=1, keepdims=True), largest - _RANGE)
    total = np.exp(logits - largest).sum(axis=1, keepdims=True, dtype=np.float64)
    log_total = np.log(total).astype(np.float32)
    scale = (largest - smallest) / _STEPS
    # llama-perplexity multiplies by the reciprocal, which rounds differently from a division.
    inverse = np.divide(np.float32(1), scale, where=scale > 0, out=np.zeros_like(scale))
    rows = np.zeros((len(logits), _row_words(logits.shape[1])), "<u2")
    rows[:, :4] = np.hstack([scale, smallest - largest - log_total]).astype("<f4").view("<u2")
    steps = np.rint(inverse * (np.maximum(logits, smallest) - smallest))
    rows[:, 4 : 4 + logits.shape[1]] = steps.astype(np.uint16)
    return rows
