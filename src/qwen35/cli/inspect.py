"""Tell what a checkpoint is, from its headers: prefixes, sizes, dtypes, format, parameters."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from qwen35.checkpoint.open import describe, gguf_files
from qwen35.checkpoint.source import Checkpoint
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model

PREFIXES = ("model.language_model", "model.visual", "model", "lm_head", "mtp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    if files := gguf_files(args.model, token=args.hf_token):
        from qwen35.gguf.container import read_gguf
        from qwen35.gguf.inspect import summarize_gguf, summary_text

        summaries = [summarize_gguf(read_gguf(files, name)) for name in files.names]
        output.data("\n\n".join(map(summary_text, summaries)), summaries)
        return 0
    summary = summarize(describe(args.model, token=args.hf_token))
    output.data(_text(summary), summary)
    return 0


def _prefix(name: str) -> str:
    return next(p for p in (*PREFIXES, name) if name == p or name.startswith(f"{p}."))


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `qwen35 inspect` prints, as plain values."""
    prefixes: dict[str, dict[str, int]] = {}
    dtypes: Counter[str] = Counter()
    storages: Counter[str] = Counter()
    parameters = 0
    for weight in checkpoint.weights:
        row = prefixes.setdefault(_prefix(weight.name), {"tensors": 0, "bytes": 0})
        row["tensors"] += len(weight.parts)
        row["bytes"] += weight.nbytes
        storages[weight.storage] += 1
        numel = weight.main.spec.numel
        parameters += 2 * numel if weight.storage == "nf4" else numel
        for part in weight.parts:
            dtypes[part.spec.dtype] += part.spec.nbytes
    return {
        "model": checkpoint.name,
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        "architecture": checkpoint.config.architecture.class_name,
        "format": _format(storages, checkpoint.config.dtype),
        "shards": len(checkpoint.file_sizes),
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "prefixes": dict(sorted(prefixes.items(), key=lambda row: -row[1]["bytes"])),
        "dtypes": dict(dtypes.most_common()),
        "sidecars": list(checkpoint.sidecars),
    }


def _format(storages: Counter[str], dtype: str) -> str:
    for storage, name in (("nf4", "bitsandbytes NF4"), ("fp8", "block FP8")):
        if storages[storage]:
            return f"{name} ({storages[storage]} of {storages.total()} weights packed)"
    return dtype


def _text(summary: dict[str, Any]) -> str:
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
        f"side-cars     {', '.join(summary['sidecars']) or 'none'}",
    ]
    return "\n".join(lines)
