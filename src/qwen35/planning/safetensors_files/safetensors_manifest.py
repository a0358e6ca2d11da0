"""What a manifest says of a safetensors output: enough to plan it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError, UsageError
from qwen35.planning.activations import Activations, load_activations
from qwen35.planning.container import Container, ContainerInputs
from qwen35.planning.manifest import recipe_json, recipe_of
from qwen35.planning.output_plan import Plan
from qwen35.planning.rules import Recipe
from qwen35.planning.safetensors_files import safetensors_options as safetensors_options
from qwen35.planning.safetensors_files.safetensors_options import SafetensorsOptions

__all__ = ["asked_again", "asked_json", "kept_prefix", "scale_choice_json", "scale_choice_of"]


def asked_json(plan: Plan, *, whole: bool = False) -> dict[str, Any]:
    """Return the recipe, how scales are chosen, and what is asked beside them.

    Args:
        plan: of a safetensors output.
        whole: whether to say also what is as usual.
    """
    options = plan.options
    assert isinstance(options, SafetensorsOptions)
    beside: dict[str, Any] = {}
    if whole:  # a manifest's tensors tell it (`kept_prefix`)
        beside["keep_prefix"] = options.keep_prefix
    if whole or options.shard_bytes != safetensors_options.MAX_SHARD_BYTES:
        beside["shard_bytes"] = options.shard_bytes
    return {
        "recipe": {**recipe_json(plan.recipe), **beside},
        "calibration": scale_choice_json(options),
    }


def scale_choice_json(options: SafetensorsOptions) -> dict[str, Any] | None:
    """Return how scales are chosen, as plain values; None if none are."""
    if options.scale_choice is None:
        return None
    statistics = options.activations
    return {
        **asdict(options.scale_choice),
        "activations": statistics and {"name": statistics.name, "sha256": statistics.sha256},
    }


def asked_again(
    container: Container, manifest: Mapping[str, Any], inputs: ContainerInputs
) -> tuple[Recipe, SafetensorsOptions]:
    """Return the recipe and the options of a manifest or of a work order.

    Raises:
        InputError: it is malformed, or these are other statistics.
        UsageError: statistics are not given, or were not used.
    """
    if inputs.imatrix is not None:
        raise UsageError("--imatrix", "is for GGUF files", hint="leave it out")
    recipe = recipe_of(manifest, container)
    row = manifest["recipe"]
    scale_choice, digest = scale_choice_of(manifest)
    shard_bytes = row.get("shard_bytes", 0)
    if type(shard_bytes) is not int or shard_bytes < 0:
        raise InputError(MANIFEST_NAME, "malformed shard_bytes", expected="a size in bytes")
    return recipe, SafetensorsOptions(
        keep_prefix=row["keep_prefix"] is True if "keep_prefix" in row else kept_prefix(manifest),
        scale_choice=scale_choice,
        activations=_activations(digest, inputs),
        shard_bytes=shard_bytes,
    )


def _activations(digest: str | None, inputs: ContainerInputs) -> Activations | None:
    if inputs.activations is None:
        if digest is None:
            return None
        found, hint = "made with activation statistics", "give them: --activation-stats"
        raise UsageError(MANIFEST_NAME, found, hint=hint)
    activations = load_activations(inputs.activations)
    if activations.sha256 != digest:
        raise InputError(activations.name, "not the statistics that the manifest names")
    return activations


def scale_choice_of(manifest: Mapping[str, Any]) -> tuple[ScaleChoice | None, str | None]:
    """Return how scales were chosen, and the SHA-256 of the statistics; None where unused.

    Raises:
        InputError: the manifest is malformed.
    """
    found = manifest.get("calibration")
    if found is None:
        return None, None
    names = {field.name for field in fields(ScaleChoice)}
    if not isinstance(found, dict) or not names <= found.keys():
        raise InputError(MANIFEST_NAME, "a malformed calibration")
    statistics = found.get("activations")
    if statistics is not None and not isinstance(statistics, dict):
        raise InputError(MANIFEST_NAME, "a malformed calibration", expected="activations: a table")
    try:
        scale_choice = ScaleChoice(**{name: found[name] for name in names})
    except (TypeError, UsageError) as error:
        raise InputError(MANIFEST_NAME, "a malformed calibration") from error
    return scale_choice, str(statistics.get("sha256")) if statistics else None


def kept_prefix(manifest: Mapping[str, Any]) -> bool:
    """Whether a text-only output has its tensors under ``model.language_model.`` all the same."""
    names = {name for tensors in manifest["tensors"].values() for name in tensors}
    long = any(name.startswith("model.language_model.") for name in names)
    return long and not any(name.startswith("model.visual.") for name in names)
