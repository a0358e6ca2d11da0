"""What a checkpoint or a GGUF file is, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.checkpoint.checkpoint_summary import CheckpointSummary, summarize
from qwen35.checkpoint.open import describe, gguf_files

if TYPE_CHECKING:
    from qwen35.planning.gguf_files.gguf_summary import GgufSummary

__all__ = ["inspect"]


def inspect(
    model: str | Path, *, hf_token: str | None = None
) -> CheckpointSummary | list[GgufSummary]:
    """Tell what a checkpoint is, from its headers; of GGUF files, a row for each.

    Args:
        model: folder, GGUF file, Hub id, ``hf:owner/name/path`` or a published size.
        hf_token: for the Hub; by default HF_TOKEN.

    Raises:
        InputError: it is not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused, or was not reached.

    >>> summary = inspect("assets/qwen3.5-tiny")
    >>> summary["architecture"], summary["format"], summary["shards"]
    ('Qwen3_5ForConditionalGeneration', 'BF16', 1)
    """
    if files := gguf_files(str(model), token=hf_token):
        from qwen35.checkpoint.gguf_header import read_gguf
        from qwen35.planning.gguf_files.gguf_summary import summarize_gguf

        return [summarize_gguf(read_gguf(files, name)) for name in files.names]
    return summarize(describe(str(model), token=hf_token))
