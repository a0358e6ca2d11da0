"""Summary of a GGUF model from its head, as plain values and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from qwen35.checkpoint.gguf_header import LORA_ALPHA, LORA_B, GgufHeader, weights_of
from qwen35.codecs.registry import codec_of
from qwen35.planning.gguf_files.gguf_identity import maker_of, mix_of, release_of
from qwen35.planning.gguf_files.mixes import FILE_TYPES

__all__ = ["GgufSummary", "summarize_gguf", "summary_text"]

_LONG = 100


class GgufSummary(TypedDict):
    """A summary in plain values."""

    file: str
    files: int
    bytes: int
    architecture: str
    type: str
    mtp_alone: bool
    adapter: dict[str, Any] | None
    release: str
    made: str
    file_type: str | int | None
    mix: str
    mtp: int
    vision: list[str]
    tensors: int
    parameters: int
    bits_per_weight: float
    types: dict[str, dict[str, int]]
    keys: dict[str, Any]


def summarize_gguf(container: GgufHeader, beside: Sequence[str] = ()) -> GgufSummary:
    """Summarize a GGUF file, or all files of a split model.

    Args:
        container: its header.
        beside: the names of files with vision towers in the same place.
    """
    kinds: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for entry in container.tensors.values():
        kinds[entry.kind.name] += 1
        nbytes[entry.kind.name] += entry.nbytes
    parameters = sum(codec_of(weight).numel(weight) for weight in weights_of(container))
    code = container.keys.get("general.file_type")
    names = {row.code: row.name for row in FILE_TYPES.values()}
    return {
        "file": container.path.name,
        "files": len(container.files),
        "bytes": container.nbytes,
        "architecture": container.architecture,
        "type": container.keys.get("general.type", ""),
        "mtp_alone": container.mtp_alone,
        "adapter": _adapter(container) if container.is_adapter else None,
        "release": release_of(container),
        "made": maker_of(container),
        "file_type": names.get(code, code) if isinstance(code, int) else None,
        "mix": mix_of(container),
        "mtp": _mtp(container),
        "vision": [name for name in beside if name != container.path.name],
        "tensors": len(container.tensors),
        "parameters": parameters,
        "bits_per_weight": round(8 * sum(nbytes.values()) / max(1, parameters), 3),
        "types": {
            kind: {"tensors": kinds[kind], "bytes": size} for kind, size in nbytes.most_common()
        },
        "keys": {key: _shown(value) for key, value in container.keys.items()},
    }


def _adapter(container: GgufHeader) -> dict[str, Any]:
    """Return an adapter's kind, alpha and ranks, and how many weights it changes."""
    left = [t for name, t in container.tensors.items() if name.endswith(LORA_B)]
    return {
        "type": _shown(container.keys.get("adapter.type")),
        "alpha": _shown(container.keys.get(LORA_ALPHA)),
        "ranks": sorted({tensor.shape[-1] for tensor in left}),
        "weights": len(left),
    }


def _mtp(container: GgufHeader) -> int:
    """Return the number of MTP layers that it holds."""
    joined = ".nextn.eh_proj.weight"
    return sum(name.endswith(joined) for name in container.tensors)


def _shown(value: Any) -> Any:
    """Return a key's value, or its length if it is long."""
    if isinstance(value, str) and len(value) > _LONG:
        return f"{len(value)} characters"
    if isinstance(value, list) and len(value) > 64:
        return f"{len(value)} items"
    return value


def _adapter_line(row: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, row["ranks"]))
    return f"changes       {row['weights']} weights by rank {ranks}, alpha {row['alpha']}"


def _identity_lines(summary: GgufSummary) -> Iterator[str]:
    yield f"release       {summary['release'] or 'none of this size'}"
    yield f"made          {summary['made'] or 'no key says by whom'}"
    mix = f", {summary['mix']}" if summary["mix"] else ""
    yield f"file type     {summary['file_type']}{mix}"
    beside = ", ".join(summary["vision"]) or "none beside it"
    if summary["architecture"] != "clip":
        mtp = f"{summary['mtp']} layer(s)" if summary["mtp"] else "none"
        yield f"MTP           {mtp}"
        yield f"vision tower  {beside}"


def summary_text(summary: GgufSummary) -> str:
    """Render a summary as text."""
    files = f"{summary['files']} files, " * (summary["files"] > 1)
    lines = [
        f"{summary['file']}: {files}{summary['bytes']:,} bytes",
        f"architecture  {summary['architecture']} {summary['type']}"
        + ", the multi-token-prediction layer alone" * summary["mtp_alone"],
        *([_adapter_line(summary["adapter"])] if summary["adapter"] else _identity_lines(summary)),
        f"parameters    {summary['parameters']:,} in {summary['tensors']} tensors, "
        f"{summary['bits_per_weight']} bits each",
        "",
        f"{'type':<10} {'tensors':>8} {'bytes':>16}",
    ]
    lines += [
        f"{kind:<10} {row['tensors']:>8} {row['bytes']:>16,}"
        for kind, row in summary["types"].items()
    ]
    lines += ["", *(f"{key:<44} {value}" for key, value in summary["keys"].items())]
    return "\n".join(lines)
