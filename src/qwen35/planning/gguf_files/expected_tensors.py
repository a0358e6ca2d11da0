"""The tensors and keys that a GGUF file must have, derived from its own keys."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import group
from qwen35.model.model_config import ARCHITECTURES, parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.planning.gguf_files.gguf_config import sensible, text_config, vision_config
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
    with sensible(container):  # those of a foreign file may be missing, of any type, or zero
        return _expected(container)


def _expected(container: GgufHeader) -> dict[str, UntypedTensor]:
    vision = container.architecture == "clip"
    raw = _vision_alone(container) if vision else text_config(container)
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


def _vision_alone(container: GgufHeader) -> dict[str, Any]:
    """Return a config with the real vision part and a minimal text part."""
    text = dict.fromkeys(_SMALLEST, 1) | {"hidden_size": container.keys[_PROJECTED]}
    return {
        "model_type": "qwen3_5",
        "text_config": text | {"model_type": "qwen3_5_text", "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_config": vision_config(container),
    }


_PROJECTED = "clip.vision.projection_dim"
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
