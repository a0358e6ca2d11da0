"""Summary of a checkpoint from its headers, as text and as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypedDict

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.kv_cache import attention_of
from qwen35.codecs.registry import CODECS, codec_of
from qwen35.model.config_notes import config_notes

__all__ = ["CheckpointSummary", "summarize", "summary_text"]

_PREFIXES = ("model.language_model", "model.visual", "model", "lm_head", "mtp")


class CheckpointSummary(TypedDict):
    """A checkpoint summary in plain values; `prefixes` are sorted by size, largest first."""

    model: str
    repo: str | None
    revision: str | None
    architecture: str
    format: str
    shards: int
    parameters: int
    bytes: int
    prefixes: dict[str, dict[str, int]]
    dtypes: dict[str, int]
    sidecars: list[str]
    notes: list[str]


def summarize(checkpoint: Checkpoint) -> CheckpointSummary:
    """Return the summary of a checkpoint."""
    prefixes: dict[str, dict[str, int]] = {}
    dtypes: Counter[str] = Counter()
    storages: Counter[str] = Counter()
    parameters = 0
    for weight in checkpoint.weights:
        row = prefixes.setdefault(_prefix(weight.name), {"tensors": 0, "bytes": 0})
        row["tensors"] += len(weight.parts)
        row["bytes"] += weight.nbytes
        storages[weight.storage] += 1
        parameters += codec_of(weight).numel(weight)
        for part in weight.parts:
            dtypes[part.spec.dtype] += part.spec.nbytes
    for scale in checkpoint.cache_scales:
        row = prefixes.setdefault(_prefix(scale.spec.name), {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += scale.spec.nbytes
        dtypes[scale.spec.dtype] += scale.spec.nbytes
    return {
        "model": checkpoint.name,
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        "architecture": checkpoint.config.architecture.class_name,
        "format": _format(checkpoint, storages),
        "shards": len(checkpoint.file_sizes),
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "prefixes": dict(sorted(prefixes.items(), key=lambda row: -row[1]["bytes"])),
        "dtypes": dict(dtypes.most_common()),
        "sidecars": list(checkpoint.sidecars),
        "notes": [
            *config_notes(checkpoint.config, head=checkpoint.layout.head),
            *_cache_notes(checkpoint),
        ],
    }


def _cache_notes(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.cache_scales:
        layers = {attention_of(scale.spec.name)[0] for scale in checkpoint.cache_scales}
        those = f"{len(layers)} layer{'s' * (len(layers) > 1)}"
        yield f"{len(checkpoint.cache_scales)} scales of the KV cache, for {those}"


def _prefix(name: str) -> str:
    return next(p for p in (*_PREFIXES, name) if name == p or name.startswith(f"{p}."))


def _format(checkpoint: Checkpoint, storages: Counter[str]) -> str:
    if checkpoint.foreign is not None:
        return f"{checkpoint.foreign.label}, which cannot be read here"
    packed: Counter[str] = Counter()
    for storage, count in storages.items():
        codec = CODECS[storage]
        if codec.packed:
            packed[codec.title or codec.label] += count
    if not packed:
        return checkpoint.config.dtype
    share = f"({packed.total()} of {storages.total()} weights packed)"
    if len(packed) == 1:
        return f"{next(iter(packed))} {share}"
    mixture = ", ".join(f"{count} {title}" for title, count in packed.most_common())
    return f"mixed precision: {mixture} {share}"


def summary_text(summary: CheckpointSummary) -> str:
    """Render a summary as text."""
    lines = [f"{summary['shards']} shard(s)", ""]
    lines.append(f"{'prefix':<32} {'tensors':>8} {'GB':>10} {'cumulative':>12}")
    total = 0
    for prefix, row in summary["prefixes"].items():
        total += row["bytes"]
        lines.append(
            f"{prefix:<32} {row['tensors']:>8} {row['bytes'] / 1e9:>10.3f} {total / 1e9:>12.3f}"
        )
    lines += [f"{'total':<32} {'':>8} {total / 1e9:>10.3f}", ""]
    lines.append(f"model         {summary['model']}")
    if summary["revision"]:
        lines.append(f"revision      {summary['revision']}")
    dtypes = ", ".join(f"{d} {n / 1e9:.3f} GB" for d, n in summary["dtypes"].items())
    lines += [
        f"architecture  {summary['architecture']}",
        f"format        {summary['format']}",
        f"parameters    {summary['parameters']:,}",
        f"dtypes        {dtypes}",
        f"sidecars      {', '.join(summary['sidecars']) or 'none'}",
        *(f"note: {note}" for note in summary["notes"]),
    ]
    return "\n".join(lines)
