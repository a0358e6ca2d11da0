"""A compact file of a base's log probabilities: likely tokens exactly, all others as a sum.

Per scored token: the most likely tokens with float32 log probabilities, until less than `REST`
remains or `most_kept` are taken; then the total probability of all others and its entropy.
Divergences from it are too low, by at most `ChunkComparison.bound`.

Size: a kept token takes at most 7 bytes and a row 24 more, so `most_kept` makes the file at least
`RATIO` times smaller than llama-perplexity's for vocabularies of 92,000 or more, whatever the
logits. For smaller vocabularies 512 tokens are still kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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
    "cache_head",
    "cache_size",
    "compact",
    "most_kept",
    "pack",
    "unpack",
]


RATIO = 50
"""Minimum size ratio of llama-perplexity's file to this one, for large vocabularies."""

REST = 1e-6
"""Tail probability that may be summed up."""

_MAGIC = "qwen35 reference 1"
_LEAST_KEPT = 512
_ROW_BYTES, _TOKEN_BYTES = 24, 7  # upper bounds after compression


def most_kept(vocabulary: int) -> int:
    """Return the maximum number of tokens kept per row.

    >>> most_kept(248_320), most_kept(4096)
    (1415, 512)
    """
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return min(vocabulary, max(_LEAST_KEPT, (row // RATIO - _ROW_BYTES) // _TOKEN_BYTES))


def cache_size(chunks: TokenChunks, vocabulary: int) -> int:
    """Return the maximum bytes of a cache over all of `chunks`, without record framing."""
    row = _ROW_BYTES + _TOKEN_BYTES * most_kept(vocabulary)
    return chunks.count * chunks.scored * row


def compact(exact: ExactReference) -> CompactReference:
    """Reduce a chunk's logits to the likely tokens and the sum of the rest."""
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
    # Partition first: sorting a whole vocabulary per row would dominate.
    parted = np.argpartition(row, len(row) - limit)
    likely = parted[len(row) - limit :]
    likely = likely[np.argsort(-row[likely], kind="stable")]
    log_p = row.astype(np.float64) - total
    unlikely = parted[: len(row) - limit]
    # remaining[i]: probability left out if only the i most likely are kept. Summed from the small
    # end, so that rounding does not hide a tail as small as REST.
    remaining = np.exp(log_p[unlikely]).sum() + np.exp(log_p[likely])[::-1].cumsum()[::-1]
    enough = int(np.searchsorted(-remaining, -REST)) or 1
    others = np.concatenate([log_p[unlikely], log_p[likely[enough:]]])
    return np.sort(likely[:enough]), others


def pack(part: CompactReference) -> bytes:
    """Return a chunk as bytes: byte planes, compressed.

    Ids are stored as gaps, and the bytes of each column are grouped by significance: both make
    zlib more effective.
    """
    gaps = np.diff(part.ids.astype(np.int64), prepend=0)
    # Each row starts anew with its first id, since ids ascend only within a row.
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


def unpack(data: bytes, rows: int, vocabulary: int) -> CompactReference:
    """Return the chunk from the bytes of `pack`.

    Args:
        data: the bytes, which may come from anybody: they are not decompressed beyond what a chunk
            can have.
        rows: scored tokens in a chunk.
        vocabulary: of the model.

    Raises:
        ValueError: the bytes are malformed.
        zlib.error: they are not compressed data.
    """
    plain = _decompressed(data, 8 + 4 * (5 * rows + 2 * rows * most_kept(vocabulary)))
    n, m = (int(i) for i in np.frombuffer(plain[:8], "<u4"))
    if n != rows or len(plain) != 8 + 4 * (5 * n + 2 * m):
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
    part = CompactReference(nll, top, starts, ids, columns[4].view("<f4"), rest, inner)
    if max(ids.max(initial=0), top.max(initial=0)) >= vocabulary:
        raise ValueError("token ids beyond the vocabulary")
    if not all(np.isfinite(values).all() for values in (nll, rest, inner, np.exp(part.kept))):
        raise ValueError("values that are not finite")
    return part


def _decompressed(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    plain = stream.decompress(data, limit + 1)
    if len(plain) > limit or not stream.eof:
        raise ValueError(f"incomplete, or more than {limit} bytes")
    return plain


def cache_head(
    chunks: TokenChunks, vocabulary: int, adapters: Sequence[object] = ()
) -> dict[str, Any]:
    """Return the head of a cache of a model's predictions: what they depend on."""
    merged = {"adapters": list(adapters)} if adapters else {}
    return merged | {
        "vocabulary": vocabulary,
        "context": chunks.context,
        "chunks": chunks.count,
        "tokens": chunks.sha256,
    }


class CacheFile:
    """A cache open for reading.

    Raises:
        InputError: the cache is incomplete, or of another text.
    """

    def __init__(
        self, path: Path, chunks: TokenChunks, vocabulary: int, adapters: Sequence[object] = ()
    ) -> None:
        self._path = path
        self._records = RecordFile(path, _MAGIC)
        self._scored, self._vocabulary = chunks.scored, vocabulary
        expected, head = cache_head(chunks, vocabulary, adapters), self._records.head
        for key, value in ({"adapters": None} | expected).items():
            stored = head.get(key) if isinstance(head, dict) else None
            if stored != value:
                self.close()
                raise InputError(
                    path.name,
                    f"{key} {str(stored)[:80]}",
                    expected=str(value),
                    hint="it was made from another text or model: give another file",
                )
        if self._records.count != chunks.count:
            self.close()
            raise InputError(path.name, f"{self._records.count} chunks", expected=str(chunks.count))

    def chunk(self, index: int) -> Reference:
        """Read a chunk."""
        try:
            return unpack(self._records.read(index), self._scored, self._vocabulary)
        except (ValueError, zlib.error) as error:
            raise InputError(self._path.name, f"chunk {index + 1} is damaged ({error})") from error

    def close(self) -> None:
        """Close the file."""
        self._records.close()


class CacheWriter:
    """Writes a cache chunk by chunk, under a temporary name until it is complete.

    Args:
        path: the finished file.
        chunks: the evaluation tokens.
        vocabulary: values in a row.
        adapters: what the model's adapters do.
    """

    def __init__(
        self, path: Path, chunks: TokenChunks, vocabulary: int, adapters: Sequence[object] = ()
    ) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._records = RecordFile(self._partial, _MAGIC, cache_head(chunks, vocabulary, adapters))

    def resume(self, done: int) -> int:
        """Resume after at most `done` chunks; return the number of chunks kept."""
        done = min(done, self._records.count)
        self._records.cut(done)
        return done

    def add(self, reference: ExactReference) -> None:
        """Append a chunk."""
        self._records.append(pack(compact(reference)))

    def finish(self) -> None:
        """Rename the file to its final name."""
        self._records.close()
        self._partial.rename(self._path)

    def close(self) -> None:
        """Close the file; an unfinished one stays for a later run."""
        self._records.close()
