"""The tensors and keys that a GGUF file must have, derived from its own keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import group
from qwen35.errors import ConfigError
from qwen35.model.model_config import ARCHITECTURES, parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.planning.gguf_files.tensor_names import (
    UntypedTensor,
    mtp_tensors,
    text_tensors,
    vision_tensors,
)
from qwen35.tensors import StoredTensor

__all__ = ["KEYS", "expected", "missing_keys"]

_COMMON = ("general.architecture", "general.type", "general.name", "general.file_type")
_TEXT = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.recurrent_layers",
    "rope.dimension_count",
    "rope.dimension_sections",
    "rope.freq_base",
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
)
_DENSE = ("feed_forward_length",)
_MOE = (
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_used_count",
)
_TOKENIZER = (
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.eos_token_id",
)
_VISION = (
    "clip.has_vision_encoder",
    "clip.projector_type",
    "clip.use_gelu",
    *(
        f"clip.vision.{key}"
        for key in (
            "attention.head_count",
            "attention.layer_norm_epsilon",
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "image_mean",
            "image_size",
            "image_std",
            "patch_size",
            "projection_dim",
            "spatial_merge_size",
        )
    ),
)


def _prefixed(architecture: str, *tables: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{architecture}.{key}" for table in tables for key in table)


KEYS: dict[str, tuple[str, ...]] = {
    "qwen35": (*_COMMON, *_prefixed("qwen35", _TEXT, _DENSE), *_TOKENIZER),
    "qwen35moe": (*_COMMON, *_prefixed("qwen35moe", _TEXT, _MOE), *_TOKENIZER),
    "clip": (*_COMMON, *_VISION),
}
"""Keys that llama.cpp needs, by architecture (``src/models/qwen35*.cpp``, ``tools/mtmd``)."""


def missing_keys(container: GgufHeader) -> list[str]:
    """Return the keys that the file's architecture requires and the file lacks."""
    return [key for key in KEYS.get(container.architecture, ()) if key not in container.keys]


def expected(container: GgufHeader) -> dict[str, UntypedTensor]:
    """Return the tensors implied by a file's keys, by name.

    Raises:
        ConfigError: the keys contradict each other.
    """
    try:
        return _expected(container)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        # The keys of a foreign file may be missing, of any type, or zero.
        found = f"keys that make no sense ({type(error).__name__}: {error})"
        raise ConfigError(container.path.name, found) from error


def _expected(container: GgufHeader) -> dict[str, UntypedTensor]:
    vision = container.architecture == "clip"
    raw = _vision_config(container.keys) if vision else _text_config(container)
    config = parse_config(raw)
    architecture = ARCHITECTURES[config.model_type]
    prefix = "model.language_model." if architecture.vision else "model."
    layout = CheckpointNaming(prefix, frozenset(), config.mtp_layers > 0, not config.tied)
    # Run the writer's own mapping on an empty checkpoint of this geometry.
    stored = {spec.name: StoredTensor(spec, "", 0) for spec in expected_tensors(config, layout)}
    checkpoint = Checkpoint(
        container.path.name, config, group(stored)[0], layout, MappingProxyType({})
    )
    items = inventory(checkpoint)
    if vision:
        return {tensor.name: tensor for tensor in vision_tensors(items)}
    if container.mtp_alone:
        return {tensor.name: tensor for tensor in mtp_tensors(items, config)}
    return {t.name: t for t in text_tensors(items, config, mtp=config.mtp_layers > 0)}


def _text_config(container: GgufHeader) -> dict[str, Any]:
    architecture = container.architecture
    keys = {key.removeprefix(f"{architecture}."): value for key, value in container.keys.items()}
    mtp = keys.get("nextn_predict_layers", 0)  # block_count includes these
    recurrent = keys["attention.recurrent_layers"]
    layers = keys["block_count"] - mtp
    if len(recurrent) != keys["block_count"]:
        raise ValueError(f"{len(recurrent)} recurrent_layers, block_count {keys['block_count']}")
    moe = architecture == "qwen35moe"
    config = {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": keys["attention.head_count"],
        "num_key_value_heads": keys["attention.head_count_kv"],
        "head_dim": keys["attention.key_length"],
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": keys["ssm.time_step_rank"],
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_value_head_dim": keys["ssm.inner_size"] // keys["ssm.time_step_rank"],
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        "vocab_size": len(keys["tokenizer.ggml.tokens"]),
        "layer_types": [
            "linear_attention" if flag else "full_attention" for flag in recurrent[:layers]
        ],
        "mtp_num_hidden_layers": mtp,
        "tie_word_embeddings": "output.weight" not in container.tensors,
    }
    if moe:
        return config | {
            "num_experts": keys["expert_count"],
            "moe_intermediate_size": keys["expert_feed_forward_length"],
            "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        }
    return config | {"intermediate_size": keys["feed_forward_length"]}


def _vision_config(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the real vision part and a minimal text part."""
    vision = {key.removeprefix("clip.vision."): value for key, value in keys.items()}
    patch = vision["patch_size"]
    text = dict.fromkeys(_SMALLEST, 1) | {"hidden_size": vision["projection_dim"]}
    return {
        "model_type": "qwen3_5",
        "text_config": text | {"model_type": "qwen3_5_text", "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_config": {
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
        },
    }


_SMALLEST = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "vocab_size",
)
