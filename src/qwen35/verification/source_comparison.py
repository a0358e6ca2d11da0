"""Compare everything except weights with the source: is it the source, and do settings agree?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding, InputError
from qwen35.model.config_keys import ignored_values
from qwen35.verification.config_meaning import compare_configs, token_ids
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.template_comparison import compare_templates
from qwen35.verification.tokenizer_comparison import compare_tokenizers
from qwen35.verification.usage_settings import (
    compare_generation,
    compare_preprocessors,
    generation_stops,
)

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
    excused = dict(_excused(artifact, source))
    compare_configs(artifact.config, source.config, mtp=mtp, result=result, excused=excused)
    attempt(result, lambda: compare_generation(artifact, source, result))
    attempt(result, lambda: compare_tokenizers(place, origin, result))
    attempt(result, lambda: compare_templates(place, origin, vision=vision, result=result))
    if vision:
        attempt(result, lambda: compare_preprocessors(artifact, source, result))
    return result


def _excused(artifact: Checkpoint, source: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield keys of config.json that may differ, with what to note then."""
    if source.config.tied and artifact.layout.head and source.layout.head:
        unset = "tie_word_embeddings is false, as there is a head of its own: so MLX reads it"
        if not artifact.config.tied:
            yield "tie_word_embeddings", unset
    kept = {one.path.rpartition(".")[2] for one in ignored_values(artifact.config.raw)}
    for one in ignored_values(source.config.raw):
        key = one.path.rpartition(".")[2]
        if key not in kept:
            yield key, f"{key} is set to what transformers computes, whatever it is in the source"
    with suppress(InputError):  # found where the files are compared
        stops = generation_stops(source)
        if stops is not None and token_ids(artifact.config.raw.get("eos_token_id")) == stops:
            yield "eos_token_id", "eos_token_id of config.json is that of generation_config.json"


def attempt(result: SettingsComparison, compare: Callable[[], None]) -> None:
    """Compare; if a file cannot be read, add a finding and list its content as not compared."""
    try:
        compare()
    except InputError as error:
        result.findings.append(Finding("files", error.subject, error.message))
        result.skipped.append(f"{error.subject}: its content, and whatever depends on it")
