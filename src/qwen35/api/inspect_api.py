"""Describe a checkpoint or GGUF files from their headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.checkpoint.checkpoint_summary import CheckpointSummary, summarize
from qwen35.checkpoint.open import describe, gguf_files
from qwen35.checkpoint.split_gguf import is_tower_name

if TYPE_CHECKING:
    from qwen35.planning.gguf_files.gguf_summary import GgufSummary

__all__ = ["inspect"]


@plain_arguments
def inspect(
    model: str | Path, *, hf_token: str | None = None
) -> CheckpointSummary | list[GgufSummary]:
    """Describe a checkpoint from its headers; GGUF models give one row each.

    Args:
        model: folder, GGUF file, Hub id, ``hf:owner/name/path`` or a published size.
        hf_token: for the Hub; by default HF_TOKEN.

    Raises:
        InputError: the model is not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused a request or could not be reached.

    >>> summary = inspect("assets/qwen3.5-tiny")
    >>> summary["architecture"], summary["format"], summary["shards"]
    ('Qwen3_5ForConditionalGeneration', 'BF16', 1)
    """
    if files := gguf_files(str(model), token=hf_token):
        from qwen35.checkpoint.gguf_parts import read_model
        from qwen35.planning.gguf_files.gguf_summary import summarize_gguf

        towers = sorted(name for name in files.place.sizes() if is_tower_name(name))
        return [summarize_gguf(read_model(files, names), towers) for names in files.models]
    checkpoint = describe(str(model), token=hf_token, lenient=True)
    if checkpoint.problems and checkpoint.foreign is None:  # what it is can be said, not read
        raise checkpoint.problems[0]
    return summarize(checkpoint)
