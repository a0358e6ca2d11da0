"""The config.json that the keys of a GGUF file imply: the inverse of `metadata`.

What no key says is as the family's releases have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.errors import ConfigError
from qwen35.model.model_config import ARCHITECTURES
from qwen35.model.sizes import published_config

__all__ = [
    "joint_config",
    "layer_types",
    "sensible",
    "short_number",
    "text_config",
    "token_id",
    "vision_config",
]

_TEXT_TYPES = {"qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text"}
_RELEASES = {"qwen35": "Qwen3.5-0.8B", "qwen35moe": "Qwen3.5-35B-A3B"}
"""A release of each kind, whose other settings all of its kind have."""

_END = "<|endoftext|>"
_VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_start_token_id": "<|vision_start|>",
}
_YARN = {
    "original_max_position_embeddings": "original_context_length",
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Parameters of YaRN by the last part of their keys."""


_SENSELESS = (ArithmeticError, AttributeError, IndexError, TypeError, ValueError)


@contextmanager
def sensible(container: GgufHeader) -> Iterator[None]:
    """Turn what keys of other types or values raise into a `ConfigError`."""
    try:
        yield
    except KeyError as error:
        found = f"no key for {str(error.args[0])[:80]}"
        hint = "is it a model of this family?"
        raise ConfigError(container.path.name, found, hint=hint) from error
    except _SENSELESS as error:
        found = f"keys that make no sense ({type(error).__name__}: {str(error)[:200]})"
        raise ConfigError(container.path.name, found) from error


def text_config(container: GgufHeader) -> dict[str, Any]:
    """Return the config of a text-only model.

    Raises:
        KeyError, TypeError, ValueError: keys are missing or make no sense (`sensible`).
    """
    architecture = container.architecture
    keys = {key.removeprefix(f"{architecture}."): value for key, value in container.keys.items()}
    mtp = keys.get("nextn_predict_layers", 0)  # block_count includes these
    tied = "output.weight" not in container.tensors
    head = keys["attention.key_length"]
    config = _settings(architecture) | {
        "head_dim": head,
        "hidden_size": keys["embedding_length"],
        "layer_types": layer_types(keys, mtp),
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": keys["ssm.time_step_rank"],
        "linear_value_head_dim": keys["ssm.inner_size"] // keys["ssm.time_step_rank"],
        "max_position_embeddings": keys["context_length"],
        "mtp_num_hidden_layers": mtp,
        "num_attention_heads": keys["attention.head_count"],
        "num_hidden_layers": keys["block_count"] - mtp,
        "num_key_value_heads": keys["attention.head_count_kv"],
        "rms_norm_eps": short_number(keys, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys, head),
        "tie_word_embeddings": tied,
        "vocab_size": len(keys["tokenizer.ggml.tokens"]),
        **_feed_forward(keys, moe=architecture == "qwen35moe"),
    }
    interval = keys.get("full_attention_interval", 4)
    config["full_attention_interval"] = interval
    end = token_id(keys, _END)
    config["eos_token_id"] = keys.get("tokenizer.ggml.eos_token_id") if end is None else end
    model_type = config["model_type"]
    return {"architectures": [ARCHITECTURES[model_type].class_name], **config}


def _settings(architecture: str) -> dict[str, Any]:
    """Return the settings that no key says."""
    config = published_config(_RELEASES[architecture])
    text: dict[str, Any] = config["text_config"]
    text.pop("intermediate_size", None)
    version = config["transformers_version"]
    return text | {"model_type": _TEXT_TYPES[architecture], "transformers_version": version}


def layer_types(keys: Mapping[str, Any], mtp: int) -> list[str]:
    """Return the type of each layer before MTP.

    Raises:
        ValueError: the list of layers has another length than the model.
    """
    blocks = keys["block_count"]
    recurrent = keys.get("attention.recurrent_layers")
    if recurrent is None:  # as llama.cpp takes it
        interval = keys.get("full_attention_interval", 4)
        if type(interval) is not int or not interval > 0 or not 0 < blocks <= 10_000:
            raise ValueError(f"full_attention_interval {interval!r:.80}, {blocks!r:.80} blocks")
        recurrent = [bool((i + 1) % interval) for i in range(blocks)]
    if len(recurrent) != blocks:
        raise ValueError(f"{len(recurrent)} recurrent_layers, block_count {blocks}")
    layers = recurrent[: blocks - mtp]
    return ["linear_attention" if flag else "full_attention" for flag in layers]


def _feed_forward(keys: Mapping[str, Any], *, moe: bool) -> dict[str, Any]:
    if not moe:
        return {"intermediate_size": keys["feed_forward_length"]}
    return {
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
    }


def short_number(keys: Mapping[str, Any], key: str) -> float | int:
    """Return a float32 as the shortest number that rounds to it: 1e-06, not 9.99999997e-07."""
    value = keys[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        raise ValueError(f"{key} is {value!r:.80}")
    short = float(str(np.float32(value)))
    return int(short) if short.is_integer() and short >= 1 else short


def _rope(keys: Mapping[str, Any], head: int) -> dict[str, Any]:
    sections = keys["rope.dimension_sections"]
    while len(sections) > 1 and not sections[-1]:  # padded to four
        sections = sections[:-1]
    rope = {
        "mrope_interleaved": True,
        "mrope_section": sections,
        "partial_rotary_factor": keys["rope.dimension_count"] / head,
        "rope_theta": short_number(keys, "rope.freq_base"),
        "rope_type": "default",
    }
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {kind!r:.80}, not none, linear or yarn")
    rope |= {"rope_type": kind, "factor": short_number(keys, "rope.scaling.factor")}
    if kind == "yarn":
        found = {name: f"rope.scaling.{end}" for name, end in _YARN.items()}
        rope |= {name: short_number(keys, key) for name, key in found.items() if key in keys}
    return rope


def token_id(keys: Mapping[str, Any], token: str) -> int | None:
    """Return the number of a token, or None."""
    tokens = keys.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or token not in tokens:
        return None
    return tokens.index(token)


def vision_config(container: GgufHeader) -> dict[str, Any]:
    """Return the vision part of a config, from a projector's file.

    Raises:
        KeyError, TypeError, ValueError: keys are missing or make no sense (`sensible`).
    """
    keys = container.keys
    vision = {key.removeprefix("clip.vision."): value for key, value in keys.items()}
    patch = vision["patch_size"]
    settings: dict[str, Any] = published_config(_RELEASES["qwen35"])["vision_config"]
    deep = vision.get("is_deepstack_layers") or []
    return settings | {
        "deepstack_visual_indexes": [i for i, flag in enumerate(deep) if flag],
        "depth": vision["block_count"],
        "hidden_size": vision["embedding_length"],
        "intermediate_size": vision["feed_forward_length"],
        "num_heads": vision["attention.head_count"],
        "in_channels": 3,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "spatial_merge_size": vision["spatial_merge_size"],
        "num_position_embeddings": (vision["image_size"] // patch) ** 2,
        "out_hidden_size": vision["projection_dim"],
    }


def joint_config(
    text: Mapping[str, Any], vision: Mapping[str, Any], tokens: Sequence[str]
) -> dict[str, Any]:
    """Return the config of a model with a vision tower.

    Args:
        text: from `text_config`.
        vision: from `vision_config`.
        tokens: the vocabulary, by number.
    """
    inner = {key: value for key, value in text.items() if key != "architectures"}
    version, tied = inner.pop("transformers_version"), inner["tie_word_embeddings"]
    model_type = inner["model_type"].removesuffix("_text")
    ids = {key: tokens.index(token) for key, token in _VISION_TOKENS.items() if token in tokens}
    return {
        "architectures": [ARCHITECTURES[model_type].class_name],
        **{key: ids[key] for key in ids if key.startswith("image")},
        "model_type": model_type,
        "text_config": inner,
        "tie_word_embeddings": tied,
        "transformers_version": version,
        **{key: ids[key] for key in ids if not key.startswith("image")},
        "vision_config": {**vision, "model_type": model_type},
    }
