"""Compare everything except weights with the source: is it the source, and do settings agree?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding, InputError
from qwen35.verification.config_meaning import compare_configs
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.template_comparison import compare_templates
from qwen35.verification.tokenizer_comparison import compare_tokenizers
from qwen35.verification.usage_settings import compare_generation, compare_preprocessors

__all__ = ["attempt", "compare_checkpoints", "stranger_findings"]


def stranger_findings(
    name: str, source: Checkpoint, here: Mapping[str, Any], there: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield a finding if the sizes differ from the source's.

    Args:
        name: the artifact, or its file.
        source: the source.
        here: sizes of the artifact.
        there: sizes of the source.
    """
    other = [key for key in here if key in there and here[key] != there[key]]
    if other:
        sizes = ", ".join(f"{key} {here[key]}, the source {there[key]}" for key in other[:4])
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        message = f"{sizes}{more}: is {source.name} its source?"
        yield Finding("source", name, message)


def compare_checkpoints(
    artifact: Checkpoint, source: Checkpoint, *, mtp: bool
) -> SettingsComparison:
    """Compare the settings of a checkpoint with those of its source.

    Args:
        artifact: the checkpoint.
        source: the checkpoint that it was made from.
        mtp: whether the artifact has the layer of multi-token prediction.
    """
    result = SettingsComparison()
    place, origin = artifact.place, source.place
    assert place is not None  # an artifact and a fetched source have files
    assert origin is not None
    vision = artifact.config.architecture.vision
    compare_configs(artifact.config, source.config, mtp=mtp, result=result)
    attempt(result, lambda: compare_generation(artifact, source, result))
    attempt(result, lambda: compare_tokenizers(place, origin, result))
    attempt(result, lambda: compare_templates(place, origin, vision=vision, result=result))
    if vision:
        attempt(result, lambda: compare_preprocessors(artifact, source, result))
    return result


def attempt(result: SettingsComparison, compare: Callable[[], None]) -> None:
    """Compare; if a file cannot be read, add a finding and list its content as not compared."""
    try:
        compare()
    except InputError as error:
        result.findings.append(Finding("files", error.subject, error.message))
        result.skipped.append(f"{error.subject}: its content, and whatever depends on it")
