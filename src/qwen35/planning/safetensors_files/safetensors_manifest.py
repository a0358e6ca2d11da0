"""A safetensors output in its manifest: the recipe and options, written and read back."""

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
from qwen35.planning.refinement import Refinement
from qwen35.planning.rules import Recipe
from qwen35.planning.safetensors_files import safetensors_options
from qwen35.planning.safetensors_files.safetensors_options import SafetensorsOptions

__all__ = [
    "kept_prefix",
    "request_from_manifest",
    "request_json",
    "scale_choice_json",
    "scale_choice_of",
]


def request_json(plan: Plan, *, whole: bool = False) -> dict[str, Any]:
    """Return the recipe, the scale choice and the other options.

    Args:
        plan: a plan of a safetensors output.
        whole: whether to include values that equal the defaults.
    """
    options = plan.options
    assert isinstance(options, SafetensorsOptions)
    entries: dict[str, Any] = {}
    if whole:  # from a manifest it follows from the tensor names (`kept_prefix`)
        entries["keep_prefix"] = options.keep_prefix
    if whole or options.shard_bytes != safetensors_options.MAX_SHARD_BYTES:
        entries["shard_bytes"] = options.shard_bytes
    if whole or options.keep_shards:
        entries["keep_shards"] = options.keep_shards
    entries |= options.refinement.to_json()
    if options.kv_cache is not None:
        entries["kv_cache"] = {"type": options.kv_cache, "activations": _activations_json(options)}
    return {
        "recipe": {**recipe_json(plan.recipe), **entries},
        "calibration": scale_choice_json(options),
    }


def scale_choice_json(options: SafetensorsOptions) -> dict[str, Any] | None:
    """Return the scale choice as plain values; None if no scales are chosen."""
    if options.scale_choice is None:
        return None
    return {**asdict(options.scale_choice), "activations": _activations_json(options)}


def _activations_json(options: SafetensorsOptions) -> dict[str, str] | None:
    statistics = options.activations
    return None if statistics is None else {"name": statistics.name, "sha256": statistics.sha256}


def request_from_manifest(
    container: Container, manifest: Mapping[str, Any], inputs: ContainerInputs
) -> tuple[Recipe, SafetensorsOptions]:
    """Return the recipe and options recorded in a manifest or work order.

    Raises:
        InputError: the record is malformed, or names other statistics.
        UsageError: statistics are missing, or were not used.
    """
    if inputs.imatrix is not None:
        raise UsageError("--imatrix", "is for GGUF files", hint="leave it out")
    recipe = recipe_of(manifest, container)
    row = manifest["recipe"]
    scale_choice, digest = scale_choice_of(manifest)
    shard_bytes = row.get("shard_bytes", 0)
    if type(shard_bytes) is not int or shard_bytes < 0:  # bool is an int
        raise InputError(MANIFEST_NAME, "malformed shard_bytes", expected="a size in bytes")
    kv_cache, also = _kv_cache_of(row)
    return recipe, SafetensorsOptions(
        keep_prefix=row["keep_prefix"] is True if "keep_prefix" in row else kept_prefix(manifest),
        scale_choice=scale_choice,
        activations=_activations(digest or also, inputs),
        shard_bytes=shard_bytes,
        keep_shards=row.get("keep_shards") is True,
        kv_cache=kv_cache,
        refinement=Refinement.from_json(row, inputs.hessians),
    )


def _kv_cache_of(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the format of the KV cache and the SHA-256 of its statistics, each None if unused."""
    entry = row.get("kv_cache")
    if entry is None:
        return None, None
    statistics = entry.get("activations") if isinstance(entry, dict) else None
    if not isinstance(statistics, dict) or entry.get("type") not in safetensors_options.KV_CACHES:
        expected = f"type ({' or '.join(safetensors_options.KV_CACHES)}) and activations"
        raise InputError(MANIFEST_NAME, "malformed kv_cache", expected=expected)
    return entry["type"], str(statistics.get("sha256"))


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
    """Return the scale choice and the SHA-256 of the statistics, each None if unused.

    Raises:
        InputError: the manifest is malformed.
    """
    entry = manifest.get("calibration")
    if entry is None:
        return None, None
    names = {field.name for field in fields(ScaleChoice)}
    if not isinstance(entry, dict) or not names <= entry.keys():
        raise InputError(MANIFEST_NAME, "a malformed calibration")
    statistics = entry.get("activations")
    if statistics is not None and not isinstance(statistics, dict):
        raise InputError(MANIFEST_NAME, "a malformed calibration", expected="activations: a table")
    try:
        scale_choice = ScaleChoice(**{name: entry[name] for name in names})
    except (TypeError, UsageError) as error:
        raise InputError(MANIFEST_NAME, "a malformed calibration") from error
    return scale_choice, str(statistics.get("sha256")) if statistics else None


def kept_prefix(manifest: Mapping[str, Any]) -> bool:
    """Return whether a text-only output kept the prefix ``model.language_model.``."""
    names = {name for tensors in manifest["tensors"].values() for name in tensors}
    long = any(name.startswith("model.language_model.") for name in names)
    return long and not any(name.startswith("model.visual.") for name in names)
