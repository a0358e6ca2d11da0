"""How a model is used: sampling, and what happens to pictures before the tower sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding
from qwen35.verification.config_meaning import token_ids, token_meaning
from qwen35.verification.settings_comparison import SettingsComparison, settings_of

__all__ = ["compare_generation", "compare_preprocessors", "generation_stops"]

_GENERATION = "generation_config.json"
_SAMPLING: dict[str, Any] = {
    "do_sample": False,
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""What an absent key means (transformers 5.23 ``generation/utils.py``)."""

_NO_SAMPLING = frozenset({"_from_model_config", "transformers_version", "use_cache"})

_IMAGES: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}
_PIXELS: dict[str, dict[str, Any]] = {
    "image": {
        **_IMAGES,
        "patch_size": 14,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    },
    "video": {
        **_IMAGES,
        "do_sample_frames": True,
        "fps": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_frames": 768,
        "max_video_tokens": 768,
        "min_frames": 4,
        "patch_size": 16,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    },
}
"""What an absent key means.

Sources: transformers 5.23 ``Qwen2VLImageProcessor``, ``Qwen3VLVideoProcessor``.
"""

_NO_PIXELS = frozenset(
    {
        "_valid_processor_keys",
        "auto_map",
        "data_format",
        "default_to_square",
        "device",
        "disable_grouping",
        "do_center_crop",
        "do_pad",
        "image_processor",
        "image_processor_type",
        "image_seq_length",
        "input_data_format",
        "processor_class",
        "return_metadata",
        "return_tensors",
        "video_metadata",
        "video_processor",
        "video_processor_type",
    }
)
"""Keys that change no pixel; a processor's class does if it is of another family."""

_FAMILY = "Qwen"

_FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
_JOINT = "processor_config.json"


def compare_generation(
    artifact: Checkpoint, source: Checkpoint, result: SettingsComparison
) -> None:
    """Compare how tokens are chosen and what ends a text."""
    result.differ("generation", _GENERATION, _generation(artifact), _generation(source))


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sampling defaults; without a file, transformers takes tokens from the config."""
    assert checkpoint.place is not None  # it was opened from files
    found = settings_of(checkpoint.place, _GENERATION)
    if found is None:
        found = token_meaning(checkpoint.config, whole=False)
    meaning = _SAMPLING | {
        key: value for key, value in found.items() if value is not None and key not in _NO_SAMPLING
    }
    if "eos_token_id" in meaning:
        meaning["eos_token_id"] = token_ids(meaning["eos_token_id"])
    return meaning


def generation_stops(checkpoint: Checkpoint) -> Any:
    """Return the tokens that end a text by generation_config.json; None if it names none.

    Raises:
        InputError: it cannot be read.
    """
    assert checkpoint.place is not None  # it was opened from files
    return token_ids((settings_of(checkpoint.place, _GENERATION) or {}).get("eos_token_id"))


def compare_preprocessors(
    artifact: Checkpoint, source: Checkpoint, result: SettingsComparison
) -> None:
    """Compare how pictures and videos become the tower's input."""
    for kind, name in _FILES.items():
        here, there = _pixels(artifact, kind, name), _pixels(source, kind, name)
        if there is None:
            result.skipped.append(f"{name}: the source has none")
        elif here is None:
            result.findings.append(Finding("preprocessor", name, "missing, the source has it"))
        else:
            result.differ("preprocessor", name, here, there)


def _pixels(checkpoint: Checkpoint, kind: str, name: str) -> Mapping[str, Any] | None:
    """Return what is done to pixels; None if no file says it."""
    assert checkpoint.place is not None  # it was opened from files
    own, joint = settings_of(checkpoint.place, name), settings_of(checkpoint.place, _JOINT)
    nested = (joint or {}).get(f"{kind}_processor")
    if own is None and not isinstance(nested, Mapping):
        return None
    found = {**(own or {}), **(nested if isinstance(nested, Mapping) else {})}
    meaning = _PIXELS[kind] | {
        key: value for key, value in found.items() if value is not None and key not in _NO_PIXELS
    }
    named = found.get(f"{kind}_processor_type")
    if isinstance(named, str) and not named.startswith(_FAMILY):
        meaning[f"{kind}_processor_type"] = named
    # Older files store the size limits as separate keys.
    size = dict(meaning["size"]) if isinstance(meaning["size"], Mapping) else {}
    for old, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        bound = meaning.pop(old, None)
        if bound is not None:
            size[edge] = bound
    return meaning | {"size": size or meaning["size"]}
