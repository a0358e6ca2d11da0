"""Small checkpoints of true layout for tests: random weights from a config and a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors, role_of
from qwen35.tensors import TensorSpec

ASSET = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Tensors = dict[str, torch.Tensor]


def tiny_config(
    *,
    moe: bool = False,
    text_only: bool = False,
    tied: bool = True,
    mtp: int = 1,
    dtype: str = "bfloat16",
    layers: int = 4,
) -> dict[str, Any]:
    """Return config.json of a model with every dimension a multiple of 64."""
    suffix = "_moe" if moe else ""
    text: dict[str, Any] = {
        "attn_output_gate": True,
        "dtype": dtype,
        "eos_token_id": 1,
        "full_attention_interval": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 256,
        "layer_types": [
            "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "model_type": f"qwen3_5{suffix}_text",
        "mtp_num_hidden_layers": mtp,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": tied,
        "vocab_size": 512,
    }
    if moe:
        text |= {
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    else:
        text["intermediate_size"] = 512
    name = f"Qwen3_5{'Moe' if moe else ''}"
    if text_only:
        return {"architectures": [f"{name}ForCausalLM"], **text}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "image_token_id": 504,
        "model_type": f"qwen3_5{suffix}",
        "text_config": text,
        "tie_word_embeddings": tied,
        "video_token_id": 505,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "intermediate_size": 128,
            "model_type": f"qwen3_5{suffix}",
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 256,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 506,
        "vision_start_token_id": 507,
    }


def layout_of(
    config: Mapping[str, Any], *, per_expert: bool = False, mtp: bool = True
) -> CheckpointNaming:
    """Return the layout of published checkpoints, or one with every expert by itself."""
    parsed = parse_config(dict(config))
    published = CheckpointNaming.published(parsed)
    blocks = set(published.per_expert)
    if per_expert:
        blocks |= {f"layers.{i}" for i in range(len(parsed.layer_types))}
    return CheckpointNaming(
        published.prefix, frozenset(blocks), mtp and published.mtp, published.head
    )


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    role = role_of(spec.name)
    values = torch.randn(spec.shape, generator=generator) * 0.02
    if role.name.endswith("A_log"):
        values = torch.rand(spec.shape, generator=generator) * 2
    elif role.name.endswith(("linear_attn.norm", "dt_bias", "norm1", "norm2", "merger.norm")):
        values = 1 + values
    return values.to(TORCH_DTYPES[spec.dtype])


def random_tensors(
    config: dict[str, Any], layout: CheckpointNaming | None = None, seed: int = 0
) -> Tensors:
    """Return seeded random weights for `config`, which the caller may change."""
    made = _random_tensors(json.dumps(config), layout or layout_of(config), seed)
    return {name: tensor.clone() for name, tensor in made.items()}


@lru_cache(maxsize=16)
def _random_tensors(config: str, layout: CheckpointNaming, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    specs = expected_tensors(parse_config(json.loads(config)), layout)
    return {spec.name: _random(spec, generator) for spec in specs}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    shards: int = 1,
    index: bool = True,
    sidecars: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint with the safetensors library, in `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model.safetensors-{i + 1:05d}-of-{shards:05d}.safetensors"
        if not index:
            file = "model.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i * size : (i + 1) * size]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in (sidecars or {}).items():
        (folder / name).write_text(content)
    return folder


def make_checkpoint(
    folder: Path, *, seed: int = 0, per_expert: bool = False, **options: Any
) -> Path:
    """Write a random checkpoint; `options` are those of `tiny_config`."""
    config = tiny_config(**options)
    tensors = random_tensors(config, layout_of(config, per_expert=per_expert), seed)
    return write_checkpoint(folder, config, tensors)
