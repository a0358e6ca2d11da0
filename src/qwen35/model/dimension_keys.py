"""The keys of config.json behind the dimensions of weights, for messages about sizes."""

from __future__ import annotations

from qwen35.model.roles import RoleInfo

__all__ = ["DIMENSION_KEYS", "shape_keys"]

DIMENSION_KEYS: dict[str, str] = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "two_hidden": "2 * hidden_size",
    "ffn": "intermediate_size",
    "head": "head_dim",
    "query": "num_attention_heads * head_dim, with its gate",
    "key_value": "num_key_value_heads * head_dim",
    "attention": "num_attention_heads * head_dim",
    "linear_qkv": "linear heads * linear_*_head_dim",
    "linear_value": "linear_num_value_heads * linear_value_head_dim",
    "linear_heads": "linear_num_value_heads",
    "linear_head": "linear_value_head_dim",
    "conv": "linear_conv_kernel_dim",
    "experts": "num_experts",
    "expert_ffn": "moe_intermediate_size",
    "expert_gate_up": "2 * moe_intermediate_size",
    "shared_ffn": "shared_expert_intermediate_size",
    "vision_hidden": "vision_config.hidden_size",
    "vision_qkv": "3 * vision_config.hidden_size",
    "vision_ffn": "vision_config.intermediate_size",
    "vision_out": "vision_config.out_hidden_size",
    "vision_merged": "vision_config.hidden_size * spatial_merge_size ** 2",
    "vision_positions": "vision_config.num_position_embeddings",
    "vision_channels": "vision_config.in_channels",
    "vision_frames": "vision_config.temporal_patch_size",
    "vision_patch": "vision_config.patch_size",
}
"""Keys of config.json by symbolic size (`ModelConfig.dims`); a product where it is one."""


def shape_keys(info: RoleInfo) -> str:
    """Return the keys that set a weight's shape, outermost first.

    >>> from qwen35.model.roles import ROLES
    >>> shape_keys(ROLES["mlp.gate_proj.weight"])
    'intermediate_size x hidden_size'
    """
    return " x ".join(DIMENSION_KEYS.get(size, size) for size in info.shape)
