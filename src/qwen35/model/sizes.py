"""The config.json of each published release, for planning without a download.

Source: config.json of each repository; tests compare these with copies of the originals.
"""

from __future__ import annotations

from typing import Any

__all__ = ["INFERRED", "PUBLISHED", "published_config"]

_Row = tuple[int, int, int, tuple[int, int], tuple[int, int], tuple[int, int] | None]

_TEXT: dict[str, _Row] = {
    # name: hidden, layers, feed-forward, (heads, kv heads), (key heads, value heads), (experts, k)
    "Qwen3.5-0.8B": (1024, 24, 3584, (8, 2), (16, 16), None),
    "Qwen3.5-2B": (2048, 24, 6144, (8, 2), (16, 16), None),
    "Qwen3.5-4B": (2560, 32, 9216, (16, 4), (16, 32), None),
    "Qwen3.5-9B": (4096, 32, 12288, (16, 4), (16, 32), None),
    "Qwen3.5-27B": (5120, 64, 17408, (24, 4), (16, 48), None),
    "Qwen3.5-35B-A3B": (2048, 40, 512, (16, 2), (16, 32), (256, 8)),
    "Qwen3.5-122B-A10B": (3072, 48, 1024, (32, 2), (16, 64), (256, 8)),
    "Qwen3.5-397B-A17B": (4096, 60, 1024, (32, 2), (16, 64), (512, 10)),
    # linear heads and the shared expert's 2048 are inferred: see INFERRED
    "Qwen3.8-2.4T-A95B": (8192, 92, 2048, (64, 4), (16, 128), (512, 10)),
}
_VISION = {
    "Qwen3.5-0.8B": (12, 768, 3072, 12),
    "Qwen3.5-2B": (24, 1024, 4096, 16),
    "Qwen3.5-4B": (24, 1024, 4096, 16),
}
_LARGE_VISION = (27, 1152, 4304, 16)
_TEXT_ONLY = ("Qwen3.8-2.4T-A95B",)
_TIED = ("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B")

_ALIASES = {
    "Qwen3.5-0.8B-Base": "Qwen3.5-0.8B",
    "Qwen3.5-2B-Base": "Qwen3.5-2B",
    "Qwen3.5-4B-Base": "Qwen3.5-4B",
    "Qwen3.5-9B-Base": "Qwen3.5-9B",
    "Qwen3.5-35B-A3B-Base": "Qwen3.5-35B-A3B",
    "Qwen3.6-27B": "Qwen3.5-27B",
    "Qwen3.6-35B-A3B": "Qwen3.5-35B-A3B",
    "Qwen3.8-27B": "Qwen3.5-27B",
}
"""Releases with the geometry of another release."""

PUBLISHED: tuple[str, ...] = (*_TEXT, *_ALIASES)
"""Names accepted by `published_config`."""

INFERRED: dict[str, str] = {
    "Qwen3.8-2.4T-A95B": "two sizes of Qwen3.8-2.4T-A95B are inferred, not read from its "
    "config.json: 16 key and 128 value heads in linear attention, and a shared expert of 2048; "
    "they give the 1,609 tensors and 4.89 TB that are published"
}
"""What is not sure about a release; plans show it as a note."""

FUSED_MTP_EXPERTS: tuple[str, ...] = ("Qwen3.6-35B-A3B", "Qwen3.8-2.4T-A95B")
"""Releases whose MTP experts form one 3-D stack; Qwen3.5 stores one matrix per expert."""


def published_config(name: str) -> dict[str, Any]:
    """Return config.json of the release `name`, a member of `PUBLISHED`.

    For Qwen3.5 every key matches the published file; later releases add keys that do not affect a
    plan. `INFERRED` names the releases whose sizes are not all known.
    """
    base = _ALIASES.get(name, name)
    hidden, layers, ffn, heads, linear_heads, experts = _TEXT[base]
    tied = base in _TIED
    suffix = "_moe" if experts else ""
    text: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "layer_types": [
            "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": linear_heads[0],
        "linear_num_value_heads": linear_heads[1],
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": f"qwen3_5{suffix}_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": heads[0],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": 248320,
    }
    if experts:
        text |= {
            "moe_intermediate_size": ffn,
            "shared_expert_intermediate_size": ffn,
            "num_experts": experts[0],
            "num_experts_per_tok": experts[1],
            "router_aux_loss_coef": 0.001,
        }
    else:
        text["intermediate_size"] = ffn
    if tied:
        text["tie_word_embeddings"] = True
    if base in _TEXT_ONLY:
        flat = {"architectures": [f"Qwen3_5{'Moe' if experts else ''}ForCausalLM"], **text}
        return flat | {"tie_word_embeddings": tied, "transformers_version": "5.17.0"}
    depth, vision_hidden, vision_ffn, vision_heads = _VISION.get(base, _LARGE_VISION)
    return {
        "architectures": [f"Qwen3_5{'Moe' if experts else ''}ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": f"qwen3_5{suffix}",
        "text_config": text,
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": vision_ffn,
            "model_type": f"qwen3_5{suffix}",
            "num_heads": vision_heads,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }
