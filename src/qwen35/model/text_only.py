"""The config.json of a text model alone, from that of a model with a vision tower."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from qwen35.model.model_config import ARCHITECTURES

__all__ = ["ROOT_KEYS", "TEXT_TYPES", "text_only_config"]

TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""``model_type`` with a tower to that without."""

ROOT_KEYS = (
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Keys that a text-only config takes from the root of the vision-language config, if set."""


def text_only_config(
    raw: Mapping[str, Any], text: Mapping[str, Any], model_type: str, *, tied: bool
) -> dict[str, Any]:
    """Return the config of the text model.

    Args:
        raw: config.json.
        text: its section about the text model.
        model_type: a key of `TEXT_TYPES`.
        tied: whether the head is the embedding matrix.
    """
    root = copy.deepcopy(dict(text))
    for key in ROOT_KEYS:
        if raw.get(key) is not None:
            root[key] = raw[key]
    if root.get("tie_word_embeddings", False) is not tied:  # the root's, by its absence
        root["tie_word_embeddings"] = tied
    root.pop("architectures", None)
    text_type = TEXT_TYPES[model_type]
    return {
        "architectures": [ARCHITECTURES[text_type].class_name],
        **root,
        "model_type": text_type,
    }
