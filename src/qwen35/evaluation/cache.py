"""A base's log probabilities, kept small: the likely tokens exactly, all others as a sum.

For each scored token: the most likely tokens with their float32 log probabilities, most likely
first taken until less than `REST` is left or `most_kept` are taken; the probability of all others
together and its entropy. Divergences from it are too low by at most what `ChunkComparison.bound` says.

Size: a kept token takes at most 7 bytes, a row 24 more, so `most_kept` makes the file at least
`RATIO` times smaller than llama-perplexity's at vocabularies from 92,000 on, whatever the logits
are. Below, 512 tokens are kept all the same.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.errors import InputError
from qwen35.evaluation.records import RecordFile
from qwen35.evaluation.reference import CompactReference, ExactReference, Reference
from qwen35.evaluation.text_chunks import TokenChunks

__all__ = [
    "RATIO",
    "REST",
    "CacheFile",
    "CacheWriter",
    "cache_size",
    "compact",
    "most_kept",
    "pack",
    "unpack",
]


RATIO = 50
"""How many times smaller than llama-perplexity's file, at large vocabularies, at least."""

REST = 1e-6
"""Probability that may be left to the sum."""

_MAGIC = "qwen35 reference 1"
_LEAST_KEPT = 512
_ROW_BYTES, _TOKEN_BYTES = 24, 7
_PIECE = 16


def most_kept(vocabulary: int) -> int:
    """Return how many tokens of a row are kept at most.

    >>> most_kept(248_320), most_kept(4096)
    (1415, 512)
    """
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return min(vocabulary, max(_LEAST_KEPT, (row // RATIO - _ROW_BYTES) // _TOKEN_BYTES))


def cache_size(chunks: TokenChunks, vocabulary: int) -> int:
    """Return the bytes of a cache over all of `chunks` at most, but for a few of frames."""
    row = _ROW_BYTES + _TOKEN_BYTES * most_kept(vocabulary)
    return chunks.count * chunks.scored * row


def compact(exact: ExactReference) -> CompactReference:
    """Keep what the measures need of a chunk's logits."""
    limit = most_kept(exact.logits.shape[1])
    counts, ids, kept, rest, inner = [], [], [], [], []
    for row, total in zip(exact.logits, exact.total, strict=True):
        chosen, others = _split(row, total, limit)
        counts.append(len(chosen))
        ids.append(chosen.astype(np.uint32))
        kept.append((row[chosen] - total).astype(np.float32))
        p = np.exp(others)
        rest.append(float(p.sum()))
        inner.append(float((p * (others - np.log(rest[-1]))).sum()) if rest[-1] > 0 else 0.0)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return CompactReference(
        nll=exact.nll,
        top=exact.top,
        starts=starts,
        ids=np.concatenate(ids),
        kept=np.concatenate(kept),
        rest=np.array(rest),
        inner=np.minimum(0.0, inner),
    )


def _split(row: F32, total: float, limit: int) -> tuple[Any, Any]:
    """Return the ids to keep, ascending, and the log probabilities of all others, [v - kept]."""
    if limit >= len(row):
        return np.arange(len(row)), np.empty(0)
    parted = np.argpartition(row, len(row) - limit)
    likely = parted[len(row) - limit :]
    likely = likely[np.argsort(-row[likely], kind="stable")]
    log_p = row.astype(np.float64) - total
    unlikely = parted[: len(row) - limit]
    left = np.exp(log_p[unlikely]).sum() + np.exp(log_p[likely])[::-1].cumsum()[::-1]
    enough = int(np.searchsorted(-left, -REST)) or 1  # left[i] is what is missed by keeping i
    others = np.concatenate([log_p[unlikely], log_p[likely[enough:]]])
    return np.sort(likely[:enough]), others


def pack(part: CompactReference) -> bytes:
    """Return a chunk as bytes: numbers by their bytes' places, compressed."""
    gaps = np.diff(part.ids.astype(np.int64), prepend=0)
    gaps[part.starts[:-1]] = part.ids[part.starts[:-1]]
    rows = np.stack([part.nll, part.rest, part.inner]).astype("<f4")
    columns = [
        np.diff(part.starts).astype("<u4"),
        part.top.astype("<u4"),
        rows.reshape(-1),
        gaps.astype("<u4"),
        part.kept.astype("<f4"),
    ]
    planes = [c.view(np.uint8).reshape(-1, 4).T.tobytes() for c in columns]
    head = np.array([len(part.nll), len(part.ids)], "<u4").tobytes()
    return zlib.compress(head + b"".join(planes), 6)


def unpack(data: bytes) -> CompactReference:
    """Return what `pack` packed.

    Raises:
        ValueError: it is not that.
    """
    plain = zlib.decompress(data)
    n, m = (int(i) for i in np.frombuffer(plain[:8], "<u4"))
    if len(plain) != 8 + 4 * (5 * n + 2 * m):
        raise ValueError(f"{len(plain)} bytes for {n} rows of {m} tokens")
    sizes = (n, n, 3 * n, m, m)
    columns, position = [], 8
    for size in sizes:
        planes = np.frombuffer(plain, np.uint8, 4 * size, position).reshape(4, size)
        columns.append(np.ascontiguousarray(planes.T).reshape(-1))
        position += 4 * size
    counts, top, gaps = (columns[i].view("<u4").astype(np.int64) for i in (0, 1, 3))
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] != m:
        raise ValueError(f"{starts[-1]} tokens, not {m}")
    nll, rest, inner = columns[2].view("<f4").astype(np.float64).reshape(3, n)
    running = np.cumsum(gaps)
    before = np.concatenate([[0], running])[starts[:-1]]
    ids = (running - np.repeat(before, counts)).astype(np.uint32)
    return CompactReference(nll, top, starts, ids, columns[4].view("<f4"), rest, inner)


def _head(chunks: TokenChunks, vocabulary: int) -> dict[str, Any]:
    return {
        "vocabulary": vocabulary,
        "context": chunks.context,
        "chunks": chunks.count,
        "tokens": chunks.sha256,
    }


class CacheFile:
    """A cache to read.

    Raises:
        InputError: it is not whole, or over another text.
    """

    def __init__(self, path: Path, chunks: TokenChunks, vocabulary: int) -> None:
        self._path = path
        self._records = RecordFile(path, _MAGIC)
        self._vocabulary = vocabulary
        expected, found = _head(chunks, vocabulary), self._records.head
        for key, value in expected.items():
            has = found.get(key) if isinstance(found, dict) else None
            if has != value:
                self.close()
                raise InputError(
                    path.name,
                    f"{key} {has}",
                    expected=str(value),
                    hint="it was made over another text or with another model: name another file",
                )
        if self._records.count != chunks.count:
            self.close()
            raise InputError(path.name, f"{self._records.count} chunks", expected=str(chunks.count))

    def chunk(self, index: int) -> Reference:
        """Read a chunk."""
        try:
            part = unpack(self._records.read(index))
        except (ValueError, zlib.error) as error:
            raise InputError(self._path.name, f"chunk {index + 1} is damaged ({error})") from error
        if part.ids.max(initial=0) >= self._vocabulary:
            raise InputError(self._path.name, f"token ids beyond the vocabulary in chunk {index}")
        return part

    def close(self) -> None:
        """Close the file."""
        self._records.close()


class CacheWriter:
    """Writes a cache as chunks come; it has its name when it is whole.

    Args:
        path: where to.
        chunks: what is measured.
        vocabulary: values in a row.
    """

    def __init__(self, path: Path, chunks: TokenChunks, vocabulary: int) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._records = RecordFile(self._partial, _MAGIC, _head(chunks, vocabulary))

    def resume(self, done: int) -> int:
        """Go on after `done` chunks, or after as many of them as are there; return how many."""
        done = min(done, self._records.count)
        self._records.cut(done)
        return done

    def add(self, reference: ExactReference) -> None:
        """Append a chunk."""
        self._records.append(pack(compact(reference)))

    def finish(self) -> None:
        """Give the file its name."""
        self._records.close()
        self._partial.rename(self._path)

    def close(self) -> None:
        """Leave the unfinished file for a later run."""
        self._records.close()
