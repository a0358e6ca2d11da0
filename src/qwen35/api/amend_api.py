"""Record edits of an artifact's small files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.publishing.amendment import Amendment

__all__ = ["amend"]


@plain_arguments
def amend(
    out: str | Path,
    *,
    chat_template: str | Path | None = None,
    why: str = "",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Amendment:
    """Check small files that were edited on purpose, and record them in the manifest.

    Findings stop it: then nothing is written. Weights must be as they were written.

    Args:
        out: the folder of the artifact.
        chat_template: put the template in this file into the artifact, GGUF files included.
        why: the reason, for manifest and model card.
        dry_run: only check, write nothing.
        progress: receives bytes hashed.

    Raises:
        InputError: there is no manifest, a file cannot be read, or the template is not valid.
        OutputError: the disk is full, or another run is writing the folder.
    """
    from qwen35.publishing.amendment import prepare_amendment
    from qwen35.publishing.hashes import FileHasher

    amendment = prepare_amendment(
        Path(out),
        template=Path(chat_template) if chat_template else None,
        why=why,
        hasher=FileHasher(progress=progress, remember=not dry_run),
    )
    if not dry_run and not amendment.findings:
        amendment.carry_out()
    return amendment
