"""Merge LoRA adapters into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.convert_api import convert
from qwen35.api.given_values import listed
from qwen35.api.write_result import WriteResult
from qwen35.progress import Progress

__all__ = ["merge"]


@plain_arguments
def merge(
    model: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    onto: str | None = None,
    mtp_from: str | Path | None = None,
    keep_shards: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> WriteResult:
    """Write an unquantized checkpoint with adapters merged; the same as `convert` to ``bf16``.

    All weights that the adapters do not change, and their dtypes, stay as they are, byte for byte;
    packed ones are decoded.

    Args:
        model: the base: folder or Hub id (``owner/name[@revision]``).
        adapter: adapters of peft: folders, as ``DIR`` or ``DIR=WEIGHT``.
        out: folder to write.
        onto: merge into the weights as this format holds them, such as ``nf4``: those that an
            adapter learned on which was trained on the base in that format.
        mtp_from: take the MTP layer of this checkpoint, the original of a model saved without it.
        keep_shards: write the base's files, by name, instead of files of 5 GB.
        threads: number of threads; all processors if None.
        memory: use fewer threads to stay below this many bytes, or ``4GB``.
        overwrite: replace an output of qwen35.
        dry_run: write nothing; the result holds the plan.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes read.

    Raises:
        InputError: base or adapter cannot be read, or they do not fit together.
        UsageError: adapters do not fit together.
        OutputError: the output exists or overlaps the source, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
    """
    return convert(
        model,
        out,
        recipe="bf16",
        adapter=listed(adapter),
        onto=onto,
        mtp_from=mtp_from,
        keep_shards=keep_shards,
        threads=threads,
        memory=memory,
        overwrite=overwrite,
        dry_run=dry_run,
        hf_token=hf_token,
        progress=progress,
    )
